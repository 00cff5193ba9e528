"""transformer_layer.py: shapes, parameters, options and errors. Its equations are in test_paper.py."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
import transformer_layer as tl
from attention import scaled_dot_product_attention
from common import arrays, random_params

D, H, F, N, M, LAYERS = 12, 3, 20, 5, 7, 3  # d_model, heads, d_ff, positions, positions of the memory, layers
RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    """The parameters of every function of the module, by name: the stacks, and parts of their first layer."""
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
    """Calls the function of this name on its parameters and on x, with memory if it takes one."""
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


def test_initial_values():
    """Weights are Glorot-uniform, up to sqrt(6 / (rows + columns)) with all heads as one matrix; biases 0, scales 1."""
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
    """GPT-2, section 2.3: in a stack of N layers, only W^O and W_2 are divided by sqrt(2 N)."""
    num_layers = 3
    init_stack, init_layer = getattr(tl, f"init_{name}"), getattr(tl, f"init_{name}_layer")
    stack = jax.jit(lambda: init_stack(RNG, num_layers, D, H, F))()
    glorot = jax.jit(lambda: jax.vmap(lambda rng: init_layer(rng, D, H, F))(jax.random.split(RNG, num_layers)))()
    for path, weight in jax.tree.leaves_with_path(glorot):
        key = path[-1].key
        factor = (2 * num_layers) ** -0.5 if key in ("output", "w2") else 1
        scaled = stack[path[0].key][key]
        np.testing.assert_allclose(scaled, factor * weight, rtol=1e-6, err_msg=str(path))
        assert key not in ("query", "output", "w1", "w2") or np.not_equal(scaled[0], scaled[1]).all()  # layers differ


def test_attention_is_an_argument(params):
    """`attention=` replaces the algorithm in every layer and stack. It gets the projected heads, mask and causal."""
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


def test_the_header_shows_static_arguments(params):
    """The calls of `jax.jit` in the module's docstring, for an encoder layer and a decoder layer, work as they are."""
    calls = re.findall(r"`(jax\.jit\((\w+), .*?\))`", " ".join(tl.__doc__.split()))
    assert [name for _, name in calls] == ["encoder_layer", "decoder_layer"]
    x, memory = x_and_memory()
    for call_of_jit, name in calls:
        layer = eval(call_of_jit, {"jax": jax, name: getattr(tl, name)})
        inputs = (x, memory) if name == "decoder_layer" else (x,)
        assert layer(params[name], *inputs, attention=scaled_dot_product_attention).shape == x.shape


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_layer_norm_of_large_numbers(dtype):
    """Mean and variance are computed in float32: 300^2 overflows in float16, and bfloat16 has few digits."""
    x = (300 + 300 * arrays((4, 64))[0]).astype(dtype)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(axis=-1, keepdims=True)) / exact.std(axis=-1, keepdims=True)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(tl.layer_norm(tl.init_layer_norm(64), x).astype(float), exact, rtol=eps, atol=1e-5)


def test_each_random_key_is_used_once():
    """No key is used twice, in initialization or dropout, and no two weights of the model are equal."""
    with jax.debug_key_reuse(True):
        params = jax.jit(lambda rng: main.init_model(rng, 300, 2, 64, 4, 64))(jax.random.key(0))
        jax.jit(main.model)(params, np.ones((2, 3), int), np.ones((2, 4), int), dropout_rng=jax.random.key(1))
    weights = [leaf.reshape(2, -1) for leaf in jax.tree.leaves((params["encoder"], params["decoder"])) if leaf.ndim > 2]
    largest = np.concatenate([np.sort(abs(weight / weight.std()))[:, -20:] for weight in weights])
    # Two layers with three attentions of four weights, and two feed-forward networks of two.
    assert len(np.unique(largest.round(5), axis=0)) == len(largest) == 2 * (3 * 4 + 2 * 2)
    assert np.std(params["embedding"]) == pytest.approx(0.02, rel=0.02)


def test_dropout_rounds_once():
    """In half precision, the elements that are kept are x / (1 - rate), rounded once."""
    x = arrays((100,), dtype=jnp.bfloat16)[0]
    dropped = tl.dropout(RNG, x, 0.1)
    exact = (x.astype(jnp.float32) / 0.9).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dropped, np.where(dropped == 0, 0, exact))


