"""Scaled dot-product attention: section 3.2.1 of "Attention Is All You Need" (arXiv 1706.03762).

Pure functions of arrays, without parameters. The axes, in shapes and einsum strings:

    ...  any leading axes (batch, heads)        k  per-head depth d_k of queries and keys
    n    query positions                        v  per-head depth d_v of values
    m    key and value positions

A mask is boolean, True where a query may attend to a key. It broadcasts to (..., n, m), and masks combine with `&`.
"""

import functools
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
    For arrays without heads, take its [..., 0, :, :].
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
    numerator, denominator = _softmax(query, key, mask, causal)
    return numerator / denominator


def scaled_dot_product_attention(query, key, value, mask=None, *, causal=False):
    """Equation 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V.

    query (..., n, k), key (..., m, k), value (..., m, v), mask broadcasting to (..., n, m) -> (..., n, v), in the dtype
    of value. Masks, rows that attend to nothing, `causal` and errors are those of `attention_weights`. Query and key
    are clipped where a score could overflow, at 8e17 for d_k = 64.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    numerator, denominator = _softmax(query, key, mask, causal)
    # Dividing after the product with V is the same sum, on an n x v matrix in place of the n x m one.
    weighted_sum = jnp.einsum("...nm,...mv->...nv", numerator, value)
    return (weighted_sum / denominator).astype(value.dtype)


def flash_attention(query, key, value, mask=None, *, causal=False, block_size=512):
    """Equation 1 without the n x m matrix: FlashAttention (arXiv 2205.14135), section 3.1; also arXiv 2112.05682.

    A row of Equation 1 is sum_j exp(s_j) v_j / sum_j exp(s_j), and both sums can be taken one block of keys at a time.
    So that exp stays finite, they are taken relative to the largest score met so far; when a block raises that maximum
    from a to b, what is already summed is multiplied by exp(a - b). Hence the three values carried for each query:
    maximum, denominator, weighted_sum. For the gradient, `jax.checkpoint` runs a block again instead of storing it.

    Arguments, result and errors are those of `scaled_dot_product_attention`, with memory linear in n and m. Also raises
    ValueError for a block_size that is not an int of at least 1.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a Python int of at least 1, got {block_size}")
    n, m, dtype = query.shape[-2], key.shape[-2], jnp.result_type(query, key, jnp.float32)
    leading = jnp.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    shape = (*leading, n, value.shape[-1])
    if 0 in (m, *shape):
        return jnp.zeros(shape, value.dtype)
    n_block, m_block = min(block_size, n), min(block_size, m)

    @jax.checkpoint  # of a block of queries, store the result only: not the maximum after each block of keys
    def attend(block_of_queries):
        i, query = block_of_queries
        rows = i * n_block + jnp.arange(n_block)

        @jax.checkpoint  # of a block of keys, store the maximum only: not the exponentials
        def step(carry, block_of_keys):
            j, key, value = block_of_keys
            columns = j * m_block + jnp.arange(m_block)

            def add_block(carry, masked):
                maximum, denominator, weighted_sum = carry
                # The last block may be padded, with columns from m on. Causality (n = m) hides them by itself.
                allowed = columns <= rows[:, None] if causal else columns < m
                if mask is not None:
                    allowed &= _part(_part(mask, rows, axis=-2), columns, axis=-1)
                scores = _scores(query, key, allowed if masked else None)
                new_maximum = jax.lax.stop_gradient(jnp.maximum(maximum, scores.max(axis=-1, keepdims=True)))
                exponentials, rescale = jnp.exp(scores - new_maximum), jnp.exp(maximum - new_maximum)
                denominator = denominator * rescale + exponentials.sum(axis=-1, keepdims=True)
                weighted_sum = weighted_sum * rescale + jnp.einsum("...nm,...mv->...nv", exponentials, value)
                return new_maximum, denominator, weighted_sum

            # Skip a block that causality hides wholly; where all of it may be seen, save the time of masking it.
            hidden = causal and columns[0] > rows[-1]
            visible = mask is None and columns[-1] <= (rows[0] if causal else m - 1)
            branches = [lambda carry: carry, functools.partial(add_block, masked=True)]
            if mask is None:
                branches.append(functools.partial(add_block, masked=False))
            return jax.lax.switch(jnp.where(hidden, 0, 1 + visible), branches, carry), None

        zeros = jnp.zeros((*leading, n_block, 1), dtype)
        sums = jnp.zeros((*leading, n_block, value.shape[-1]), jnp.result_type(dtype, value))
        start = zeros + _lowest_maximum(dtype), zeros, sums
        (_, denominator, weighted_sum), _ = jax.lax.scan(step, start, _blocks(m_block, key, value))
        return denominator, weighted_sum

    denominator, weighted_sum = jax.lax.map(attend, _blocks(n_block, query))
    output = jnp.moveaxis(weighted_sum / (denominator + 1e-18), 0, -3).astype(value.dtype)
    return output.reshape(*leading, -1, value.shape[-1])[..., :n, :]


