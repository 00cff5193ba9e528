"""Multi-head attention, the encoder and decoder layers of Figure 1, and their stacks (arXiv 1706.03762).

Everything with parameters comes as two functions: for example, `init_encoder_layer(rng, ...)` returns a dict of arrays,
and `encoder_layer(params, ...)` is a pure function that reads all sizes from their shapes. The axes, in shapes and
einsum strings:

    ...  any leading (batch) axes      d  d_model
    n    query positions               h  heads
    m    key and value positions       k  d_k = d_model / h, the dimension of queries and keys
    f    d_ff                          v  d_v = d_k, the dimension of values

Results have the dtype of the input x (or query), whatever the dtype of the parameters. Under `jax.jit`, `causal` and
`attention` are static: `jax.jit(encoder_layer, static_argnames=("causal", "attention"))`. A decoder is always causal:
`jax.jit(decoder_layer, static_argnames="attention")`. Invalid arguments raise while tracing: ValueError for shapes and
values, TypeError for dtypes.
"""

import functools
import math

import jax
import jax.numpy as jnp

from attention import as_floating, at_least_float32, broadcasts_to, scaled_dot_product_attention

# ---- Section 3.2.2: multi-head attention ---------------------------------------------------------


def init_multi_head_attention(rng, d_model, num_heads):
    """The projections of section 3.2.2, without bias: W_i^Q is query[:, i], and head i's rows of W^O are output[i].

    Returns query, key (d, h, k), value (d, h, v) and output (h, v, d), Glorot-uniform: mean 0, variance 1 / d_model.
    Raises ValueError if num_heads does not divide d_model.
    """
    if num_heads < 1 or d_model < 1 or d_model % num_heads:
        raise ValueError(f"num_heads must divide d_model, got {num_heads} heads and d_model = {d_model}")
    rngs, d_k = jax.random.split(rng, 4), d_model // num_heads
    init_in = jax.nn.initializers.glorot_uniform(in_axis=0, out_axis=(1, 2))
    init_out = jax.nn.initializers.glorot_uniform(in_axis=(0, 1), out_axis=2)
    return {
        "query": init_in(rngs[0], (d_model, num_heads, d_k)),
        "key": init_in(rngs[1], (d_model, num_heads, d_k)),
        "value": init_in(rngs[2], (d_model, num_heads, d_k)),
        "output": init_out(rngs[3], (num_heads, d_k, d_model)),
    }


def multi_head_attention(params, query, key, value, mask=None, *, causal=False, attention=scaled_dot_product_attention):
    """Section 3.2.2: MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O.

    head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)

    query (..., n, d), key (..., m, d), value (..., m, d), mask broadcasting to (..., h, n, m) -> (..., n, d). Masks
    (batch, n, m), one per sequence, need a head axis, `mask[:, None]`; otherwise batch is taken for the head axis.
    `attention` is any function with the signature of `scaled_dot_product_attention`.
    """
    query = _matching("query", query, "n d", params["query"], "d h k")
    key = _matching("key", key, "m d", params["key"], "d h k")
    value = _matching("value", value, "m d", params["value"], "d h v")
    heads = attention(
        jnp.einsum("...nd,dhk->...hnk", query, params["query"]),
        jnp.einsum("...md,dhk->...hmk", key, params["key"]),
        jnp.einsum("...md,dhv->...hmv", value, params["value"]),
        mask,
        causal=causal,
    )
    # Summing over h and v multiplies the concatenated heads by W^O.
    return jnp.einsum("...hnv,hvd->...nd", heads, params["output"]).astype(query.dtype)


# ---- Section 3.3: position-wise feed-forward network ---------------------------------------------


def init_feed_forward(rng, d_model, d_ff):
    """The parameters of Equation 2: w1 (d, f) and w2 (f, d) Glorot-uniform, b1 (f,) and b2 (d,) zero."""
    if d_model < 1 or d_ff < 1:
        raise ValueError(f"d_model and d_ff must be at least 1, got {d_model} and {d_ff}")
    rng1, rng2 = jax.random.split(rng)
    glorot = jax.nn.initializers.glorot_uniform()
    w1, w2 = glorot(rng1, (d_model, d_ff)), glorot(rng2, (d_ff, d_model))
    return {"w1": w1, "b1": jnp.zeros(d_ff), "w2": w2, "b2": jnp.zeros(d_model)}


def feed_forward(params, x):
    """Equation 2: FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, applied to each position. x (..., d) -> (..., d)."""
    x = _matching("x", x, "d", params["w1"], "d f")
    hidden = jax.nn.relu(jnp.einsum("...d,df->...f", x, params["w1"]) + params["b1"])
    return (jnp.einsum("...f,fd->...d", hidden, params["w2"]) + params["b2"]).astype(x.dtype)