def test_dropout_is_determined_by_the_key(params):
    """The same key drops the same elements, and another key drops others. A rate of 0, also as an int, drops none."""
    x, memory = x_and_memory()
    for name in ("encoder", "decoder"):
        first, again, other, none = (
            jitted(name, params, x, memory, dropout_rng=jax.random.key(i), dropout_rate=rate)
            for i, rate in ((1, 0.1), (1, 0.1), (2, 0.1), (1, 0))
        )
        plain = jitted(name, params, x, memory)
        np.testing.assert_array_equal(first, again)
        assert abs(first - other).max() > 0.1
        assert abs(first - plain).max() > 0.1
        np.testing.assert_allclose(none, plain, atol=2e-6)
    assert (tl.dropout(RNG, x, 0) == x).all()
    for function in (tl.encoder_layer, tl.decoder_layer, main.encode, main.model):  # the paper's P_drop
        assert inspect.signature(function).parameters["dropout_rate"].default == 0.1


X, MASK = jnp.zeros((2, N, D)), jnp.ones((2, N, N), bool)
BAD_VALUES = {
    "num_heads must divide d_model, got 5 heads and d_model = 12": lambda p: tl.init_encoder_layer(RNG, 12, 5, 8),
    "num_heads must divide d_model, got 0 heads and d_model = 12": lambda p: tl.init_decoder_layer(RNG, 12, 0, 8),
    "num_heads must divide d_model, got 3 heads and d_model = 0": lambda p: tl.init_multi_head_attention(RNG, 0, 3),
    "d_model and d_ff must be at least 1, got 0 and 8": lambda p: tl.init_feed_forward(RNG, 0, 8),
    "d_model and d_ff must be at least 1, got 12 and 0": lambda p: tl.init_feed_forward(RNG, 12, 0),
    "d_model must be at least 1, got 0": lambda p: tl.init_layer_norm(0),
    "num_layers must be at least 1, got 0": lambda p: tl.init_encoder(RNG, 0, 12, 3, 8),
    "query must end in the axes (n d) with d = 12, got shape (2, 5, 7)": lambda p: call("encoder", p, X[..., :7], None),
    "query must end in the axes (n d) with d = 12, got shape (12,)": lambda p: call("encoder", p, X[0, 0], None),
    "key must end in the axes (m d) with d = 12": lambda p: call("decoder", p, X, X[..., :7]),
    "the leading axes of memory must broadcast to x's": lambda p: call("decoder", p, X[0], X),
    "mask must broadcast to (..., n, m) = (2, 3, 5, 5), got shape (2, 5, 5); "
    "if it is one mask per sequence, add a head axis: mask[:, None]": lambda p: tl.encoder(p["encoder"], X, MASK),
    "(..., n, m) = (3, 5, 5), got shape (2, 5, 5)\n": lambda p: tl.encoder(p["encoder"], X[0], MASK),
    "query must have the axes (d h k), got shape (3, 12, 3, 4)": lambda p: tl.encoder_layer(p["encoder"], X),
    "a stack needs parameters with a leading layer axis": lambda p: tl.encoder(p["encoder_layer"], X),
    "the dropout rate must be at least 0 and below 1, got -0.1": lambda p: tl.dropout(RNG, X, -0.1),
    "the dropout rate must be at least 0 and below 1, got 1.0": lambda p: tl.encoder(p["encoder"], X, dropout_rate=1.0),
}
BAD_DTYPES = {
    "query must be floating point, got int32": lambda p: call("encoder", p, X.astype(int), None),
    "key must be floating point, got int32": lambda p: call("decoder", p, X, X.astype(int)),
    "mask must be boolean": lambda p: tl.encoder(p["encoder"], X, jnp.ones((N, N))),
    "x must be floating point, got int32": lambda p: tl.dropout(RNG, X.astype(int), 0.1),
}


@pytest.mark.parametrize("message", [*BAD_VALUES, *BAD_DTYPES])
def test_bad_input(params, message):
    """An invalid argument raises one error that names it, its value, and what it must be."""
    with pytest.raises(ValueError if message in BAD_VALUES else TypeError) as raised:
        (BAD_VALUES | BAD_DTYPES)[message](params)
    assert message in f"{raised.value}\n"
