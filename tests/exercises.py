"""The checks of README's exercises 6 to 10. They fail until the exercise is done, and if it is done wrong.

    python -m pytest tests/exercises.py -k rotary

pytest does not collect this file by itself. Each check says which names and arguments it expects.
"""

import jax
import jax.numpy as jnp
import numpy as np

import attention
import main
import transformer_layer as tl
from common import arrays, random_params

# ---- 6. Generate: a decoder-only model (GPT) in main.py --------------------------------------------------------------


def test_gpt_continues_the_title_of_the_paper():
    """main.init_gpt(rng, num_symbols, num_layers, d_model, num_heads, d_ff) makes embedding and encoder.

    main.gpt(params, tokens) (..., n) -> logits (..., n, s) of the tokens after them, by a causal encoder.
    main.gpt_loss(params, tokens) is the cross-entropy of each token after the first, given those before.
    """
    tokens = np.array([main.SYMBOLS.index(symbol) for symbol in "Attention Is All You Need"])
    params = jax.jit(lambda: main.init_gpt(jax.random.key(0), len(main.SYMBOLS), 1, 32, 1, 64))()
    logits = jax.jit(main.gpt)(params, tokens)
    assert logits.shape == (25, len(main.SYMBOLS))
    np.testing.assert_allclose(jax.jit(main.gpt)(params, tokens[:10]), logits[:10], atol=1e-5)  # it is causal

    @jax.jit
    def train_step(params, moments, step):
        return main.adam(params, moments, jax.grad(main.gpt_loss)(params, tokens), step, 0.003)

    moments = main.init_adam(params)
    for step in range(1, 301):
        params, moments = train_step(params, moments, step)
    written = tokens[:3]
    while len(written) < len(tokens):
        written = np.append(written, np.argmax(main.gpt(params, written)[-1]))
    assert main.as_text(written) == main.as_text(tokens)  # a target that is off by one writes something else


# ---- 7. Rotary positions in attention.py (arXiv 2104.09864) ----------------------------------------------------------


def test_rotary_makes_scores_depend_on_the_distance():
    """attention.rotary(x, start=0) turns x (..., n, k), whose first position is `start`; for query and key alike."""
    query, key = arrays((5, 8), (5, 8))

    def scores(query_start, key_start):
        return attention.rotary(query, query_start) @ attention.rotary(key, key_start).T

    np.testing.assert_allclose(attention.rotary(query)[0], query[0], atol=1e-6)  # position 0 is not turned
    np.testing.assert_allclose(scores(7, 7), scores(0, 0), atol=1e-4)  # all positions shifted: no score changes
    assert (abs(scores(0, 7) - scores(0, 0)) > 1e-3).all()  # the keys alone shifted: each of them does
    lengths = (jnp.linalg.norm(x, axis=-1) for x in (attention.rotary(query, 3), query))
    np.testing.assert_allclose(*lengths, rtol=1e-5)


# ---- 8. Grouped-query attention in transformer_layer.py (arXiv 2305.13245) -------------------------------------------


def test_grouped_query_attention_is_that_of_jax_nn():
    """init_multi_head_attention(rng, d_model, num_heads, num_key_heads) makes key and value (d, num_key_heads, k).

    multi_head_attention needs no new argument. Query heads 0, 1, ... share key head 0, the next ones key head 1.
    """
    params = random_params(tl.init_multi_head_attention, 12, 6, 2)
    assert [params[name].shape for name in ("query", "key", "value")] == [(12, 6, 2), (12, 2, 2), (12, 2, 2)]
    x, memory = arrays((3, 5, 12), (3, 7, 12))
    query, key, value = (  # jax.nn has heads after positions, and takes fewer heads of keys and values
        jnp.einsum("bnd,dhk->bnhk", inputs, params[name])
        for name, inputs in (("query", x), ("key", memory), ("value", memory))
    )
    heads = jax.nn.dot_product_attention(query, key, value)
    expected = jnp.einsum("bnhv,hvd->bnd", heads, params["output"])
    np.testing.assert_allclose(tl.multi_head_attention(params, x, memory, memory), expected, atol=1e-5)


# ---- 9. A cache of keys and values in main.py ------------------------------------------------------------------------


def test_cache_writes_the_same_and_costs_less():
    """main.init_cache(params, memory, length) holds what one step leaves to the next: keys and values.

    main.decode_step(params, cache, token, i) takes the token (...,) at position i and returns the logits (..., s) of
    the next one, and the cache. Per step and position of the cache, attention multiplies 4 d_model numbers in each
    layer. To compute keys and values of all positions again would take 4 d_model^2 more.
    """
    d_model, layers = 64, 2
    params = random_params(main.init_model, 11, layers, d_model, 2, 128)
    source = np.array([3, 1, 4, 1, 5, 9])
    memory = jax.jit(lambda params: tl.encoder(params["encoder"], main.embed(params, source)))(params)
    cache, written = main.init_cache(params, memory, 6), [main.START]
    step = jax.jit(main.decode_step)
    for i in range(6):
        logits, cache = step(params, cache, jnp.array(written[-1]), i)
        written.append(int(logits.at[main.START].set(-jnp.inf).argmax()))
    np.testing.assert_array_equal(written[1:], jax.jit(main.generate)(params, source))

    def operations(length):
        cache = jax.eval_shape(lambda: main.init_cache(params, memory, length))
        return step.lower(params, cache, jnp.array(0), 0).cost_analysis()["flops"]

    # XLA counts the layers of a scan once.
    assert operations(2048) - operations(1024) < 1024 * 2 * layers * 4 * d_model


# ---- 10. A sliding window in attention.py ----------------------------------------------------------------------------


def test_window_is_that_of_jax_nn_and_leaves_out_blocks(monkeypatch):
    """flash_attention(..., causal=True, window=w): a query sees the last w keys, its own included.

    Blocks of keys before the window are never computed, forward and backward.
    """
    inputs = arrays((2, 3, 40, 8), (2, 3, 40, 8), (2, 3, 40, 8))

    def witness(query, key, value):
        swapped = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.nn.dot_product_attention(*swapped, is_causal=True, local_window_size=(9, 0)).swapaxes(1, 2)

    def window(query, key, value):
        return attention.flash_attention(query, key, value, causal=True, window=10, block_size=4)

    def gradients(function):
        return jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2))

    np.testing.assert_allclose(jax.jit(window)(*inputs), jax.jit(witness)(*inputs), atol=1e-5)
    for actual, expected in zip(gradients(window)(*inputs), gradients(witness)(*inputs), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)

    computed, block_scores = [], attention._block_scores

    def spy(*arguments, **options):
        computed.append(None)
        return block_scores(*arguments, **options)

    monkeypatch.setattr(attention, "_block_scores", spy)
    with jax.disable_jit():  # without jit, a loop runs in Python
        gradients(window)(*(x[0, 0] for x in inputs))
    # Of ten blocks of queries, each needs at most four of keys: 34 in all, once forward and once backward.
    assert len(computed) <= 2 * 34
