"""attention.py: scaled dot-product attention, its masks, and its errors. Equation 1 itself is in test_paper.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import attention_weights, causal_mask, flash_attention, padding_mask, scaled_dot_product_attention
from common import arrays

weigh = jax.jit(attention_weights, static_argnames="causal")
attend = jax.jit(scaled_dot_product_attention, static_argnames="causal")


def test_causal_mask_is_the_lower_triangle():
    """Section 3.2.3: row i is True up to and including column i."""
    assert causal_mask(3).dtype == bool
    np.testing.assert_array_equal(causal_mask(3), [[1, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_padding_mask_keeps_the_first_keys():
    """lengths (...,) -> (..., 1, 1, max_length), True below the length."""
    mask = padding_mask(jnp.array([2, 0, 3]), 3)
    assert (mask.dtype, mask.shape) == (bool, (3, 1, 1, 3))
    np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert padding_mask(2, 3).shape == (1, 1, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "full"])
def test_agrees_with_jax_nn(kind, causal):
    """Weights, plain and flash attention equal `jax.nn.dot_product_attention`, with every kind of mask."""
    query, key, value = arrays((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8))
    full = np.random.default_rng(1).random((2, 3, 9, 9)) < 0.5
    full |= np.eye(9, dtype=bool)  # jax.nn averages over all keys in fully masked rows, so leave none
    mask = {"none": None, "padding": padding_mask(np.array([5, 9]), 9), "full": full}[kind]

    swapped = (x.swapaxes(1, 2) for x in (query, key, value))  # jax.nn has positions before heads: (b, n, h, k)
    reference = jax.nn.dot_product_attention(*swapped, mask=mask, is_causal=causal).swapaxes(1, 2)
    output = weigh(query, key, mask, causal=causal) @ value
    np.testing.assert_allclose(output, reference, atol=2e-6)
    for function in (attend, functools.partial(flash_attention, block_size=4)):
        np.testing.assert_allclose(function(query, key, value, mask, causal=causal), reference, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (3, 1, 1), (2, 1, 1, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("attention", [attend, functools.partial(flash_attention, block_size=3)])
def test_masks_broadcast(attention, shape):
    """A mask of any shape that broadcasts to (..., n, m) equals the full mask."""
    query, key, value = arrays((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6))
    mask = np.random.default_rng(2).random(shape) < 0.6
    expected = attend(query, key, value, np.broadcast_to(mask, (2, 3, 4, 5)))
    np.testing.assert_allclose(attention(query, key, value, mask), expected, rtol=1e-6, atol=1e-6)


def test_fully_masked_queries_have_zero_derivatives():
    """A fully masked query outputs exact zeros. Its first and second derivatives are zero, and all are finite."""
    query, key, value = arrays((3, 4), (3, 4), (3, 4))
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    assert not np.any(weigh(query, key, mask)[1])
    assert not np.any(attend(query, key, value, mask)[1])

    def masked_row(*qkv):
        return attend(*qkv, mask)[1].sum()

    assert not any(map(np.any, jax.jit(jax.grad(masked_row, argnums=(0, 1, 2)))(query, key, value)))
    with jax.debug_nans(True):  # outside jit, it checks each intermediate result
        scaled_dot_product_attention(query, key, value, mask)
    hessian = jax.jit(jax.hessian(lambda query: jnp.square(attend(query, key, value, mask)).sum()))(query)
    assert np.isfinite(hessian).all()
    assert np.any(hessian[0])
    assert not np.any(hessian[1])


@pytest.mark.parametrize("attention", [attend, functools.partial(flash_attention, block_size=1)])
@pytest.mark.parametrize("score", [-2e9, -3e38])
def test_a_masked_key_never_wins(attention, score):
    """However small a score is, it counts, and a masked one does not."""
    query, key, value = np.full((1, 1), score, np.float32), np.ones((2, 1), np.float32), np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(attention(query, key, value, np.array([True, False])), [[1, 0]])


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64"), ("float16", "float32")])
def test_the_wider_dtype_accumulates(dtypes):
    """The weights have the wider dtype of query and key, and at least float32."""
    with jax.enable_x64(True):
        query, key = (np.ones((3, 4), dtype) for dtype in dtypes)
        assert jax.eval_shape(attention_weights, query, key).dtype == jnp.result_type(query, key)


X = np.zeros((2, 4, 6), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be floating point, got int32", (X.astype(np.int32), X, X)),
        (TypeError, "value must be floating point, got bool", (X, X, X.astype(bool))),
        (ValueError, r"key must have at least two axes \(positions, dimension\), got shape \(6,\)", (X, X[0, 0], X)),
        (ValueError, "query and key must have the same dimension d_k of at least 1, got 6 and 5", (X, X[..., :5], X)),
        (ValueError, "the same dimension d_k of at least 1, got 0", (X[..., :0], X[..., :0], X)),
        (ValueError, "key and value must have the same length m, got 4 and 3", (X, X, X[:, :3])),
        (ValueError, "leading axes of query, key and value must broadcast", (X, X, np.zeros((3, 4, 6), np.float32))),
        (ValueError, "leading axes of query, key and value must broadcast", (X, np.zeros((3, 4, 6), np.float32), X)),
        (TypeError, r"mask must be boolean \(True: may attend\), got float32", (X, X, X, X[0, :, :4])),
        (ValueError, r"mask must broadcast to .* = \(2, 4, 4\), got shape \(3,\)", (X, X, X, np.ones(3, bool))),
        (ValueError, "mask must broadcast", (X, X, X, np.ones((1, 2, 4, 4), bool))),
        (ValueError, "mask must broadcast", (X[0], X[0], X, np.ones((2, 4, 4), bool))),
    ],
)
@pytest.mark.parametrize("attention", [scaled_dot_product_attention, flash_attention])
def test_bad_input(attention, error, message, arguments):
    """An invalid argument raises one error that names it, its value, and what it must be."""
    with pytest.raises(error, match=message):
        attention(*arguments)


def test_bad_causal_and_lengths():
    """Causal attention requires n = m and a Python bool; `padding_mask` requires integers."""
    for attention, n, m in itertools.product((scaled_dot_product_attention, flash_attention), (3, 4), (3, 4)):
        if n != m:
            with pytest.raises(ValueError, match=f"requires as many queries as keys, got {n} and {m}"):
                attention(X[:, :n], X[:, :m], X[:, :m], causal=True)
    with pytest.raises(TypeError, match="causal must be a Python bool"):
        jax.jit(scaled_dot_product_attention)(X, X, X, causal=True)
    with pytest.raises(TypeError, match="lengths must be integers, got float32"):
        padding_mask(jnp.array([1.0]), 3)