def _scores(query, key, mask):
    """Q K^T / sqrt(d_k) (..., n, m) in at least float32, below `_lowest_maximum` where mask is False, else above."""
    dtype, d_k = jnp.result_type(query, key, jnp.float32), query.shape[-1]
    scores = jnp.einsum("...nk,...mk->...nm", query, key, preferred_element_type=dtype) / math.sqrt(d_k)
    # Added, because XLA on CPU then fuses scores, softmax and weighted sum: a forward pass stores the mask once, and
    # not the scores of every head. A selection by jnp.where keeps them apart.
    return scores if mask is None else scores + jnp.where(mask, 0, 2 * _lowest_maximum(dtype))


def _lowest_maximum(dtype):
    """-L/4, for the largest number L: scores lie within L/8 of zero, masked ones below -L/2 + L/8.

    As the maximum of a row that is masked throughout it leaves exp(-L/8) = 0 at most.
    """
    return float(jnp.finfo(dtype).min) / 4


def _softmax(query, key, mask, causal):
    """The softmax of Equation 1 as numerator (..., n, m) and denominator (..., n, 1)."""
    if causal:
        length = query.shape[-2]
        mask = causal_mask(length) if mask is None else mask & causal_mask(length)
    scores = _scores(query, key, mask)
    maximum = scores.max(axis=-1, keepdims=True, initial=_lowest_maximum(scores.dtype))
    numerator = jnp.exp(scores - jax.lax.stop_gradient(maximum))  # which cancels in the quotient
    # Where a query may attend to anything the sum is at least exp(0) = 1, and 1e-18 is lost in it. Else it is 0, and
    # 1e-18 avoids 0 / 0, also in the gradient, which divides by the square.
    return numerator, numerator.sum(axis=-1, keepdims=True) + 1e-18


def _blocks(size, *arrays):
    """0, 1, ... and the arrays (..., length, depth) cut into as many blocks (..., size, depth), the last one padded."""
    count = -(-arrays[0].shape[-2] // size)
    cut = []
    for x in arrays:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count * size - x.shape[-2]), (0, 0)])
        cut.append(jnp.moveaxis(x.reshape(*x.shape[:-2], count, size, x.shape[-1]), -3, 0))
    return jnp.arange(count), *cut


def _part(mask, positions, axis):
    """The mask at these positions of an axis, False past its end; whole where the axis broadcasts."""
    if mask.ndim < -axis or mask.shape[axis] == 1:
        return mask
    return jnp.take(mask, positions, axis=axis, mode="fill", fill_value=False)


def _checked(query, key, value, mask, causal):
    """The arguments as arrays, query and key clipped so that no score overflows, or a sentence on what does not fit."""
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
        raise TypeError(f"causal must be a Python bool (under jax.jit: static_argnames='causal'), got {causal!r}")
    if causal and n != m:
        raise ValueError(f"causal attention needs as many queries as keys, got {n} and {m}")
    # Clipped, no score exceeds an eighth of the largest number, whatever numbers the padding holds. A NaN stays NaN.
    limit = math.sqrt(float(jnp.finfo(jnp.result_type(query, key, jnp.float32)).max) / (8 * d_k))
    return jnp.clip(query, -limit, limit), jnp.clip(key, -limit, limit), value, mask


def floating(name, x):
    """x as an array, checked to be of floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    return x


def broadcasts(shape, target):
    """Whether `shape` broadcasts to exactly `target`."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))