# ---- Sections 3.1 and 5.4: layer normalization and dropout ---------------------------------------


def init_layer_norm(d_model):
    """scale (d,) of ones and bias (d,) of zeros."""
    if d_model < 1:
        raise ValueError(f"d_model must be at least 1, got {d_model}")
    return {"scale": jnp.ones(d_model), "bias": jnp.zeros(d_model)}


def layer_norm(params, x, epsilon=1e-5):
    """Layer Normalization (arXiv 1607.06450, section 3): normalizes each position, then applies scale and bias.

    x (..., d) -> (..., d), with mean and variance in at least float32.
    """
    x = _matching("x", x, "d", params["scale"], "d")
    centered = x.astype(at_least_float32(x))
    centered -= centered.mean(axis=-1, keepdims=True)
    variance = (centered * centered).mean(axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + epsilon) * params["scale"] + params["bias"]).astype(x.dtype)


def split_rng(rng, count):
    """Splits the random key of dropout into a list of `count` keys. If rng is None (no dropout), all are None."""
    return count * [None] if rng is None else list(jax.random.split(rng, count))


def dropout(rng, x, rate):
    """Section 5.4: sets each element to zero with probability `rate`, and divides the others by 1 - rate.

    x (...) -> (...); the identity if rng is None. Raises ValueError for a rate outside [0, 1), unless it is traced, and
    TypeError if x is not floating point.
    """
    x = as_floating("x", x)
    if not isinstance(rate, jax.core.Tracer) and not 0 <= rate < 1:
        raise ValueError(f"the dropout rate must be at least 0 and below 1, got {rate}")
    if rng is None:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x.astype(at_least_float32(x)) / (1 - rate), 0).astype(x.dtype)


# ---- Section 3.1, Figure 1: the two layers -------------------------------------------------------


def init_encoder_layer(rng, d_model, num_heads, d_ff):
    """The parameters of an encoder layer: two sub-layers, each with its layer norm, as a dict of dicts."""
    rng_attention, rng_feed_forward = jax.random.split(rng)
    return {
        "self_attention": init_multi_head_attention(rng_attention, d_model, num_heads),
        "self_attention_norm": init_layer_norm(d_model),
        "feed_forward": init_feed_forward(rng_feed_forward, d_model, d_ff),
        "feed_forward_norm": init_layer_norm(d_model),
    }


def encoder_layer(
    params, x, mask=None, *, causal=False, dropout_rng=None, dropout_rate=0.1, attention=scaled_dot_product_attention
):
    """Section 3.1: self-attention, then the feed-forward network, each as LayerNorm(x + Dropout(Sublayer(x))).

    x (..., n, d), mask broadcasting to (..., h, n, n) -> (..., n, d). No dropout if dropout_rng is None.
    `causal=True` makes it the layer of a decoder-only model (GPT).
    """
    rngs = split_rng(dropout_rng, 2)
    sublayer = multi_head_attention(params["self_attention"], x, x, x, mask, causal=causal, attention=attention)
    x = layer_norm(params["self_attention_norm"], x + dropout(rngs[0], sublayer, dropout_rate))
    sublayer = feed_forward(params["feed_forward"], x)
    return layer_norm(params["feed_forward_norm"], x + dropout(rngs[1], sublayer, dropout_rate))


def init_decoder_layer(rng, d_model, num_heads, d_ff):
    """The parameters of `init_encoder_layer`, and cross_attention with its layer norm."""
    rng_encoder_layer, rng_cross_attention = jax.random.split(rng)
    return {
        **init_encoder_layer(rng_encoder_layer, d_model, num_heads, d_ff),
        "cross_attention": init_multi_head_attention(rng_cross_attention, d_model, num_heads),
        "cross_attention_norm": init_layer_norm(d_model),
    }


