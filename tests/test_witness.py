"""jax.nn.dot_product_attention as witness: masks, causality and half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import flash_attention, padding_mask, scaled_dot_product_attention
from common import arrays


@functools.partial(jax.jit, static_argnames="causal")
def with_witness(query, key, value, mask, causal):
    """Our two outputs and that of jax.nn, which has positions before heads, (b, n, h, k), and no float16 on the CPU."""
    swapped = [x.swapaxes(1, 2) for x in (query, key, value)]
    if query.dtype == jnp.float16:
        swapped = [x.astype(jnp.float32) for x in swapped]
    witness = jax.nn.dot_product_attention(*swapped, mask=mask, is_causal=causal)
    plain = scaled_dot_product_attention(query, key, value, mask, causal=causal)
    return plain, flash_attention(query, key, value, mask, causal=causal, block_size=4), witness.swapaxes(1, 2)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("causal", jnp.float32),
        ("padding", jnp.float32),
        ("full", jnp.float32),
        ("causal", jnp.bfloat16),
        ("full", jnp.float16),
    ],
)
def test_agrees_with_jax_nn(kind, dtype):
    """Equation 1 with the causal mask of 3.2.3, with padded keys, and with any mask, in three dtypes."""
    query, key, value = arrays((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), dtype=dtype)
    full = np.random.default_rng(1).random((2, 3, 9, 9)) < 0.5
    full |= np.eye(9, dtype=bool)  # jax.nn averages over everything where a row may attend to nothing; we give zeros
    mask = {"causal": None, "padding": padding_mask(np.array([5, 9]), 9), "full": full}[kind]
    *ours, theirs = with_witness(query, key, value, mask, causal=kind == "causal")
    # jax.nn rounds the weights to half precision before the sum with the values: a few units in the last place of 1.
    tolerance = 2e-6 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    for output in ours:
        assert output.dtype == dtype
        np.testing.assert_allclose(output.astype(np.float32), theirs.astype(np.float32), atol=tolerance)
