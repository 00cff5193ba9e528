"""Multi-head attention, the encoder and decoder layers of Figure 1, and their stacks, of "Attention Is All You Need".

What has parameters is a pair: `init_x(rng, sizes)` makes a dict of arrays, `x(params, inputs)` is a pure function of
it. The shapes of the arrays are the configuration. The axes, in shapes and einsum strings:

    ...  any leading (batch) axes      d  d_model, the width of the layer
    n    query positions               h  heads
    m    key and value positions       k  per-head depth d_k = d_model / h of queries and keys
    f    d_ff, the inner width         v  per-head depth d_v of values, here equal to d_k

The results have the dtype of their input x (or query), whatever the dtype of the parameters.

`jax.jit` first runs a function on shapes alone. That is called tracing. An `if causal:` is decided in that run, and
`attention` is called in it. So JAX must know both by then: they are static arguments. To compile a layer, write
`jax.jit(encoder_layer, static_argnames=("causal", "attention"))`. Bad arguments raise while tracing: ValueError for
shapes and values, TypeError for dtypes.
"""

import functools

import jax
import jax.numpy as jnp

from attention import at_least_float32, broadcasts, floating, scaled_dot_product_attention

# ---- Section 3.2.2: multi-head attention -----------------------------------------------------------------------------


def init_multi_head_attention(rng, d_model, num_heads):
    """The projections of section 3.2.2, without bias: W_i^Q is query[:, i], the rows of W^O for head i are output[i].

    Returns query, key (d, h, k), value (d, h, v), output (h, v, d). Their values are Glorot-uniform: uniform around 0,
    with the variance 2 / (d_model + h d_k).
    Raises ValueError where num_heads does not divide d_model.
    """
    if num_heads < 1 or d_model < 1 or d_model % num_heads:
        raise ValueError(f"num_heads must divide d_model, got {num_heads} heads and a d_model of {d_model}")
    glorot = jax.nn.initializers.glorot_uniform
    init_in, init_out = glorot(in_axis=0, out_axis=(1, 2)), glorot(in_axis=(0, 1), out_axis=2)
    rngs, depth = jax.random.split(rng, 4), d_model // num_heads
    return {
        "query": init_in(rngs[0], (d_model, num_heads, depth)),
        "key": init_in(rngs[1], (d_model, num_heads, depth)),
        "value": init_in(rngs[2], (d_model, num_heads, depth)),
        "output": init_out(rngs[3], (num_heads, depth, d_model)),
    }


def multi_head_attention(params, query, key, value, mask=None, *, causal=False, attention=scaled_dot_product_attention):
    """Section 3.2.2: MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O.

    head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)

    query (..., n, d), key (..., m, d), value (..., m, d), mask broadcasting to (..., h, n, m) -> (..., n, d).
    `attention` is the function between the projections, with the signature of `scaled_dot_product_attention`.
    """
    query = _fitting("query", query, "n d", params["query"], "d h k")
    key = _fitting("key", key, "m d", params["key"], "d h k")
    value = _fitting("value", value, "m d", params["value"], "d h v")
    heads = attention(
        jnp.einsum("...nd,dhk->...hnk", query, params["query"]),
        jnp.einsum("...md,dhk->...hmk", key, params["key"]),
        jnp.einsum("...md,dhv->...hmv", value, params["value"]),
        mask,
        causal=causal,
    )
    # Summing over h and v at once is the product of the concatenated heads with W^O.
    return jnp.einsum("...hnv,hvd->...nd", heads, params["output"]).astype(query.dtype)


# ---- Section 3.3: position-wise feed-forward network -----------------------------------------------------------------


def init_feed_forward(rng, d_model, d_ff):
    """The parameters of Equation 2: w1 (d, f) and w2 (f, d) Glorot-uniform, b1 (f,) and b2 (d,) zero."""
    if d_model < 1 or d_ff < 1:
        raise ValueError(f"d_model and d_ff must be at least 1, got {d_model} and {d_ff}")
    rng1, rng2 = jax.random.split(rng)
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        "w1": glorot(rng1, (d_model, d_ff)),
        "b1": jnp.zeros(d_ff),
        "w2": glorot(rng2, (d_ff, d_model)),
        "b2": jnp.zeros(d_model),
    }


def feed_forward(params, x):
    """Equation 2: FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, the same at each position. x (..., d) -> (..., d)."""
    x = _fitting("x", x, "d", params["w1"], "d f")
    hidden = jax.nn.relu(jnp.einsum("...d,df->...f", x, params["w1"]) + params["b1"])
    return (jnp.einsum("...f,fd->...d", hidden, params["w2"]) + params["b2"]).astype(x.dtype)


# ---- Sections 3.1 and 5.4: what surrounds each sub-layer -------------------------------------------------------------


def init_layer_norm(d_model):
    """scale (d,) of ones, bias (d,) of zeros."""
    if d_model < 1:
        raise ValueError(f"d_model must be at least 1, got {d_model}")
    return {"scale": jnp.ones(d_model), "bias": jnp.zeros(d_model)}


def layer_norm(params, x, epsilon=1e-5):
    """Layer Normalization (arXiv 1607.06450, section 3): each position to mean 0, variance 1, then scale and bias.

    x (..., d) -> (..., d), with mean and variance in at least float32.
    """
    x = _fitting("x", x, "d", params["scale"], "d")
    wide = x.astype(at_least_float32(x))
    centered = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + epsilon) * params["scale"] + params["bias"]).astype(x.dtype)