def decoder_layer(
    params,
    x,
    memory,
    mask=None,
    memory_mask=None,
    *,
    dropout_rng=None,
    dropout_rate=0.1,
    attention=scaled_dot_product_attention,
):
    """Section 3.1: causal self-attention, attention over the encoder's output (memory), then the feed-forward network.

    x (..., n, d), memory (..., m, d), mask broadcasting to (..., h, n, n), memory_mask to (..., h, n, m) ->
    (..., n, d). `mask` applies to self-attention, `memory_mask` to cross-attention, whose queries come from x and whose
    keys and values come from memory. No dropout if dropout_rng is None.
    """
    if not broadcasts_to(memory.shape[:-2], x.shape[:-2]):
        raise ValueError(f"the leading axes of memory must broadcast to x's, got {memory.shape} and {x.shape}")
    rngs = split_rng(dropout_rng, 3)
    sublayer = multi_head_attention(params["self_attention"], x, x, x, mask, causal=True, attention=attention)
    x = layer_norm(params["self_attention_norm"], x + dropout(rngs[0], sublayer, dropout_rate))
    sublayer = multi_head_attention(params["cross_attention"], x, memory, memory, memory_mask, attention=attention)
    x = layer_norm(params["cross_attention_norm"], x + dropout(rngs[1], sublayer, dropout_rate))
    sublayer = feed_forward(params["feed_forward"], x)
    return layer_norm(params["feed_forward_norm"], x + dropout(rngs[2], sublayer, dropout_rate))


# ---- Section 3.1, Figure 1: N x ------------------------------------------------------------------


def _init_layers(init_layer, rng, num_layers, *sizes):
    """One layer per random key, stacked by `jax.vmap`. `init_encoder` explains the scaling."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    layers = jax.vmap(lambda rng: init_layer(rng, *sizes))(jax.random.split(rng, num_layers))
    for sublayer, weight in (("self_attention", "output"), ("cross_attention", "output"), ("feed_forward", "w2")):
        if sublayer in layers:
            layers[sublayer][weight] /= math.sqrt(2 * num_layers)
    return layers


def init_encoder(rng, num_layers, d_model, num_heads, d_ff):
    """N encoder layers: the dict of `init_encoder_layer`, with a leading layer axis on every array.

    With Glorot weights alone, the output of each sub-layer is as large as its input. After a dozen layer norms, little
    of the input remains, and six layers do not learn. So W^O and W_2, which write into the residual connection, are
    divided by sqrt(2 N), as in GPT-2 ("Language Models are Unsupervised Multitask Learners", section 2.3).
    """
    return _init_layers(init_encoder_layer, rng, num_layers, d_model, num_heads, d_ff)


def init_decoder(rng, num_layers, d_model, num_heads, d_ff):
    """N decoder layers: the dict of `init_decoder_layer`, stacked and scaled as in `init_encoder`."""
    return _init_layers(init_decoder_layer, rng, num_layers, d_model, num_heads, d_ff)


def _scan_layers(layer, params, x, dropout_rng):
    """Applies the layers one after another: `for p, rng in layers: x = layer(p, x, dropout_rng=rng)`.

    `jax.lax.scan(step, x, layers)` is this loop, compiled once for any number of layers. It iterates over the leading
    axis of every array in `layers`. Without dropout, each layer receives None.
    """
    scale = params["feed_forward_norm"]["scale"]
    if scale.ndim != 2:
        raise ValueError(f"a stack needs parameters with a leading layer axis, got a layer norm of shape {scale.shape}")
    rngs = None if dropout_rng is None else jax.random.split(dropout_rng, len(scale))

    def step(x, layer_params_and_rng):
        layer_params, rng = layer_params_and_rng
        return layer(layer_params, x, dropout_rng=rng), None  # the new x, and no output to stack

    return jax.lax.scan(step, x, (params, rngs))[0]


def encoder(params, x, mask=None, *, dropout_rng=None, **options):
    """Section 3.1: a stack of N encoder layers, each with its own parameters and dropout.

    Shapes and options as in `encoder_layer`. Use it under `jax.jit`; outside, every call compiles the scan again.
    """
    return _scan_layers(functools.partial(encoder_layer, mask=mask, **options), params, x, dropout_rng)


def decoder(params, x, memory, mask=None, memory_mask=None, *, dropout_rng=None, **options):
    """Section 3.1: a stack of N decoder layers, which all attend to the same memory.

    Shapes and options as in `decoder_layer`. Use it under `jax.jit`, like `encoder`.
    """
    layer = functools.partial(decoder_layer, memory=memory, mask=mask, memory_mask=memory_mask, **options)
    return _scan_layers(layer, params, x, dropout_rng)


# ---- Checks of arguments -------------------------------------------------------------------------


def _matching(name, x, axes, weight, weight_axes):
    """Returns x as an array, or raises an error if it is not floating point or does not match the weight."""
    x = as_floating(name, x)
    if weight.ndim != len(weight_axes.split()):
        raise ValueError(
            f"the weight applied to {name} must have the axes ({weight_axes}), got shape {weight.shape} "
            "(with a leading layer axis, call `encoder` or `decoder`)"
        )
    if x.ndim < len(axes.split()) or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{name} must end in the axes ({axes}) with d = {weight.shape[0]}, got shape {x.shape}")
    return x
