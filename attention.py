"""Scaled dot-product attention: section 3.2.1 of "Attention Is All You Need" (arXiv 1706.03762).

Pure functions of arrays, without parameters. The axes, in shapes and einsum strings:

    ...  any leading axes (batch, heads)        k  per-head depth d_k of queries and keys
    n    query positions                        v  per-head depth d_v of values
    m    key and value positions

A mask is boolean, True where a query may attend to a key. It broadcasts to (..., n, m), and masks combine with `&`.
"""

import math

import jax
import jax.numpy as jnp


def causal_mask(length):
    """Section 3.2.3: position i may attend to the positions up to and including i.

    Returns a boolean mask (length, length): the lower triangle.
    """
    return jnp.tril(jnp.ones((length, length), dtype=bool))


def padding_mask(lengths, max_length):
    """Every query may attend to the first `lengths` of `max_length` keys; the rest is padding.

    lengths: (...,) integers. Returns a boolean mask (..., 1, 1, max_length), which broadcasts over heads and queries.
    Raises TypeError where lengths are not integers.
    """
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    return jnp.arange(max_length) < lengths[..., None, None, None]


def attention_weights(query, key, mask=None, *, causal=False):
    """The softmax of Equation 1: softmax(Q K^T / sqrt(d_k)), each row a distribution over the keys.

    query (..., n, k), key (..., m, k), mask broadcasting to (..., n, m) -> weights (..., n, m), in at least float32.
    A query that may attend to nothing gets zeros. `causal=True` adds `causal_mask`, and needs n = m.
    Raises TypeError for inputs that are not floating point or a mask that is not boolean, ValueError for shapes that
    do not fit together.
    """
    query, key, _, mask = _checked(query, key, key, mask, causal)
    exponentials = _exponentials(query, key, mask)
    return exponentials / _denominator(exponentials, mask)


def scaled_dot_product_attention(query, key, value, mask=None, *, causal=False):
    """Equation 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V.

    query (..., n, k), key (..., m, k), value (..., m, v), mask broadcasting to (..., n, m) -> (..., n, v), in the dtype
    of value. Masks, rows that attend to nothing, `causal` and errors are those of `attention_weights`.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    exponentials = _exponentials(query, key, mask)
    # Dividing after the product with V is the same sum, on an n x v matrix in place of the n x m one.
    weighted_sum = jnp.einsum("...nm,...mv->...nv", exponentials, value)
    return (weighted_sum / _denominator(exponentials, mask)).astype(value.dtype)


def _exponentials(query, key, mask):
    """The softmax's numerator exp(scores - row maximum): (..., n, m), zero where masked if anything is not."""
    dtype = jnp.result_type(query, key, jnp.float32)
    largest, d_k = float(jnp.finfo(dtype).max), query.shape[-1]
    # Clipped, no product of finite inputs overflows: |q . k| <= largest / 8, whatever the padding holds.
    limit = math.sqrt(largest / (8 * d_k))
    query, key = jnp.clip(query, -limit, limit), jnp.clip(key, -limit, limit)
    scores = jnp.einsum("...nk,...mk->...nm", query, key, preferred_element_type=dtype) / math.sqrt(d_k)
    if mask is not None:
        # Added, because XLA on CPU then fuses scores, softmax and weighted sum into one kernel that never stores the
        # n x m matrix. A selection by jnp.where keeps them apart.
        scores += jnp.where(mask, 0, -largest / 2)
    maximum = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    return jnp.exp(scores - jax.lax.stop_gradient(maximum))


def _denominator(exponentials, mask):
    """The softmax's denominator (..., n, 1), infinite where the mask leaves nothing to attend to."""
    total = exponentials.sum(axis=-1, keepdims=True)
    return total if mask is None else total + jnp.where(mask.any(axis=-1, keepdims=True), 0, jnp.inf)


def _checked(query, key, value, mask, causal):
    """The arguments as arrays, `causal` merged into the mask; or one sentence on what does not fit."""
    query, key, value = floating("query", query), floating("key", key), floating("value", value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least two axes (positions, depth), got shape {x.shape}")
    (n, d_k), m = query.shape[-2:], key.shape[-2]
    if d_k < 1 or key.shape[-1] != d_k:
        raise ValueError(f"query and key must have the same depth d_k of at least 1, got {d_k} and {key.shape[-1]}")
    if value.shape[-2] != m:
        raise ValueError(f"key and value must have the same length m, got {m} and {value.shape[-2]}")
    try:
        shape = (*jnp.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]), n, m)
    except ValueError:
        shapes = ", ".join(str(x.shape) for x in (query, key, value))
        raise ValueError(f"the leading axes of query, key and value must broadcast, got shapes {shapes}") from None
    if mask is not None:
        mask = jnp.atleast_1d(mask)
        if mask.dtype != bool:
            raise TypeError(f"mask must be boolean, True where a query may attend, got {mask.dtype}")
        if not broadcasts(mask.shape, shape):
            raise ValueError(f"mask must broadcast to (..., n, m) = {shape}, got shape {mask.shape}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a Python bool (under jax.jit, a static argument), got {causal}")
    if causal:
        if n != m:
            raise ValueError(f"causal attention needs as many queries as keys, got {n} and {m}")
        mask = causal_mask(n) if mask is None else mask & causal_mask(n)
    if mask is None and m == 0:
        mask = jnp.zeros((n, 0), dtype=bool)  # no keys: every query may attend to nothing
    return query, key, value, mask


def floating(name, x):
    """x as an array, checked to be of floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    return x


def broadcasts(shape, target):
    """Whether `shape` broadcasts to exactly `target`."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))