def dropout(rng, x, rate):
    """Section 5.4: each element is zero with probability `rate`, else divided by 1 - rate, which keeps the mean.

    x (...) -> (...); the identity where rng is None. Raises ValueError for a rate outside [0, 1), unless it is traced.
    """
    if not isinstance(rate, jax.core.Tracer) and not 0 <= rate < 1:
        raise ValueError(f"the dropout rate must be at least 0 and below 1, got {rate}")
    if rng is None:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# ---- Section 3.1, Figure 1 left: the encoder -------------------------------------------------------------------------


def init_encoder_layer(rng, d_model, num_heads, d_ff):
    """The two sub-layers of an encoder layer and the layer norm after each, a dict of dicts."""
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

    x (..., n, d), mask broadcasting to (..., h, n, n) -> (..., n, d). For a batch, one mask for each sequence
    is (batch, 1, n, n).
    `causal=True` makes it the layer of a decoder-only model (GPT). Without dropout_rng there is no dropout.
    """
    rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng, 2)
    sublayer = multi_head_attention(params["self_attention"], x, x, x, mask, causal=causal, attention=attention)
    x = layer_norm(params["self_attention_norm"], x + dropout(rngs[0], sublayer, dropout_rate))
    sublayer = feed_forward(params["feed_forward"], x)
    return layer_norm(params["feed_forward_norm"], x + dropout(rngs[1], sublayer, dropout_rate))


def init_encoder(rng, num_layers, d_model, num_heads, d_ff):
    """N encoder layers in one tree: that of `init_encoder_layer`, every leaf with a leading axis of num_layers."""
    return _init_layers(init_encoder_layer, rng, num_layers, d_model, num_heads, d_ff)


def encoder(
    params, x, mask=None, *, causal=False, dropout_rng=None, dropout_rate=0.1, attention=scaled_dot_product_attention
):
    """Section 3.1: the stack of N `encoder_layer`s, each with parameters and dropout of its own. Shapes as there."""
    layer = functools.partial(encoder_layer, mask=mask, causal=causal, dropout_rate=dropout_rate, attention=attention)
    return _scan_layers(layer, params, x, dropout_rng)


# ---- Section 3.1, Figure 1 right: the decoder ------------------------------------------------------------------------


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
    (..., n, d). mask is for the first attention, memory_mask for the second, where queries come from x, keys and values
    from memory. Without dropout_rng there is no dropout.
    """
    if not broadcasts(memory.shape[:-2], x.shape[:-2]):
        raise ValueError(f"the leading axes of memory must broadcast to those of x, got {memory.shape} and {x.shape}")
    rngs = (None, None, None) if dropout_rng is None else jax.random.split(dropout_rng, 3)
    sublayer = multi_head_attention(params["self_attention"], x, x, x, mask, causal=True, attention=attention)
    x = layer_norm(params["self_attention_norm"], x + dropout(rngs[0], sublayer, dropout_rate))
    sublayer = multi_head_attention(params["cross_attention"], x, memory, memory, memory_mask, attention=attention)
    x = layer_norm(params["cross_attention_norm"], x + dropout(rngs[1], sublayer, dropout_rate))
    sublayer = feed_forward(params["feed_forward"], x)
    return layer_norm(params["feed_forward_norm"], x + dropout(rngs[2], sublayer, dropout_rate))


def init_decoder(rng, num_layers, d_model, num_heads, d_ff):
    """N decoder layers in one tree: that of `init_decoder_layer`, every leaf with a leading axis of num_layers."""
    return _init_layers(init_decoder_layer, rng, num_layers, d_model, num_heads, d_ff)


def decoder(
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
    """Section 3.1: the stack of N `decoder_layer`s, all of which attend to the same memory. Shapes as there."""
    options = {"mask": mask, "memory_mask": memory_mask, "dropout_rate": dropout_rate, "attention": attention}
    layer = functools.partial(decoder_layer, memory=memory, **options)
    return _scan_layers(layer, params, x, dropout_rng)


# ---- What the two stacks share ---------------------------------------------------------------------------------------


def _init_layers(init_layer, rng, num_layers, *sizes):
    """One layer's parameters for each of num_layers keys, stacked by `jax.vmap`."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    return jax.vmap(lambda rng: init_layer(rng, *sizes))(jax.random.split(rng, num_layers))


def _scan_layers(layer, params, x, dropout_rng):
    """x through the layers one after the other, as the loop `for p, rng in layers: x = layer(p, x, dropout_rng=rng)`.

    `jax.lax.scan(step, x, inputs)` is that loop, compiled once whatever the number of layers. It calls step with the x
    so far and with the next layer's slice of the inputs, a tree of arrays that all have a leading layer axis. step
    returns the next x, and an output of its own that scan would stack; here there is none. Without dropout the random
    keys are None, and scan hands on None to each layer.
    """
    scale = params["feed_forward_norm"]["scale"]
    if scale.ndim != 2:
        raise ValueError(f"a stack needs parameters with a leading layer axis, got a layer norm of shape {scale.shape}")
    rngs = None if dropout_rng is None else jax.random.split(dropout_rng, len(scale))

    def step(x, inputs):
        layer_params, layer_rng = inputs
        return layer(layer_params, x, dropout_rng=layer_rng), None  # no output of its own

    x, _ = jax.lax.scan(step, x, (params, rngs))  # _ would be the outputs, stacked
    return x


def _fitting(name, x, axes, weight, weight_axes):
    """x as a floating-point array. Raises one sentence where it does not fit the weight."""
    x = floating(name, x)
    if weight.ndim != len(weight_axes.split()):
        raise ValueError(
            f"the weight applied to {name} must have the axes ({weight_axes}), got shape {weight.shape} "
            "(one axis more is a stack of layers, for `encoder` or `decoder`)"
        )
    if x.ndim < len(axes.split()) or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{name} must end in the axes ({axes}) with d = {weight.shape[0]}, got shape {x.shape}")
    return x
