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
    """Queries may attend to the first `lengths` of max_length keys. The other keys are padding.

    lengths: (...,) integers, one for each sequence. Returns a boolean mask (..., 1, 1, max_length). The two axes of
    length 1 broadcast over heads and queries; for arrays without heads, take [..., 0, :, :].
    Raises TypeError where lengths are not integers.
    """
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    return jnp.arange(max_length) < lengths[..., None, None, None]


def attention_weights(query, key, mask=None, *, causal=False):
    """The softmax of Equation 1: softmax(Q K^T / sqrt(d_k)). Each row is a distribution over the keys.

    query (..., n, k), key (..., m, k), mask broadcasting to (..., n, m) -> weights (..., n, m), in at least float32.
    A key that the mask hides gets the weight 0. A query that may attend to nothing gets a row of zeros.
    `causal=True` does what the mask `causal_mask(n)` does, and needs n = m. As a flag, it lets `flash_attention` skip
    keys in the future.
    Raises TypeError for inputs that are not floating point or a mask that is not boolean, ValueError for shapes that
    do not fit together.
    """
    query, key, _, mask = _checked(query, key, key, mask, causal)  # there is no value: key stands in
    n, d_k = query.shape[-2:]
    dtype = at_least_float32(query, key)  # the dtype in which einsum sums up
    scores = jnp.einsum("...nk,...mk->...nm", query, key, preferred_element_type=dtype) / math.sqrt(d_k)
    if causal:
        mask = causal_mask(n) if mask is None else mask & causal_mask(n)
    return jax.nn.softmax(scores, axis=-1, where=mask)


def scaled_dot_product_attention(query, key, value, mask=None, *, causal=False):
    """Equation 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V.

    query (..., n, k), key (..., m, k), value (..., m, v), mask broadcasting to (..., n, m) -> (..., n, v), in the dtype
    of value. Masks, rows that attend to nothing, `causal` and errors are those of `attention_weights`.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    weights = attention_weights(query, key, mask, causal=causal).astype(value.dtype)
    dtype = at_least_float32(value)
    return jnp.einsum("...nm,...mv->...nv", weights, value, preferred_element_type=dtype).astype(value.dtype)


# ---- FlashAttention: the same numbers, without the n x m matrix ------------------------------------------------------

# The functions of this part work on one head, cut into blocks. Here n and m count the positions of one block of queries
# and of one block of keys. `flash_attention`, at the end, makes the blocks, and maps over heads and batch.
#
# `jax.lax.fori_loop(start, stop, body, state)` is the loop `for i in range(start, stop): state = body(i, state)`. It is
# compiled once. A Python loop would be compiled once for each of its rounds.


def _add_block(maximum, denominator, weighted_sum, scores, value):
    """One step of FlashAttention: add one more block of keys to the two sums over the keys so far.

    For a query with the scores s_1, ..., s_m, Equation 1 is sum_j exp(s_j) v_j / sum_j exp(s_j). Both sums can be taken
    block by block. But exp(s_j) overflows for a large score. So both sums take exp(s_j - maximum), with the largest
    score so far as the maximum; their quotient is the same. When a block brings a larger score, what is already summed
    is multiplied by exp(old maximum - new maximum). The whole loop, for one block of queries Q_i:

        maximum, denominator, weighted_sum = -infinity, 0, 0
        for K_j, V_j in blocks of keys and values:
            scores = Q_i K_j^T / sqrt(d_k)
            maximum, denominator, weighted_sum = _add_block(maximum, denominator, weighted_sum, scores, V_j)
        output = weighted_sum / denominator

    maximum, denominator (n, 1), weighted_sum (n, v), scores (n, m), value (m, v). Returns the new three.
    """
    new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
    rescale = jnp.exp(maximum - new_maximum)
    exponentials = jnp.exp(scores - new_maximum)
    denominator = rescale * denominator + exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)  # as the weights of Equation 1
    block_sum = jnp.einsum("nm,mv->nv", exponentials, value, preferred_element_type=weighted_sum.dtype)
    return new_maximum, denominator, rescale * weighted_sum + block_sum


def _block_scores(query, key, mask, causal, i, j):
    """Q_i K_j^T / sqrt(d_k) for block i of queries and block j of keys, and -infinity where the mask is False.

    query (blocks, n, k), key (blocks, m, k), mask (blocks, n, blocks, m) -> (n, m). A mask that is the same for all
    queries is (1, 1, blocks, m).
    """
    dtype = at_least_float32(query, key)
    scores = jnp.einsum("nk,mk->nm", query[i], key[j], preferred_element_type=dtype) / math.sqrt(query.shape[-1])
    visible = mask[i % mask.shape[0], :, j]  # i % 1 = 0: the only block of a mask that is the same for all queries
    if causal:
        size = query.shape[1]  # causal attention has as many queries as keys, so this is the size of all blocks
        rows, columns = i * size + jnp.arange(size), j * size + jnp.arange(size)
        visible &= columns <= rows[:, None]
    return jnp.where(visible, scores, -jnp.inf)


def _forward(query, key, value, mask, causal):
    """Algorithm 1 of FlashAttention-2: the output in blocks, and what `_backward` needs.

    query (blocks, n, k), key (blocks, m, k), value (blocks, m, v), mask (blocks, n, blocks, m) -> (blocks, n, v).
    """
    (blocks, n, _), d_v, dtype = query.shape, value.shape[2], at_least_float32(query, key, value)

    def attend(i, results):
        """Writes block i of the output, and for each of its queries the logarithm of the softmax's denominator."""
        output, log_denominator = results

        def step(j, sums):
            return _add_block(*sums, _block_scores(query, key, mask, causal, i, j), value[j])

        denominator = jnp.zeros_like(query, shape=(n, 1), dtype=dtype)
        maximum = denominator - 3e38  # below any usual score, but finite: -infinity - -infinity is NaN
        weighted_sum = jnp.zeros_like(query, shape=(n, d_v), dtype=dtype)
        stop = i + 1 if causal else key.shape[0]  # causality leaves the blocks of keys 0, ..., i
        sums = jax.lax.fori_loop(0, stop, step, (maximum, denominator, weighted_sum))
        maximum, denominator, weighted_sum = sums
        nothing = denominator == 0  # what may attend to nothing gets zeros
        output_i = jnp.where(nothing, 0, weighted_sum / denominator).astype(value.dtype)
        log_i = jnp.where(nothing, 0, maximum + jnp.log(denominator))  # log(sum_j exp(s_j)), L in FlashAttention-2
        # Once compiled, `x.at[i].set(y)` writes into x itself, for nobody needs the old x.
        return output.at[i].set(output_i), log_denominator.at[i].set(log_i)

    # Under `jax.shard_map`, zeros_like(query) lies on the devices as query does; `jnp.zeros` does not.
    output = jnp.zeros_like(query, shape=(blocks, n, d_v), dtype=value.dtype)
    log_denominator = jnp.zeros_like(query, shape=(blocks, n, 1), dtype=dtype)
    output, log_denominator = jax.lax.fori_loop(0, blocks, attend, (output, log_denominator))
    return output, (query, key, value, mask, output, log_denominator)


