"""Scaled dot-product attention: section 3.2.1 of "Attention Is All You Need" (arXiv 1706.03762).

Pure functions of arrays, without parameters. The axes, in shapes and einsum strings:

    ...  any leading axes (batch, heads)        k  d_k, the dimension of queries and keys
    n    query positions                        v  d_v, the dimension of values
    m    key and value positions

A mask is boolean; True means "may attend". Masks broadcast to (..., n, m) and combine with `&`.
"""

import functools
import math

import jax
import jax.numpy as jnp


def causal_mask(length):
    """Section 3.2.3: position i may attend to positions up to and including i.

    Returns the lower triangle, a boolean mask (length, length).
    """
    return jnp.tril(jnp.ones((length, length), dtype=bool))


def padding_mask(lengths, max_length):
    """Lets each query attend only to the first `lengths` keys of its sequence.

    lengths (...,), one integer per sequence -> boolean mask (..., 1, 1, max_length). The two axes of length 1 broadcast
    over heads and queries; for arrays without a head axis, use `mask[..., 0, :, :]`.
    Raises TypeError if lengths are not integers.
    """
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    return jnp.arange(max_length) < lengths[..., None, None, None]


def at_least_float32(*arrays):
    """The accumulation dtype for these arrays: float64 if any of them is float64, otherwise float32."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def attention_weights(query, key, mask=None, *, causal=False):
    """The weights of Equation 1: softmax(Q K^T / sqrt(d_k)). Each row is a distribution over the keys.

    query (..., n, k), key (..., m, k), mask broadcasting to (..., n, m) -> weights (..., n, m), in at least float32.
    Masked keys get weight 0; a fully masked query gets a row of zeros. `causal=True` masks like `causal_mask(n)` and
    requires n = m. It is a flag, not a mask, so that `flash_attention` can skip future keys.
    Raises TypeError for inputs that are not floating point, a mask that is not boolean, or a `causal` that is not a
    Python bool, and ValueError for shapes that do not match.
    """
    query, key, _, mask = _checked(query, key, key, mask, causal)  # there is no value: key stands in
    n, d_k = query.shape[-2:]
    dtype = at_least_float32(query, key)  # the dtype of sums, also for half-precision inputs
    scores = jnp.einsum("...nk,...mk->...nm", query, key, preferred_element_type=dtype) / math.sqrt(d_k)
    if causal:
        mask &= causal_mask(n)
    # The paper sets masked scores to -infinity. The smallest finite number gives the same weights, but no NaN in fully
    # masked rows: there, the softmax gives equal weights, which are then set to 0.
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(dtype).min), axis=-1)
    return jnp.where(mask, weights, 0)


def scaled_dot_product_attention(query, key, value, mask=None, *, causal=False):
    """Equation 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V.

    query (..., n, k), key (..., m, k), value (..., m, v), mask broadcasting to (..., n, m) -> (..., n, v), in the dtype
    of value. Fully masked queries output zeros. `causal` and errors are as in `attention_weights`.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    weights = attention_weights(query, key, mask, causal=causal)
    # Rounded, so that half-precision inputs are multiplied in half precision, as in Q K^T.
    weights = weights.astype(jnp.result_type(query, key, value))
    dtype = at_least_float32(weights)
    return jnp.einsum("...nm,...mv->...nv", weights, value, preferred_element_type=dtype).astype(value.dtype)


# ---- FlashAttention ------------------------------------------------------------------------------

# The functions above are the complete algorithm. This section is efficiency: the same result without the n x m
# matrix. The next four functions handle one head, cut into blocks, with query, key and value in one dtype; their n and
# m are the sizes of a query block and a key block. `flash_attention` cuts the blocks and maps over batch and heads.


def _block_scores(query, key, mask, causal, i, j):
    """Q_i K_j^T / sqrt(d_k) for query block i and key block j, with -infinity where masked.

    query (blocks, n, k), key (blocks, m, k), mask (blocks, n, blocks, m) or (1, 1, blocks, m) -> (n, m).
    """
    dtype = at_least_float32(query, key)
    scores = jnp.einsum("nk,mk->nm", query[i], key[j], preferred_element_type=dtype) / math.sqrt(query.shape[-1])
    mask = mask[i % mask.shape[0], :, j]  # a mask shared by all queries has one block, and i % 1 = 0
    if causal:
        n, m = scores.shape
        query_positions = i * n + jnp.arange(n)
        key_positions = j * m + jnp.arange(m)
        mask &= key_positions <= query_positions[:, None]
    return jnp.where(mask, scores, -jnp.inf)


