"""tests/benchmark.py runs, at small sizes. Times are not checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmark
from attention import causal_mask, padding_mask, scaled_dot_product_attention
from common import arrays, random_params
from transformer_layer import encoder_layer, init_encoder_layer


@pytest.mark.parametrize(
    ("race", "arguments", "contestants"),
    [
        (benchmark.race_attention, (1, 2, 64, "float32", 1), ["plain", "flash", "jax.nn"]),
        (benchmark.race_layer, (1, 8, 16, 2, 32, "float32", 1), ["its matrix products", "encoder_layer"]),
        (benchmark.race_model, (2, 8, 1, 16, 2, 32, 1), ["JAXformers"]),
    ],
)
def test_each_contestant_is_measured(race, arguments, contestants, monkeypatch, capsys):
    """Each race has two parts, forward and gradient or training and decoding, with a row for each contestant."""
    monkeypatch.setattr(benchmark, "torch", None)
    monkeypatch.setattr(benchmark, "linen", None)
    monkeypatch.setattr(benchmark, "transformers", None)
    race(*arguments)
    rows = [line for line in capsys.readouterr().out.splitlines() if " ms " in line]
    assert [row[2:24].rstrip() for row in rows] == 2 * contestants


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, padding_mask(np.array([5, 8]), 8), causal_mask(8)])
def test_cudnn_attention(mask, causal):
    """`cudnn_attention` gives plain attention's results, alone and in a layer. Without a GPU, check its layout only."""
    gpu = jax.default_backend() == "gpu"
    dtype, tolerance = (jnp.bfloat16, 0.05) if gpu else (jnp.float32, 2e-6)
    assert benchmark.cudnn_attention.keywords == {"implementation": "cudnn"}
    attention = benchmark.cudnn_attention if gpu else benchmark.jax_nn_attention
    inputs = arrays((2, 3, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16), dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(init_encoder_layer, 48, 3, 8))

    def outputs(attention):
        layer = jax.jit(functools.partial(encoder_layer, attention=attention, causal=causal))
        attended = jax.jit(functools.partial(attention, causal=causal))(*inputs, mask)
        return attended, layer(params, inputs[0].reshape(2, 8, 48), mask)

    (output, layer), (expected, expected_layer) = outputs(attention), outputs(scaled_dot_product_attention)
    np.testing.assert_allclose(output.astype(float), expected.astype(float), atol=tolerance)
    np.testing.assert_allclose(layer.astype(float), expected_layer.astype(float), atol=5 * tolerance)
