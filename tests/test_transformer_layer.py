"""transformer_layer.py: shapes, parameters, and the promises of its docstrings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_layer as tl
from attention import padding_mask
from common import arrays, random_params

D, H, F, N, M, LAYERS = 12, 3, 20, 5, 7, 3  # d_model, heads, d_ff, positions, positions of the memory, layers
RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    """The parameters of every function of the module, by its name: the stacks, and what lies in their first layer."""
    stacks = {
        "encoder": random_params(tl.init_encoder, LAYERS, D, H, F, seed=1),
        "decoder": random_params(tl.init_decoder, LAYERS, D, H, F, seed=2),
    }
    first = jax.tree.map(lambda leaf: leaf[0], stacks)
    return {
        **stacks,
        "encoder_layer": first["encoder"],
        "decoder_layer": first["decoder"],
        "multi_head_attention": first["decoder"]["cross_attention"],
        "feed_forward": first["decoder"]["feed_forward"],
        "layer_norm": first["decoder"]["feed_forward_norm"],
    }


def x_and_memory(lead=(2,), dtype=jnp.float32):
    """Standard normal x (..., N, D) and memory (..., M, D)."""
    return arrays((*lead, N, D), (*lead, M, D), dtype=dtype)


def call(name, params, x, memory, **options):
    """The function of that name, on what it takes of params, x and memory."""
    inputs = {"multi_head_attention": (x, memory, memory), "decoder_layer": (x, memory), "decoder": (x, memory)}
    return getattr(tl, name)(params[name], *inputs.get(name, (x,)), **options)


jitted = jax.jit(call, static_argnums=0, static_argnames="causal")
NAMES = ["multi_head_attention", "feed_forward", "layer_norm", "encoder_layer", "decoder_layer", "encoder", "decoder"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(params, name, lead, dtype):
    """x (..., n, d) -> (..., n, d) in the dtype of x, with any leading axes and float32 parameters."""
    x, memory = x_and_memory(lead, dtype)
    output = jax.eval_shape(lambda x, memory: call(name, params, x, memory), x, memory)
    assert output.shape == x.shape
    assert output.dtype == dtype


@pytest.mark.parametrize("name", ["encoder_layer", "decoder_layer"])
def test_jit_equals_no_jit(params, name):
    """`jax.jit(f)(params, x)` needs no static argument and gives the same numbers, here for all that layers consist of.

    A stack is a scan, which JAX compiles with or without jit.
    """
    x, memory = x_and_memory()
    np.testing.assert_allclose(jitted(name, params, x, memory), call(name, params, x, memory), atol=2e-6)


def test_parameter_names_and_shapes():
    """The names and shapes of the design; W^Q of all heads is one array (d, h, k), W^O is (h, v, d)."""
    attention = {"query": (D, H, 4), "key": (D, H, 4), "value": (D, H, 4), "output": (H, 4, D)}
    feed_forward = {"w1": (D, F), "b1": (F,), "w2": (F, D), "b2": (D,)}
    norm = {"scale": (D,), "bias": (D,)}
    encoder_layer = {
        "self_attention": attention,
        "self_attention_norm": norm,
        "feed_forward": feed_forward,
        "feed_forward_norm": norm,
    }
    decoder_layer = {**encoder_layer, "cross_attention": attention, "cross_attention_norm": norm}

    def shapes(init, *sizes):
        return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(lambda: init(RNG, *sizes)))

    assert shapes(tl.init_encoder_layer, D, H, F) == encoder_layer
    assert shapes(tl.init_decoder_layer, D, H, F) == decoder_layer
    for init, layer in ((tl.init_encoder, encoder_layer), (tl.init_decoder, decoder_layer)):
        stacked = jax.tree.map(lambda shape: (LAYERS, *shape), layer, is_leaf=lambda node: isinstance(node, tuple))
        assert shapes(init, LAYERS, D, H, F) == stacked


def test_initial_values():
    """Section 3.1 and the design: Glorot-uniform weights with the fan of the full matrix, biases 0, scales 1.

    Uniform up to sqrt(6 / (rows + columns)) of the matrices d_model x (h d_k) and d_model x d_ff.
    """
    params = jax.jit(lambda: tl.init_encoder_layer(RNG, 64, 8, 256))()
    weights = [(weight, 64 + 64) for weight in params["self_attention"].values()]
    weights += [(params["feed_forward"][name], 64 + 256) for name in ("w1", "w2")]
    for weight, fans in weights:
        limit = (6 / fans) ** 0.5
        assert 0.99 * limit < abs(np.asarray(weight)).max() <= limit
    for norm in ("self_attention_norm", "feed_forward_norm"):
        assert (np.asarray(params[norm]["scale"]) == 1).all()
        assert not np.any(params[norm]["bias"])
    assert not np.any(params["feed_forward"]["b1"])
    assert not np.any(params["feed_forward"]["b2"])


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_stacks_divide_the_weights_that_write_into_the_residual_connection(name):
    """GPT-2, section 2.3: in a stack of N layers, W^O and W_2 are divided by sqrt(2 N), and nothing else is."""
    num_layers = 3
    init_stack, init_layer = getattr(tl, f"init_{name}"), getattr(tl, f"init_{name}_layer")
    stack = jax.jit(lambda: init_stack(RNG, num_layers, D, H, F))()
    glorot = jax.jit(lambda: jax.vmap(lambda rng: init_layer(rng, D, H, F))(jax.random.split(RNG, num_layers)))()
    for path, weight in jax.tree.leaves_with_path(glorot):
        key = path[-1].key
        factor = (2 * num_layers) ** -0.5 if key in ("output", "w2") else 1
        scaled = stack[path[0].key][key]
        np.testing.assert_allclose(scaled, factor * weight, rtol=1e-6, err_msg=str(path))
        assert key not in ("query", "output", "w1", "w2") or np.not_equal(scaled[0], scaled[1]).all()  # no two alike


def test_parameter_count_of_the_base_model():
    """An encoder layer of the paper's base size has 3,150,336 parameters: 4 d^2 + 2 d f + f + d + 4 d."""
    layer = jax.eval_shape(lambda: tl.init_encoder_layer(RNG, 512, 8, 2048))
    assert sum(leaf.size for leaf in jax.tree.leaves(layer)) == 3_150_336