def _forward(query, key, value, mask, causal):
    """Algorithm 1 of FlashAttention-2. Returns the output (blocks, n, v) and the values saved for `_backward`.

    For a query with a score s_l for each key l, Equation 1 is (sum_l exp(s_l) v_l) / (sum_l exp(s_l)). Both sums are
    accumulated block by block. Since exp(s_l) can overflow, both use exp(s_l - maximum) with the largest score so far;
    the quotient is the same. When a block raises the maximum, the running sums are rescaled by
    exp(old maximum - new maximum).
    """
    num_blocks, n, _ = query.shape
    dtype = at_least_float32(query)

    def attend(i, results):
        def add_block(j, sums):
            maximum, denominator, weighted_sum = sums
            scores = _block_scores(query, key, mask, causal, i, j)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
            rescale = jnp.exp(maximum - new_maximum)
            exponentials = jnp.exp(scores - new_maximum)
            denominator = rescale * denominator + exponentials.sum(axis=-1, keepdims=True)
            exponentials = exponentials.astype(query.dtype)  # as in `scaled_dot_product_attention`
            block_sum = jnp.einsum("nm,mv->nv", exponentials, value[j], preferred_element_type=dtype)
            return new_maximum, denominator, rescale * weighted_sum + block_sum

        output, maximum, denominator = results
        sums = maximum[i], denominator[i], jnp.zeros_like(output[i], dtype=dtype)
        stop = i + 1 if causal else len(key)  # causal: skip the key blocks after i
        block_maximum, block_denominator, weighted_sum = jax.lax.fori_loop(0, stop, add_block, sums)
        block_denominator = jnp.where(block_denominator == 0, 1, block_denominator)  # fully masked: output 0 / 1
        output = output.at[i].set((weighted_sum / block_denominator).astype(query.dtype))
        return output, maximum.at[i].set(block_maximum), denominator.at[i].set(block_denominator)

    # `jnp.zeros_like(query)` has query's sharding; `jnp.zeros` does not.
    output = jnp.zeros_like(query, shape=(num_blocks, n, value.shape[-1]))
    denominator = jnp.zeros_like(query, shape=(num_blocks, n, 1), dtype=dtype)
    maximum = jnp.full_like(denominator, jnp.finfo(dtype).min)  # finite, because -infinity - -infinity is NaN
    # `fori_loop` compiles its body once. A Python loop would be unrolled, and every iteration compiled.
    results = jax.lax.fori_loop(0, num_blocks, attend, (output, maximum, denominator))
    return results[0], (query, key, value, mask, *results)


def _backward(causal, saved, d_output):
    """Algorithm 2 of FlashAttention-2, with the loops of the forward pass: dQ, dK and dV, given dO.

    The weights are recomputed: P = exp(scores - maximum) / denominator. (The paper saves maximum + log(denominator),
    which rounds away the second term if scores are large.) From O = P V follow dV = P^T dO and dP = dO V^T. The
    gradient with respect to Q K^T is dS = P * (dP - D) / sqrt(d_k), where D = rowsum(P * dP) equals rowsum(dO * O) and
    needs no n x m matrix. Then dQ = dS K and dK = dS^T Q.
    """
    query, key, value, mask, output, maximum, denominator = saved
    dtype = denominator.dtype
    row_sums = jnp.einsum("inv,inv->in", d_output, output, preferred_element_type=dtype)[..., None]  # D of each block i

    def add_block(i, j, gradients):
        d_query, d_key, d_value = gradients
        weights = jnp.exp(_block_scores(query, key, mask, causal, i, j) - maximum[i]) / denominator[i]
        d_weights = jnp.einsum("nv,mv->nm", d_output[i], value[j], preferred_element_type=dtype)
        d_scores = weights * (d_weights - row_sums[i]) / math.sqrt(query.shape[-1])
        weights, d_scores = weights.astype(query.dtype), d_scores.astype(query.dtype)
        d_query = d_query.at[i].add(jnp.einsum("nm,mk->nk", d_scores, key[j], preferred_element_type=dtype))
        # dK and dV are summed transposed; otherwise XLA on CPU transposes the (n, m) block.
        d_key = d_key.at[j].add(jnp.einsum("nm,nk->km", d_scores, query[i], preferred_element_type=dtype))
        d_value = d_value.at[j].add(jnp.einsum("nm,nv->vm", weights, d_output[i], preferred_element_type=dtype))
        return d_query, d_key, d_value

    def add_query_block(i, gradients):
        stop = i + 1 if causal else len(key)
        return jax.lax.fori_loop(0, stop, functools.partial(add_block, i), gradients)

    zeros = tuple(jnp.zeros_like(x, dtype=dtype) for x in (query, key.mT, value.mT))
    d_query, d_key, d_value = jax.lax.fori_loop(0, len(query), add_query_block, zeros)
    d_query, d_key, d_value = (x.astype(query.dtype) for x in (d_query, d_key.mT, d_value.mT))
    return d_query, d_key, d_value, None  # None: a mask has no gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(query, key, value, mask, causal):
    """The output of `_forward`, with `_backward` as its derivative.

    JAX cannot reverse-differentiate a loop with a dynamic trip count. With a static one it would store all weights.
    """
    return _forward(query, key, value, mask, causal)[0]