def _backward(causal, saved, d_output):
    """Algorithm 2 of FlashAttention-2: from the gradient dO of the output to dQ, dK and dV, all in blocks.

    d_output (blocks, n, v) -> gradients with the shapes of query, key and value.
    The weights P are computed again, as exp(scores - log_denominator). The derivatives of the products are dV = P^T dO
    and dP = dO V^T, then dQ = dS K / sqrt(d_k) and dK = dS^T Q / sqrt(d_k). The derivative of the softmax is
    dS = P * (dP - D). Here D = rowsum(P * dP), which is rowsum(dO * O) and needs no n x m matrix: row_sums below.
    """
    query, key, value, mask, output, log_denominator = saved
    dtype = log_denominator.dtype
    row_sums = jnp.einsum("inv,inv->in", d_output, output, preferred_element_type=dtype)[..., None]  # i: blocks

    def differentiate(j, gradients):
        """Writes dK_j and dV_j, and adds to dQ what block j of the keys gives to it."""
        d_query, d_key, d_value = gradients

        # d_key_j and d_value_j are summed transposed, (k, m) and (v, m): on a CPU, XLA would else transpose (n, m).
        def step(i, gradients):
            d_query, d_key_j, d_value_j = gradients
            weights = jnp.exp(_block_scores(query, key, mask, causal, i, j) - log_denominator[i])
            d_weights = jnp.einsum("nv,mv->nm", d_output[i], value[j], preferred_element_type=dtype)
            d_scores = weights * (d_weights - row_sums[i]) / math.sqrt(query.shape[-1])
            weights, d_scores = weights.astype(value.dtype), d_scores.astype(query.dtype)
            d_query_i = jnp.einsum("nm,mk->nk", d_scores, key[j], preferred_element_type=dtype)
            d_key_j += jnp.einsum("nm,nk->km", d_scores, query[i], preferred_element_type=dtype)
            d_value_j += jnp.einsum("nm,nv->vm", weights, d_output[i], preferred_element_type=dtype)
            return d_query.at[i].add(d_query_i), d_key_j, d_value_j

        zeros = jnp.zeros_like(key[j].T, dtype=dtype), jnp.zeros_like(value[j].T, dtype=dtype)
        start = j if causal else 0  # causality leaves the blocks of queries j, j + 1, ...
        d_query, d_key_j, d_value_j = jax.lax.fori_loop(start, query.shape[0], step, (d_query, *zeros))
        return d_query, d_key.at[j].set(d_key_j.T.astype(key.dtype)), d_value.at[j].set(d_value_j.T.astype(value.dtype))

    zeros = jnp.zeros_like(query, dtype=dtype), jnp.zeros_like(key), jnp.zeros_like(value)
    d_query, d_key, d_value = jax.lax.fori_loop(0, key.shape[0], differentiate, zeros)
    return d_query.astype(query.dtype), d_key, d_value, None  # a mask has no gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(query, key, value, mask, causal):
    """Attention in blocks, shapes as in `_forward`. `jax.custom_vjp` makes `_backward` its derivative.

    JAX has no gradient of a loop whose end depends on i. For any other loop, it would store all n x m weights.
    Argument 4, causal, is not an array: `_backward` gets it first, then what `_forward` kept.
    """
    return _forward(query, key, value, mask, causal)[0]