def test_scan_equals_a_loop_over_the_layers(params):
    """encoder and decoder apply layer 0, 1, ... of the stacked parameters, each output the next one's input."""
    x, memory = x_and_memory()
    expected = x, x
    for i in range(LAYERS):
        layers = {
            f"{name}_layer": jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for name in ("encoder", "decoder")
        }
        expected = (
            jitted("encoder_layer", layers, expected[0], memory, causal=True),
            jitted("decoder_layer", layers, expected[1], memory),
        )
    np.testing.assert_allclose(jitted("encoder", params, x, memory, causal=True), expected[0], atol=2e-6)
    np.testing.assert_allclose(jitted("decoder", params, x, memory), expected[1], atol=2e-6)


def test_causality_of_encoder_and_decoder(params):
    """`causal=True` and the decoder keep the outputs before position 3 when x changes from 3 on."""
    x, memory = x_and_memory()
    changed = x.at[:, 3:].multiply(-1)

    def difference(name, **options):
        outputs = (jitted(name, params, inputs, memory, **options) for inputs in (x, changed))
        return abs(np.subtract(*outputs))[:, :3].max()

    assert difference("encoder", causal=True) == 0
    assert difference("decoder") == 0
    assert difference("encoder") > 1e-3


def test_padding_equals_a_shorter_input(params):
    """With a padding mask, real positions get what they get without padding: in the encoder and from memory."""
    x, memory = x_and_memory()
    mask, memory_mask = padding_mask(jnp.array([3, 3]), N), padding_mask(jnp.array([4, 4]), M)
    encoded = jitted("encoder", params, x, memory, mask=mask)[:, :3]
    np.testing.assert_allclose(encoded, jitted("encoder", params, x[:, :3], memory), atol=2e-6)
    decoded = jitted("decoder", params, x, memory, mask=mask, memory_mask=memory_mask)[:, :3]
    np.testing.assert_allclose(decoded, jitted("decoder", params, x[:, :3], memory[:, :4]), atol=2e-6)


def test_attention_is_an_argument(params):
    """`attention=` swaps the algorithm in every layer and stack, and gets the projected heads, mask and causal."""
    x, memory = x_and_memory()
    calls = []

    def zeros(query, key, value, mask=None, *, causal=False):
        calls.append((query.shape, key.shape, causal))
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), value.dtype)

    for name in NAMES:
        if name not in ("feed_forward", "layer_norm"):
            jax.eval_shape(lambda name=name: call(name, params, x, memory, attention=zeros))
    this, cross = ((2, H, N, 4), (2, H, N, 4)), ((2, H, N, 4), (2, H, M, 4))
    layers = [(*this, False), (*this, True), (*cross, False)]
    assert calls == [(*cross, False), *layers, *layers]


