"""jax.nn.dot_product_attention as witness: masks, causality and half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import flash_attention, padding_mask, scaled_dot_product_attention
from common import arrays

FUNCTIONS = {"plain": scaled_dot_product_attention, "flash": functools.partial(flash_attention, block_size=4)}


@functools.partial(jax.jit, static_argnums=(0, 5))
def with_witness(name, query, key, value, mask, causal):
    """Our output and that of jax.nn, which has positions before heads, (b, n, h, k), and no float16 on the CPU."""
    swapped = [x.swapaxes(1, 2) for x in (query, key, value)]
    if query.dtype == jnp.float16:
        swapped = [x.astype(jnp.float32) for x in swapped]
    witness = jax.nn.dot_product_attention(*swapped, mask=mask, is_causal=causal)
    return FUNCTIONS[name](query, key, value, mask, causal=causal), witness.swapaxes(1, 2)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["causal", "padding", "full"])
def test_agrees_with_jax_nn(name, dtype, kind):
    """Equation 1 with the causal mask of 3.2.3, with padded keys, and with any mask, in three dtypes."""
    query, key, value = arrays((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), dtype=dtype)
    full = np.random.default_rng(1).random((2, 3, 9, 9)) < 0.5
    full |= np.eye(9, dtype=bool)  # jax.nn averages over everything where a row may attend to nothing; we give zeros
    mask = {"causal": None, "padding": padding_mask(np.array([5, 9]), 9), "full": full}[kind]
    ours, theirs = with_witness(name, query, key, value, mask, kind == "causal")
    assert ours.dtype == dtype
    # jax.nn rounds the weights to half precision before the sum with the values: a few units in the last place of 1.
    tolerance = 2e-6 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=tolerance)