_flash.defvjp(_forward, _backward)
_flash = jax.jit(_flash, static_argnums=4)  # so that calls outside jit compile the loops only once


def _blocks(x, block_size):
    """(length, ...) -> (blocks, size, ...). Pads the last block with zeros; in a mask, False masks the padding."""
    blocks = max(-(-len(x) // block_size), 1)  # rounded up
    size = max(-(-len(x) // blocks), 1)
    padding = [(0, blocks * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(blocks, size, *x.shape[1:])


def flash_attention(query, key, value, mask=None, *, causal=False, block_size=512):
    """Equation 1 computed block by block: FlashAttention-2 (arXiv 2307.08691).

    Arguments, result and errors are as in `scaled_dot_product_attention`. Memory is linear in n and m, except for a
    mask with n rows. `causal=True` skips the blocks above the diagonal, about half the work. A block has at most
    block_size queries and block_size keys: 512 is good on a CPU, 1,024 or 2,048 on a GPU. `jax.jvp` and, if causal, the
    gradient of a gradient are not supported; for these, use `scaled_dot_product_attention`.
    Also raises ValueError if block_size is not a Python int of at least 1.
    """
    query, key, value, mask = _checked(query, key, value, mask, causal)
    if type(block_size) is not int or block_size < 1:
        raise ValueError(f"block_size must be a Python int of at least 1, got {block_size!r}")

    def one_head(query, key, value, mask):
        mask = jnp.broadcast_to(mask, (len(mask), len(key)))  # one row for all queries stays one row
        mask = jax.vmap(lambda row: _blocks(row, block_size))(mask)
        blocks = [_blocks(x, block_size) for x in (query, key, value, mask)]
        return jax.lax.collapse(_flash(*blocks, causal), 0, 2)[: len(query)]  # (blocks, size, v) -> (n, v)

    # `jnp.vectorize` maps over the leading axes, which broadcast. In the mask, a is n or 1 and b is m or 1.
    attend = jnp.vectorize(one_head, signature="(n,k),(m,k),(m,v),(a,b)->(n,v)")
    dtype = jnp.result_type(query, key, value)
    inputs = (x.astype(dtype) for x in (query, key, value))
    return attend(*inputs, jnp.atleast_2d(mask)).astype(value.dtype)


# ---- Dtypes and checks of arguments --------------------------------------------------------------


def as_floating(name, x):
    """Converts x to an array, or raises TypeError if it is not floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    return x


def broadcasts_to(shape, target):
    """Whether `shape` broadcasts to exactly `target`."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _checked(query, key, value, mask, causal):
    """Converts the arguments to arrays, or raises an error that names the one that does not match."""
    query, key, value = as_floating("query", query), as_floating("key", key), as_floating("value", value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least two axes (positions, dimension), got shape {x.shape}")
    (n, d_k), m = query.shape[-2:], key.shape[-2]
    if d_k < 1 or key.shape[-1] != d_k:
        raise ValueError(f"query and key must have the same dimension d_k of at least 1, got {d_k} and {key.shape[-1]}")
    if value.shape[-2] != m:
        raise ValueError(f"key and value must have the same length m, got {m} and {value.shape[-2]}")
    try:
        shape = (*jnp.broadcast_shapes(query.shape[:-2], key.shape[:-2]), n, m)
        jnp.broadcast_shapes(shape[:-2], value.shape[:-2])
    except ValueError:
        shapes = ", ".join(str(x.shape) for x in (query, key, value))
        raise ValueError(f"the leading axes of query, key and value must broadcast, got shapes {shapes}") from None
    mask = jnp.asarray(True if mask is None else mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be boolean (True: may attend), got {mask.dtype}")
    if not broadcasts_to(mask.shape, shape):
        one_per_sequence = mask.ndim == 3 and broadcasts_to(mask[:, None].shape, shape)
        hint = "; if it is one mask per sequence, add a head axis: mask[:, None]" if one_per_sequence else ""
        raise ValueError(f"mask must broadcast to (..., n, m) = {shape}, got shape {mask.shape}{hint}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a Python bool (under jax.jit: static_argnames='causal'), got {causal!r}")
    if causal and n != m:
        raise ValueError(f"causal attention requires as many queries as keys, got {n} and {m}")
    return query, key, value, mask
