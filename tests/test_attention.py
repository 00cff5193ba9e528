"""attention.py against NumPy in float64, and the promises of its docstrings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import attention_weights, causal_mask, padding_mask, scaled_dot_product_attention
from common import arrays

weigh = jax.jit(attention_weights, static_argnames="causal")
attend = jax.jit(scaled_dot_product_attention, static_argnames="causal")


def equation_1(query, key, value, mask):
    """softmax(Q K^T / sqrt(d_k)) V for one head, in NumPy float64; zeros for a row without keys."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = query @ key.T / np.sqrt(query.shape[-1])
    exponentials = np.where(mask, np.exp(scores), 0)
    denominator = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials / np.where(denominator == 0, 1, denominator)
    return weights, weights @ value


def test_causal_mask_is_the_lower_triangle():
    """Section 3.2.3: row i is True up to and including column i."""
    assert causal_mask(3).dtype == bool
    np.testing.assert_array_equal(causal_mask(3), [[1, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_padding_mask_keeps_the_first_keys():
    """lengths (...,) -> (..., 1, 1, max_length), True below the length."""
    mask = padding_mask(jnp.array([2, 0, 3]), 3)
    assert mask.dtype == bool
    assert mask.shape == (3, 1, 1, 3)
    np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert padding_mask(2, 3).shape == (1, 1, 3)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_shapes_and_dtypes(lead):
    """(..., n, k), (..., m, k), (..., m, v) -> weights (..., n, m) and output (..., n, v), any leading axes."""
    query, key, value = arrays((*lead, 4, 6), (*lead, 5, 6), (*lead, 5, 7))
    assert jax.eval_shape(attention_weights, query, key).shape == (*lead, 4, 5)
    assert jax.eval_shape(scaled_dot_product_attention, query, key, value).shape == (*lead, 4, 7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    """The weights are float32. Rounded to the dtype of value, they weigh the values; the output is rounded once."""
    halves = [x.astype(dtype) for x in arrays((8, 16), (8, 16), (8, 16))]
    weights, output = weigh(*halves[:2]), attend(*halves)
    assert (weights.dtype, output.dtype) == (jnp.float32, dtype)
    exact, _ = equation_1(*halves, mask=True)
    np.testing.assert_allclose(weights, exact, rtol=2e-6)
    expected = np.asarray(weights.astype(dtype), np.float64) @ np.asarray(halves[2], np.float64)
    # Rounding to the nearest may fall to either side of a tie: one unit in the last place, and float32 noise.
    np.testing.assert_allclose(output.astype(float), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equation_1_in_float64(masked, causal):
    """Equation 1, head by head, against NumPy float64 written from the equation; with and without masks."""
    query, key, value = arrays((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 5))
    mask = np.random.default_rng(1).random((2, 1, 6, 6)) < 0.5 if masked else None
    weights = np.asarray(weigh(query, key, mask, causal=causal))
    output = np.asarray(attend(query, key, value, mask, causal=causal))
    full = np.ones((2, 3, 6, 6), bool) if mask is None else np.broadcast_to(mask, (2, 3, 6, 6))
    full = full & np.tri(6, dtype=bool) if causal else full
    for index in np.ndindex(2, 3):
        expected = equation_1(query[index], key[index], value[index], full[index])
        np.testing.assert_allclose(weights[index], expected[0], rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(output[index], expected[1], rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (4, 5), (3, 1, 1), (3, 4, 5), (2, 1, 1, 5), (2, 3, 4, 5)])
def test_masks_broadcast(shape):
    """A mask of every shape that broadcasts to (..., n, m) does what the full mask does."""
    query, key, value = arrays((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6))
    mask = np.random.default_rng(2).random(shape) < 0.6
    full = np.broadcast_to(mask, (2, 3, 4, 5))
    np.testing.assert_allclose(weigh(query, key, mask), weigh(query, key, full), rtol=1e-6)
    np.testing.assert_allclose(attend(query, key, value, mask), attend(query, key, value, full), rtol=1e-6)


def test_masks_combine():
    """`mask & causal_mask` is the mask with causal=True."""
    query, key, value = arrays((2, 1, 4, 6), (2, 1, 4, 6), (2, 1, 4, 6))
    mask = padding_mask(jnp.array([2, 4]), 4)
    np.testing.assert_array_equal(
        attend(query, key, value, mask & causal_mask(4)), attend(query, key, value, mask, causal=True)
    )


def test_causal_output_does_not_see_the_future():
    """Section 3.2.3: changing position 3 and later leaves the outputs 0, 1 and 2 as they were, to the last bit."""
    query, key, value = arrays((5, 6), (5, 6), (5, 6))
    later = np.arange(5)[:, None] >= 3
    output = np.asarray(attend(query, key, value, causal=True))
    changed = np.asarray(attend(query, np.where(later, 9, key), np.where(later, -9, value), causal=True))
    np.testing.assert_array_equal(output[:3], changed[:3])
    assert (output[3:] != changed[3:]).all()


def test_rows_that_attend_to_nothing_are_zero():
    """A query that may attend to nothing gets zeros, neither NaN nor an average, and a zero gradient."""
    query, key, value = arrays((4, 6), (5, 6), (5, 6))
    mask = np.ones((4, 5), bool)
    mask[1] = False
    assert not np.any(np.asarray(weigh(query, key, mask))[1])
    assert not np.any(np.asarray(attend(query, key, value, mask))[1])

    def row(query, key, value):
        return scaled_dot_product_attention(query, key, value, mask)[1].sum()

    for gradient in jax.jit(jax.grad(row, argnums=(0, 1, 2)))(query, key, value):
        assert not np.any(gradient)


def test_second_derivatives_with_a_row_that_attends_to_nothing():
    """They are finite in float32, and zero for that row."""
    query, key, value = arrays((3, 4), (3, 4), (3, 4))
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    hessian = jax.jit(jax.hessian(lambda query: jnp.square(attend(query, key, value, mask)).sum()))(query)
    assert np.isfinite(hessian).all()
    assert np.any(hessian[0])
    assert not np.any(hessian[1])


def test_weights_are_distributions():
    """Each row of the softmax is non-negative and sums to 1."""
    query, key = arrays((2, 6, 8), (2, 6, 8))
    weights = np.asarray(weigh(query, key, causal=True))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)


def test_jit_equals_no_jit():
    """jax.jit changes the speed and not the numbers."""
    query, key, value = arrays((2, 6, 8), (2, 6, 8), (2, 6, 8))
    np.testing.assert_allclose(
        attend(query, key, value), scaled_dot_product_attention(query, key, value), rtol=1e-6, atol=1e-6
    )


X = np.zeros((2, 4, 6), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be floating point, got int32", (X.astype(np.int32), X, X)),
        (TypeError, "value must be floating point, got bool", (X, X, X.astype(bool))),
        (ValueError, r"key must have at least two axes \(positions, dimension\), got shape \(6,\)", (X, X[0, 0], X)),
        (ValueError, "query and key must have the same dimension d_k of at least 1, got 6 and 5", (X, X[..., :5], X)),
        (
            ValueError,
            "query and key must have the same dimension d_k of at least 1, got 0",
            (X[..., :0], X[..., :0], X),
        ),
        (ValueError, "key and value must have the same length m, got 4 and 3", (X, X, X[:, :3])),
        (ValueError, "leading axes of query, key and value must broadcast", (X, X, np.zeros((3, 4, 6), np.float32))),
        (TypeError, r"mask must be boolean \(True: may attend\), got float32", (X, X, X, X[0, :, :4])),
        (ValueError, r"mask must broadcast to .* = \(2, 4, 4\), got shape \(3,\)", (X, X, X, np.ones(3, bool))),
        (ValueError, "mask must broadcast", (X, X, X, np.ones((1, 2, 4, 4), bool))),
        (ValueError, "mask must broadcast", (X[:1], X[:1], X[:1], np.ones((2, 4, 4), bool))),
    ],
)
def test_bad_input(error, message, arguments):
    """What does not fit raises one sentence that names the argument, what it was and what it must be."""
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arguments)


def test_bad_causal_and_lengths():
    """Causal attention needs n = m and a Python bool; padding_mask needs integers."""
    with pytest.raises(ValueError, match="causal attention requires as many queries as keys, got 4 and 3"):
        attention_weights(X, X[:, :3], causal=True)
    with pytest.raises(TypeError, match="causal must be a Python bool"):
        jax.jit(scaled_dot_product_attention)(X, X, X, causal=True)
    with pytest.raises(TypeError, match="lengths must be integers, got float32"):
        padding_mask(jnp.array([1.0]), 3)