_flash.defvjp(_forward, _backward)


def _blocks(x, block_size, axis=0):
    """The axis cut into blocks: length -> (blocks, size). The last block is filled up with zeros.

    A mask is filled up with False, and so hides the zeros that fill the keys.
    """
    length = x.shape[axis]
    if isinstance(length, int):  # as even as can be: two blocks of 300 positions, not 512 and 88
        blocks = max(-(-length // block_size), 1)  # rounded up
        size = max(-(-length // blocks), 1)
    else:  # a symbolic length of `jax.export`
        size = jax.core.min_dim(block_size, jax.core.max_dim(length, 1))
        blocks = jax.core.max_dim(-(-length // size), 1)
    padding = [(0, blocks * size - length if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding).reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])


def flash_attention(query, key, value, mask=None, *, causal=False, block_size=512):
    """Equation 1 one block at a time, by the loop that `_add_block` shows: FlashAttention-2 (arXiv 2307.08691).

    Arguments, result and errors are those of `scaled_dot_product_attention`. Memory is linear in n and m, save for a
    mask with n rows. `causal=True` also saves time: blocks that lie wholly in the future are left out. A block is at
    most block_size queries by block_size keys; 512 is good on a CPU, 1,024 or 2,048 on a GPU.
    For `jax.jvp`, or for a causal gradient of a gradient, take `scaled_dot_product_attention`.
    Also raises ValueError for a block_size that is not an int of at least 1.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a Python int of at least 1, got {block_size!r}")
    mask = jnp.atleast_2d(True if mask is None else mask)

    def one_head(query, key, value, mask):
        n, m = query.shape[0], key.shape[0]
        mask = jnp.broadcast_to(mask, (mask.shape[0], m))  # one row for all queries stays one row
        mask = _blocks(_blocks(mask, block_size, axis=1), block_size)
        query, key, value = (_blocks(x, block_size) for x in (query, key, value))
        return jax.lax.collapse(_flash(query, key, value, mask, causal), 0, 2)[:n]  # (blocks, size, v) -> (n, v)

    # `jnp.vectorize` maps it over all leading axes, which broadcast. The mask's a is n or 1, its b is m or 1.
    return jnp.vectorize(one_head, signature="(n,k),(m,k),(m,v),(a,b)->(n,v)")(query, key, value, mask)


# ---- Dtypes, and checks of arguments ---------------------------------------------------------------------------------


def at_least_float32(*arrays):
    """The dtype of sums over these arrays: float64 if one of them has it, else float32, also for half precision."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def floating(name, x):
    """x as an array, checked to be of floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    return x


def broadcasts(shape, target):
    """Whether `shape` broadcasts to exactly `target`."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _checked(query, key, value, mask, causal):
    """The arguments as arrays, or one sentence on what does not fit."""
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
    return query, key, value, mask
