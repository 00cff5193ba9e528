"""flash_attention against scaled_dot_product_attention: the same results, with memory linear in n and m."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import flash_attention, scaled_dot_product_attention
from common import arrays

flash = jax.jit(flash_attention, static_argnames=("causal", "block_size"))
plain = jax.jit(scaled_dot_product_attention, static_argnames="causal")
MIXED = [("bfloat16", "float16", "float32"), ("float32", "bfloat16", "float16"), ("float32", "float32", "bfloat16")]


@functools.partial(jax.jit, static_argnums=(5, 6))
def both(query, key, value, mask, weight, causal, block_size):
    """Output and gradients with respect to query, key and value, of flash and of plain attention."""

    def output_and_gradients(attention):
        def weighted(*inputs):
            output = attention(*inputs, mask, causal=causal)
            return jnp.vdot(output, weight), output

        gradients, output = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return output, *gradients

    blocks = functools.partial(flash_attention, block_size=block_size)
    return output_and_gradients(blocks), output_and_gradients(scaled_dot_product_attention)


@pytest.mark.parametrize(
    ("query", "key", "value", "block_size", "mask", "causal"),
    [
        ((2, 3, 8, 4), (2, 3, 8, 4), (2, 3, 8, 6), 3, None, True),  # a block size that does not divide the length
        ((2, 3, 8, 4), (2, 3, 8, 4), (2, 3, 8, 6), 4, (8, 8), True),  # one that does
        ((2, 3, 8, 4), (2, 3, 8, 4), (2, 3, 8, 6), 512, (2, 1, 1, 8), False),  # one block, with a padding mask
        ((2, 3, 5, 4), (2, 3, 9, 4), (2, 3, 9, 6), 2, (2, 3, 5, 9), False),  # cross-attention, a mask for each head
        ((2, 3, 5, 4), (1, 3, 7, 4), (7, 6), 3, None, False),  # the same keys and values for many queries
        ((1, 4), (1, 4), (1, 6), 1, None, True),  # a single position
    ],
)
def test_flash_equals_plain(query, key, value, block_size, mask, causal):
    """Outputs and gradients agree for every kind of shape, block size and mask."""
    inputs = arrays(query, key, value, (*query[:-1], 6))
    mask = None if mask is None else np.random.default_rng(1).random(mask) < 0.6
    for actual, expected in zip(*both(*inputs[:3], mask, inputs[3], causal, block_size), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_fully_masked_queries_output_zeros():
    """A fully masked query outputs exact zeros and has a zero gradient, even if whole blocks are masked."""
    query, key, value = arrays((6, 4), (6, 4), (6, 4))
    mask = np.ones((6, 6), bool)
    mask[1] = False
    mask[3, :4] = False  # row 3 is fully masked, because causal attention masks keys 4 and 5
    mask[4, :4] = False  # row 4 attends only to itself, in the last block
    weight = np.eye(6, 4, -1, np.float32)  # nonzero in rows 1 to 4
    results = both(query, key, value, mask, weight, True, 2)
    assert not np.any(np.asarray(results[0][0])[[1, 3]])
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    masked, _ = both(query, key, value, np.zeros((6, 6), bool), weight, True, 2)
    assert not any(map(np.any, masked))


@pytest.mark.parametrize(("causal", "outer"), [(False, "reverse"), (False, "forward"), (True, "forward")])
def test_second_derivatives(causal, outer):
    """The derivative of the gradient is plain attention's, with fully masked queries and a padded last block."""
    inputs = arrays((5, 4), (5, 4), (5, 6))
    mask = np.random.default_rng(1).random((5, 5)) < 0.7
    mask[2] = False

    def second(attention):
        gradient = jax.grad(lambda qkv: jnp.square(attention(*qkv, mask, causal=causal)).sum())
        if outer == "forward":
            return jax.jvp(gradient, [inputs], [inputs])[1]
        return jax.grad(lambda qkv: sum(jnp.sin(x).sum() for x in gradient(qkv)))(inputs)

    actual = jax.jit(lambda: second(functools.partial(flash_attention, block_size=3)))()
    for a, b in zip(actual, jax.jit(lambda: second(scaled_dot_product_attention))(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_unsupported_derivatives():
    """JAX raises an error for forward mode, and for the gradient of a causal gradient."""
    x = arrays((6, 4))[0]

    def function(x):
        return flash_attention(x, x, x, causal=True, block_size=2).sum()

    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(function, (x,), (x,))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda x: jax.grad(function)(x).sum())(x)


@pytest.mark.parametrize("score", [1e4, -1e4, 1e8, -1e8])
def test_large_scores(score):
    """Equal scores share the weight equally, however far from zero they are: outputs and gradients are float64's.

    The weights must not come from the difference of a score and a logsumexp, which is rounded to as few digits.
    """
    query, key, (value, weight) = np.full((5, 1), score), np.ones((5, 1)), arrays((5, 6), (5, 6))
    with jax.enable_x64(True):
        _, exact = both(query, key, np.asarray(value, np.float64), None, weight, True, 2)
    for actual in both(np.float32(query), np.float32(key), value, None, weight, True, 2):
        for name, result, expected in zip("OQKV", actual, exact, strict=True):
            # The gradients of query and key are differences of weighted values, times key or query.
            tolerance = 1e-6 * (abs(score) if name == "K" else 1)
            np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance, err_msg=name)


