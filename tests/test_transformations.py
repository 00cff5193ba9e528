"""What JAX does to pure functions: the same numbers under every transformation, and no needless compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import transformer_layer as tl
from attention import attention_weights, flash_attention, padding_mask, scaled_dot_product_attention
from common import arrays, enable_x64, many_devices, random_params

LAYERS, D, H, F, N, M = 2, 8, 2, 12, 5, 6
ENCODER = random_params(tl.init_encoder, LAYERS, D, H, F, seed=1)
DECODER = random_params(tl.init_decoder, LAYERS, D, H, F, seed=2)


def transformer(params, source, target, mask=None, **options):
    """Encoder and decoder, source (..., m, d) and target (..., n, d) -> (..., n, d)."""
    memory = tl.encoder(params["encoder"], source, mask, **options)
    return tl.decoder(params["decoder"], target, memory, None, mask, **options)


PARAMS = {"encoder": ENCODER, "decoder": DECODER}
SOURCE, TARGET = arrays((3, M, D), (3, N, D))
MASK = padding_mask(np.array([4, 6, 1]), M)
COMPILED = jax.jit(transformer, static_argnames="attention")
EXPECTED = functools.cache(lambda: np.asarray(COMPILED(PARAMS, SOURCE, TARGET, MASK)))
FLASH = functools.partial(flash_attention, block_size=4)


def test_vmap_over_the_batch():
    """One sentence at a time under `jax.vmap` is the batch at once."""
    mapped = jax.jit(jax.vmap(transformer, in_axes=(None, 0, 0, 0)))(PARAMS, SOURCE, TARGET, MASK)
    np.testing.assert_allclose(mapped, EXPECTED(), atol=5e-6)


def test_vmap_over_parameters():
    """An ensemble of models is `jax.vmap` over a leading axis of the parameters."""
    ensemble = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), PARAMS)
    outputs = jax.jit(jax.vmap(transformer, in_axes=(0, None, None, None)))(ensemble, SOURCE, TARGET, MASK)
    np.testing.assert_allclose(outputs[0], EXPECTED(), atol=5e-6)
    assert abs(outputs[1] - outputs[0]).max() > 0.1


def test_remat_keeps_the_gradient():
    """`jax.checkpoint` around the encoder changes what is stored and not the gradient."""

    def gradient(function):
        return jax.grad(lambda params: jnp.square(function(params, SOURCE, MASK)).sum())(ENCODER)

    plain, remat = jax.jit(lambda: [gradient(function) for function in (tl.encoder, jax.checkpoint(tl.encoder))])()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # sums of 18 squares of up to 10, in float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters(dtype):
    """Parameters and inputs cast by `jax.tree.map` give half-precision outputs near those of float32."""
    params, source, target = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), (PARAMS, SOURCE, TARGET))
    output = np.asarray(COMPILED(params, source, target, MASK))
    assert output.dtype == dtype
    # About ten roundings in a row, each relative to values of about 1, and amplified by the layer norms.
    np.testing.assert_allclose(output.astype(np.float32), EXPECTED(), atol=16 * float(jnp.finfo(dtype).eps))


def test_x64():
    """With x64 on, float64 stays float64 from end to end, and agrees with float32 as far as that goes."""
    with enable_x64(True):
        arguments = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (PARAMS, SOURCE, TARGET))
        output = COMPILED(*arguments, MASK)
        weights = jax.eval_shape(attention_weights, arguments[1], arguments[1])
    assert output.dtype == weights.dtype == np.float64
    np.testing.assert_allclose(output, EXPECTED(), atol=5e-6)


def matrix_products(jaxpr):
    """The `dot_general`s of a program, also of those inside of its loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from matrix_products(inner)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_matrix_products_run_in_the_dtype_of_the_inputs(attention, dtype):
    """No product multiplies half-precision numbers as float32; those of attention add them up in float32."""
    inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (PARAMS, SOURCE, TARGET))
    program = jax.make_jaxpr(functools.partial(transformer, attention=attention))(*inputs, MASK)
    products = list(matrix_products(program.jaxpr))
    assert len(products) == 3 * (4 + 2) + 2 * 2  # projections and products of three attentions, two feed-forwards
    for product in products:
        assert [operand.aval.dtype for operand in product.invars] == [dtype, dtype]
    programs = [jax.make_jaxpr(attention)(*3 * [inputs[1]])]
    if attention is FLASH:  # its backward pass is written here, the plain function's is JAX's own
        programs.append(
            jax.make_jaxpr(jax.grad(lambda *qkv: attention(*qkv).sum(), argnums=(0, 1, 2)))(*3 * [inputs[1]])
        )
    for program in programs:
        for product in matrix_products(program.jaxpr):
            assert [operand.aval.dtype for operand in product.invars] == [dtype, dtype]
            assert product.params["preferred_element_type"] == jnp.float32


def on_a_mesh(function, kind, spec, *inputs):
    """The gradient of the function with its inputs split over a mesh of 4 x 2 virtual devices by the spec."""
    axis_types = {"axis_types": 2 * (kind,)}
    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices("cpu")[:8], **axis_types)
    placed = jax.device_put(inputs, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2)))(*placed)


