"""tests/benchmark.py runs, at small sizes. Its figures are not checked: no test depends on time."""

import functools

import jax
import numpy as np
import pytest

import benchmark
from attention import padding_mask
from common import arrays, random_params
from transformer_layer import encoder_layer, init_encoder_layer


def test_jax_nn_as_the_attention_of_a_layer():
    """The contestant that cuDNN computes on a GPU gives our layer's numbers, masked and causal."""
    params = random_params(init_encoder_layer, 8, 2, 16)
    (x,) = arrays((2, 5, 8))
    layer = jax.jit(functools.partial(encoder_layer, causal=True), static_argnames="attention")
    mask = padding_mask(np.array([3, 5]), 5)
    actual = layer(params, x, mask, attention=benchmark.jax_nn_attention)
    np.testing.assert_allclose(actual, layer(params, x, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("table", "arguments", "rows"),
    [
        (benchmark.attention_table, (1, [64], "float32", 1), ["| n = 64, forward |", "| n = 64, gradient |"]),
        (benchmark.layer_table, ("small", 1, 8, "float32", 1), ["| its matrix products |", "| encoder_layer |"]),
        (benchmark.model_table, (2, 8, 1, 16, 2, 32, 1), ["| training step |", "| greedy decoding |"]),
    ],
)
def test_tables(table, arguments, rows, monkeypatch, capsys):
    """Each table has a row for each thing that is timed."""
    monkeypatch.setitem(benchmark.MODELS, "small", (16, 2, 32))
    monkeypatch.setattr(benchmark, "installed", lambda package: False)
    table(*arguments)
    output = capsys.readouterr().out
    for row in rows:
        assert row in output
    assert output.count(" ms") >= 2