def test_float64_beyond_the_range_of_float32():
    """In float64, the running maximum starts below every score, and value may exceed the range of query and key."""
    with jax.enable_x64(True):
        inputs = np.full((5, 1), -1e300), np.ones((5, 1)), np.arange(5.0)[:, None]
        np.testing.assert_allclose(flash(*inputs, block_size=2), plain(*inputs), rtol=1e-12)
        (query, key), (value,) = arrays((5, 4), (5, 4)), arrays((5, 6), dtype=jnp.float64)
        mask = np.arange(5)[:, None] != 2
        output, expected = flash(query, key, 1e300 * value, mask, block_size=2), plain(query, key, value, mask)
        assert output.dtype == expected.dtype == jnp.float64
        np.testing.assert_allclose(output / 1e300, expected, atol=1e-6)


@pytest.mark.parametrize("dtypes", [*itertools.product(["float16", "float32"], repeat=3), 3 * ("bfloat16",), *MIXED])
def test_dtypes_mix(dtypes):
    """query, key and value may differ in dtype. Output and gradients are those of float64, rounded only once.

    The exception: if all three have the same half precision, the weights and their gradients are rounded to it, too.
    Otherwise, gradients as small as 1e-6 lose nothing but what float16, with few bits for such numbers, cannot hold.
    """
    mask = np.arange(7) != np.arange(5)[:, None]
    widest = jnp.result_type(*dtypes)

    def output_and_gradients(attention, query, key, value, weight):
        output, vjp = jax.vjp(lambda *qkv: attention(*qkv, mask), query, key, value)
        return output, *vjp(weight)

    with jax.enable_x64(True):
        inputs = arrays((5, 4), (7, 4), (7, 6), (5, 6))
        inputs[3] *= 1 if widest == jnp.float16 else 1e-6
        inputs = [x.astype(dtype) for x, dtype in zip(inputs, (*dtypes, dtypes[2]), strict=True)]
        expected = output_and_gradients(plain, *(x.astype(jnp.float64) for x in inputs))
        for attention in (scaled_dot_product_attention, functools.partial(flash_attention, block_size=3)):
            results = output_and_gradients(attention, *inputs)
            for actual, exact, dtype in zip(results, expected, (dtypes[2], *dtypes), strict=True):
                assert actual.dtype == dtype
                eps, smallest = max(jnp.finfo(dtype).eps, jnp.finfo(widest).eps), jnp.finfo(dtype).smallest_subnormal
                tolerance = 3 * float(eps) * abs(exact).max() + float(smallest)
                np.testing.assert_allclose(actual.astype(float), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_the_length(gradient, causal):
    """arXiv 2205.14135, theorem 1: four times the length needs at most four times the memory, with gradients too."""

    def attend(query, key, value, mask):
        return flash_attention(query, key, value, mask, causal=causal, block_size=16).sum()

    def temporary_bytes(length):
        x, mask = jax.ShapeDtypeStruct((2, length, 16), jnp.float32), jax.ShapeDtypeStruct((1, length), bool)
        function = jax.grad(attend, argnums=(0, 1, 2)) if gradient else attend
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.jit(function).lower(x, x, x, mask).compile().memory_analysis().temp_size_in_bytes

    assert 0 < temporary_bytes(2048) <= 4 * temporary_bytes(512)


@pytest.mark.parametrize("causal", [False, True])
def test_causal_attention_skips_blocks(monkeypatch, causal):
    """With causal=True, only the blocks up to the diagonal are computed, forward and backward."""
    query, key, value = arrays((12, 4), (12, 4), (12, 4))
    computed, block_scores = [], attention._block_scores

    def recording_block_scores(*arguments):
        computed.append(tuple(map(int, arguments[-2:])))
        return block_scores(*arguments)

    monkeypatch.setattr(attention, "_block_scores", recording_block_scores)
    with jax.disable_jit():  # loops run in Python
        jax.grad(lambda query: flash_attention(query, key, value, causal=causal, block_size=4).sum())(query)
    blocks = [(i, j) for i in range(3) for j in range(3) if j <= i or not causal]
    assert sorted(computed) == sorted(2 * blocks)


@pytest.mark.parametrize(("length", "shape"), [(0, (1, 1)), (3, (1, 3)), (8, (2, 4)), (9, (3, 3)), (13, (4, 4))])
def test_blocks(length, shape):
    """As few blocks as possible, of equal size, at most block_size, so that short sequences are hardly padded."""
    blocks = attention._blocks(jnp.ones((length, 2)), 4)
    assert blocks.shape == (*shape, 2)
    np.testing.assert_array_equal(blocks[..., 0].ravel(), np.arange(np.prod(shape)) < length)


def test_calls_outside_jit_compile_once(caplog):
    """The third call with the same shapes compiles nothing, with or without gradients."""
    x = arrays((2, 9, 4))[0]

    def attend(x):
        return flash_attention(x, x, x, causal=True, block_size=4).sum()

    for function in (attend, jax.grad(attend)):
        compiled = []
        for _ in range(3):
            caplog.clear()
            with jax.log_compiles():
                function(x)
            compiled.append(sum("Compiling" in record.getMessage() for record in caplog.records))
        assert compiled[0] > 0
        assert compiled[2] == 0


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True])
def test_bad_block_size(block_size):
    """A block size below one, or one that is not an integer, raises an error."""
    with pytest.raises(ValueError, match=f"block_size must be a Python int of at least 1, got {block_size}"):
        flash_attention(*arrays((2, 4), (2, 4), (2, 4)), block_size=block_size)