newer_jax = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this version of JAX has no jax.set_mesh")


@many_devices
@newer_jax
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_attention_on_a_mesh(attention, kind):
    """Batch and heads lie on 8 devices, where XLA finds out how to compute (Auto) or the types say it (Explicit)."""
    inputs = arrays((4, 2, 10, 6), (4, 2, 10, 6), (4, 2, 10, 5))
    function = functools.partial(attention, causal=True)
    expected = jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2))(*inputs)
    gradient = on_a_mesh(function, getattr(AxisType, kind), P("data", "model"), *inputs)
    for actual, exact in zip(gradient, expected, strict=True):
        assert actual.sharding.spec[:2] == ("data", "model")
        np.testing.assert_allclose(actual, exact, atol=2e-6)


@many_devices
@newer_jax
def test_flash_inside_shard_map():
    """The same where each device runs a program of its own, with JAX's check of what varies from device to device."""
    inputs = arrays((4, 2, 10, 6), (4, 2, 10, 6), (4, 2, 10, 5))
    function = functools.partial(FLASH, causal=True)
    expected = jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2))(*inputs)
    spec = P("data", "model")
    mapped = jax.shard_map(function, in_specs=spec, out_specs=spec)
    for actual, exact in zip(on_a_mesh(mapped, AxisType.Auto, spec, *inputs), expected, strict=True):
        np.testing.assert_allclose(actual, exact, atol=2e-6)


def test_nothing_compiles_again_when_only_values_change():
    """New parameters, inputs, masks, random keys and dropout rates run the program that is already compiled."""
    compiled = jax.jit(functools.partial(transformer, attention=FLASH))
    for seed in (0, 1):
        params = jax.tree.map(lambda leaf, seed=seed: leaf + seed, PARAMS)
        mask = padding_mask(np.array([6, 2, 3 + seed]), M)
        options = {"dropout_rng": jax.random.key(seed), "dropout_rate": 0.1 + seed / 10}
        compiled(params, SOURCE + seed, TARGET - seed, mask, **options)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_contents_of_padding_never_matter(attention):
    """The largest finite numbers in masked keys and values leave every output as it was, to the last bit."""
    query, key, value = arrays((6, 4), (6, 4), (6, 4))
    mask = padding_mask(4, 6)[0]
    largest = float(jnp.finfo(jnp.float32).max)
    signs = np.array([[1, -1, 1, 1], [-1, -1, 1, -1]], np.float32)
    function = jax.jit(attention)
    expected = function(query, key, value, mask)
    changed = function(query, key.at[4:].set(largest * signs), value.at[4:].set(-largest * signs), mask)
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_contents_of_padding_never_matter_to_the_gradient(attention):
    """The same for gradients, up to contents whose scores are still finite."""
    query, key, value = arrays((6, 4), (6, 4), (6, 4))
    mask = padding_mask(4, 6)[0]
    gradient = jax.jit(jax.grad(lambda *qkv: jnp.square(attention(*qkv, mask)).sum(), argnums=(0, 1, 2)))
    expected = gradient(query, key, value)
    for actual, exact in zip(gradient(query, key.at[4:].set(1e30), value.at[4:].set(-1e30)), expected, strict=True):
        np.testing.assert_allclose(actual, exact, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"attention": FLASH}], ids=["plain", "flash"])
def test_contents_of_padding_never_matter_in_the_stacks(options):
    """The same for encoder and decoder, up to contents whose projections are still finite, by either attention."""
    noise = 1e30 * arrays(SOURCE.shape, seed=5)[0]
    padded = jnp.where(MASK[:, 0, 0, :, None], SOURCE, noise)
    np.testing.assert_allclose(COMPILED(PARAMS, padded, TARGET, MASK, **options), EXPECTED(), atol=5e-6)


@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_huge_scores_give_no_nan(attention):
    """Scores of 1e8 saturate the softmax: the output is the value of the best key, the gradient is finite."""
    query, value = jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    output, gradient = jax.jit(jax.value_and_grad(lambda q: attention(q, q, value).sum()))(query)
    assert output == value.sum()
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
@pytest.mark.parametrize(("batch", "n", "m"), [(2, 1, 1), (0, 3, 3), (2, 3, 0), (2, 0, 3)])
def test_smallest_shapes(attention, batch, n, m):
    """One position is its own value; an empty batch, zero keys or zero queries give an empty or zero output."""
    query, key, value = arrays((batch, n, 4), (batch, m, 4), (batch, m, 6))
    output = jax.jit(attention)(query, key, value)
    assert output.shape == (batch, n, 6)
    np.testing.assert_array_equal(output, value if m == 1 else np.zeros(output.shape))
    assert jax.eval_shape(attention, query, key, value[..., :0]).shape == (batch, n, 0)


def test_smallest_shapes_of_the_stacks():
    """An empty batch, and a memory of zero positions, pass through encoder and decoder without NaN."""
    assert jax.eval_shape(transformer, PARAMS, SOURCE[:0], TARGET[:0]).shape == (0, N, D)
    without_memory = jax.jit(tl.decoder)(DECODER, TARGET, SOURCE[:, :0])
    assert jnp.isfinite(without_memory).all()