def test_dropout_keys_differ_between_sublayers_and_layers(params, monkeypatch):
    """Each sub-layer of each layer drops with a key of its own; without a key nothing is dropped."""
    x, memory = x_and_memory()
    seen = []

    def spy(rng, x, rate):
        jax.debug.callback(lambda data: seen.append(tuple(np.ravel(data).tolist())), jax.random.key_data(rng))
        return x

    monkeypatch.setattr(tl, "dropout", spy)
    for name, sublayers in (("encoder", 2), ("decoder", 3)):
        seen.clear()
        call(name, params, x, memory, dropout_rng=RNG)
        jax.effects_barrier()
        assert len(seen) == len(set(seen)) == sublayers * LAYERS


def test_dropout_is_random_by_key_only(params):
    """The same key drops the same elements, another key others, no key none, and a rate of 0 none."""
    x, memory = x_and_memory()
    for name in ("encoder", "decoder"):
        first, again, other, none = (
            jitted(name, params, x, memory, dropout_rng=jax.random.key(i), dropout_rate=rate)
            for i, rate in ((1, 0.1), (1, 0.1), (2, 0.1), (1, 0.0))
        )
        plain = jitted(name, params, x, memory)
        np.testing.assert_array_equal(first, again)
        assert abs(first - other).max() > 0.1
        assert abs(first - plain).max() > 0.1
        np.testing.assert_allclose(none, plain, atol=2e-6)


X = jnp.zeros((2, N, D))


@pytest.mark.parametrize(
    ("error", "message", "function"),
    [
        (
            ValueError,
            "num_heads must divide d_model, got 5 heads and d_model = 12",
            lambda p: tl.init_encoder_layer(RNG, 12, 5, 8),
        ),
        (ValueError, "num_heads must divide d_model, got 0", lambda p: tl.init_multi_head_attention(RNG, 12, 0)),
        (ValueError, "d_model and d_ff must be at least 1, got 12 and 0", lambda p: tl.init_feed_forward(RNG, 12, 0)),
        (ValueError, "d_model must be at least 1, got 0", lambda p: tl.init_layer_norm(0)),
        (ValueError, "num_layers must be at least 1, got 0", lambda p: tl.init_encoder(RNG, 0, 12, 3, 8)),
        (
            ValueError,
            r"query must end in the axes \(n d\) with d = 12, got shape \(2, 5, 7\)",
            lambda p: tl.encoder_layer(p["encoder_layer"], X[..., :7]),
        ),
        (
            ValueError,
            r"query must end in the axes \(n d\) with d = 12, got shape \(12,\)",
            lambda p: tl.encoder_layer(p["encoder_layer"], X[0, 0]),
        ),
        (ValueError, r"key must end in the axes \(m d\)", lambda p: tl.decoder(p["decoder"], X, X[..., :7])),
        (
            ValueError,
            "leading axes of memory must broadcast to those of x",
            lambda p: tl.decoder(p["decoder"], X[0], X),
        ),
        (
            ValueError,
            r"key must end in the axes \(m d\)",
            lambda p: tl.multi_head_attention(p["multi_head_attention"], X, X[..., :7], X),
        ),
        (
            ValueError,
            "key and value must have the same length m, got 5 and 4",
            lambda p: tl.multi_head_attention(p["multi_head_attention"], X, X, X[:, :4]),
        ),
        (TypeError, "query must be floating point, got int32", lambda p: tl.encoder(p["encoder"], X.astype(int))),
        (
            TypeError,
            "key must be floating point, got int32",
            lambda p: tl.decoder_layer(p["decoder_layer"], X, X.astype(int)),
        ),
        (TypeError, "mask must be boolean", lambda p: tl.encoder(p["encoder"], X, jnp.ones((N, N)))),
        (
            ValueError,
            r"mask must broadcast to \(..., n, m\) = \(2, 3, 5, 5\), got shape \(2, 5, 5\)",
            lambda p: tl.encoder(p["encoder"], X, jnp.ones((2, N, N), bool)),
        ),
        (
            ValueError,
            r"the weight applied to query must have the axes \(d h k\), got shape \(3, 12, 3, 4\) \(with one more axis it is a stack of layers",
            lambda p: tl.encoder_layer(p["encoder"], X),
        ),
        (ValueError, "a stack needs parameters with a leading layer axis", lambda p: tl.encoder(p["encoder_layer"], X)),
        (
            ValueError,
            "the dropout rate must be at least 0 and below 1, got 1.0",
            lambda p: tl.encoder(p["encoder"], X, dropout_rate=1.0),
        ),
        (ValueError, "the dropout rate must be at least 0 and below 1, got -0.1", lambda p: tl.dropout(RNG, X, -0.1)),
    ],
)
def test_bad_input(params, error, message, function):
    """What does not fit raises one sentence that names the argument, what it was and what it must be."""
    with pytest.raises(error, match=message):
        function(params)
