"""tests/benchmark.py still runs; its figures are not checked, for no test depends on time."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from attention import padding_mask
from benchmark import jax_nn_attention
from common import arrays, early, random_params
from transformer_layer import encoder_layer, init_encoder_layer


@early
def quick_benchmark():
    """The finished `python tests/benchmark.py --quick`."""
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "--quick"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_jax_nn_as_the_attention_of_a_layer():
    """The contestant of the benchmark that cuDNN computes on a GPU gives our layer's numbers, masked and causal."""
    params = random_params(init_encoder_layer, 8, 2, 16)
    (x,) = arrays((2, 5, 8))
    layer = jax.jit(functools.partial(encoder_layer, causal=True), static_argnames="attention")
    mask = padding_mask(np.array([3, 5]), 5)
    np.testing.assert_allclose(layer(params, x, mask, attention=jax_nn_attention), layer(params, x, mask), atol=1e-5)


def test_quick_benchmark_prints_its_tables(quick_benchmark):
    """`python tests/benchmark.py --quick` prints its three tables, with every contestant in them."""
    assert (quick_benchmark.returncode, quick_benchmark.stderr) == (0, "")
    for expected in ("| n |  | plain | flash | jax.nn |", "| 64 | gradient |", "| encoder_layer |"):
        assert expected in quick_benchmark.stdout
    assert "| time to compile | 1 layers | 2 layers | ratio |" in quick_benchmark.stdout
    for dtype in ("float32", "bfloat16"):
        assert f"Causal attention, 8 heads of 64, {dtype}" in quick_benchmark.stdout
        assert f"1 x 64 positions, {dtype} |" in quick_benchmark.stdout
