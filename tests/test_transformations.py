"""The same results under transformations, in other dtypes and on meshes, and sensible ones at extremes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import transformer_layer as tl
from attention import flash_attention, padding_mask, scaled_dot_product_attention
from common import arrays, cpu_mesh, many_devices, random_params

LAYERS, D, H, F, N, M = 2, 8, 2, 12, 5, 6
PARAMS = {
    "encoder": random_params(tl.init_encoder, LAYERS, D, H, F, seed=1),
    "decoder": random_params(tl.init_decoder, LAYERS, D, H, F, seed=2),
}
SOURCE, TARGET = arrays((3, M, D), (3, N, D))
MASK = padding_mask(np.array([4, 6, 1]), M)
FLASH = functools.partial(flash_attention, block_size=4)


def transformer(params, source, target, mask=None, **options):
    """Encoder and decoder: source (..., m, d) and target (..., n, d) -> (..., n, d)."""
    memory = tl.encoder(params["encoder"], source, mask, **options)
    return tl.decoder(params["decoder"], target, memory, None, mask, **options)


COMPILED = jax.jit(transformer, static_argnames="attention")
EXPECTED = functools.cache(lambda: np.asarray(COMPILED(PARAMS, SOURCE, TARGET, MASK)))


def test_vmap_over_the_batch():
    """One sequence at a time under `jax.vmap` equals the batch."""
    for attention in (scaled_dot_product_attention, FLASH):
        function = functools.partial(transformer, attention=attention)
        mapped = jax.jit(jax.vmap(function, in_axes=(None, 0, 0, 0)))(PARAMS, SOURCE, TARGET, MASK)
        np.testing.assert_allclose(mapped, EXPECTED(), atol=5e-6)


def test_new_values_do_not_compile_again():
    """New parameters, inputs, masks, random keys and dropout rates reuse the compiled program."""
    traces = []

    @jax.jit
    def traced(*arguments, **options):
        traces.append(None)
        return transformer(*arguments, attention=FLASH, **options)

    for seed in (0, 1):
        params = jax.tree.map(lambda leaf, seed=seed: leaf + seed, PARAMS)
        mask = padding_mask(np.array([6, 2, 3 + seed]), M)
        options = {"dropout_rng": jax.random.key(seed), "dropout_rate": 0.1 + seed / 10}
        traced(params, SOURCE + seed, TARGET - seed, mask, **options)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters(dtype):
    """Parameters and inputs cast by `jax.tree.map` give half-precision outputs close to those of float32."""
    params, source, target = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), (PARAMS, SOURCE, TARGET))
    output = np.asarray(COMPILED(params, source, target, MASK))
    assert output.dtype == dtype
    # About ten successive roundings of values near 1, amplified by the layer norms.
    np.testing.assert_allclose(output.astype(np.float32), EXPECTED(), atol=16 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float32, "f32")])
@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_matrix_products_run_in_the_dtype_of_the_inputs(attention, dtype, name):
    """No product multiplies half-precision numbers as float32. The products of attention accumulate in float32."""

    def matrix_products(function, *arguments):
        """The dtypes (left, right, result) of each matrix product in the program that JAX hands to XLA."""
        text, tensor = jax.jit(function).lower(*arguments).as_text(), r"tensor<(?:\d+x)*(\w+)>"
        return re.findall(rf"stablehlo\.dot_general .*: \({tensor}, {tensor}\) -> {tensor}", text)

    def gradient(query, key, value):
        return jax.grad(lambda *qkv: attention(*qkv).sum(), argnums=(0, 1, 2))(query, key, value)

    inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (PARAMS, SOURCE, TARGET))
    products = matrix_products(functools.partial(transformer, attention=attention), *inputs)
    assert len(products) >= 2 * (4 + 2) + 4  # of an encoder layer and a decoder layer
    assert {operand for left, right, _ in products for operand in (left, right)} == {name}
    # The backward pass of FLASH is written here. That of plain attention is JAX's own.
    for function in (attention, gradient) if attention is FLASH else (attention,):
        assert set(matrix_products(function, *3 * [inputs[1]])) == {(name, name, "f32")}


@many_devices
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_attention_on_a_mesh(attention, kind):
    """Batch and heads are split over 8 devices, by the compiler (Auto), by type (Explicit), or by `jax.shard_map`."""
    inputs = arrays((4, 2, 10, 6), (4, 2, 10, 6), (4, 2, 10, 5))
    function, spec = functools.partial(attention, causal=True), P("data", "model")
    mapped = jax.shard_map(function, in_specs=spec, out_specs=spec) if kind == "shard_map" else function

    def gradient(function):
        return jax.jit(jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2)))

    mesh = cpu_mesh(4, 2, axis_type=getattr(AxisType, kind, AxisType.Auto))
    with jax.set_mesh(mesh):
        split = gradient(mapped)(*jax.device_put(inputs, NamedSharding(mesh, spec)))
    for actual, expected in zip(split, gradient(function)(*inputs), strict=True):
        assert actual.sharding.spec[:2] == ("data", "model")
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
def test_the_contents_of_padding_do_not_matter(attention):
    """The largest finite numbers in masked keys and values change no bit of the output. Gradients stay finite."""
    query, key, value = arrays((6, 4), (6, 4), (6, 4))
    mask = padding_mask(4, 6)[0]
    largest = float(jnp.finfo(jnp.float32).max)
    signs = np.array([[1, -1, 1, 1], [-1, -1, 1, -1]], np.float32)
    attend = jax.jit(attention)
    changed = attend(query, key.at[4:].set(largest * signs), value.at[4:].set(-largest * signs), mask)
    np.testing.assert_array_equal(changed, attend(query, key, value, mask))

    gradient = jax.jit(jax.grad(lambda *qkv: jnp.square(attention(*qkv, mask)).sum(), argnums=(0, 1, 2)))
    expected = gradient(query, key, value)
    for actual, exact in zip(gradient(query, key.at[4:].set(1e30), value.at[4:].set(-1e30)), expected, strict=True):
        np.testing.assert_allclose(actual, exact, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"attention": FLASH}], ids=["plain", "flash"])
def test_the_contents_of_padding_do_not_matter_in_the_stacks(options):
    """Padding changes nothing in encoder and decoder, as long as its projections are finite."""
    padded = jnp.where(MASK[:, 0, 0, :, None], SOURCE, 1e30 * arrays(SOURCE.shape, seed=5)[0])
    np.testing.assert_allclose(COMPILED(PARAMS, padded, TARGET, MASK, **options), EXPECTED(), atol=5e-6)


@pytest.mark.parametrize("attention", [scaled_dot_product_attention, FLASH])
@pytest.mark.parametrize(("batch", "n", "m"), [(2, 1, 1), (0, 3, 3), (2, 3, 0), (2, 0, 3)])
def test_smallest_shapes(attention, batch, n, m):
    """A single key outputs its value; an empty batch, zero keys or zero queries give an empty or zero output."""
    query, key, value = arrays((batch, n, 4), (batch, m, 4), (batch, m, 6))
    output = jax.jit(attention)(query, key, value)
    assert output.shape == (batch, n, 6)
    np.testing.assert_array_equal(output, value if m == 1 else np.zeros(output.shape))
    assert jax.eval_shape(attention, query, key, value[..., :0]).shape == (batch, n, 0)
