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
    main.gpt_loss(params, tokens) is the mean cross-entropy of each token after the first, given those before.
    """
    tokens = np.array([main.SYMBOLS.index(symbol) for symbol in "Attention Is All You Need"])
    params = jax.jit(lambda: main.init_gpt(jax.random.key(0), len(main.SYMBOLS), 1, 32, 1, 64))()
    logits = jax.jit(main.gpt)(params, tokens)
    assert logits.shape == (25, len(main.SYMBOLS))
    np.testing.assert_allclose(jax.jit(main.gpt)(params, tokens[:10]), logits[:10], atol=1e-5)  # it is causal

    wanted = jax.nn.log_softmax(logits[:-1])[jnp.arange(24), tokens[1:]]
    np.testing.assert_allclose(jax.jit(main.gpt_loss)(params, tokens), -wanted.mean(), rtol=1e-5)

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
    """attention.rotary(x, start=0) turns x (..., n, k), whose first position is `start`; for query and key alike.

    Which elements of x make a pair is free: neighbours as in the paper, or x[..., i] and x[..., i + k / 2]. The angles
    are those of section 3.5.
    """
    query, key = arrays((2, 5, 8), (2, 5, 8))

    def scores(query_start, key_start):
        return attention.rotary(query, query_start) @ attention.rotary(key, key_start).swapaxes(1, 2)

    np.testing.assert_allclose(attention.rotary(query)[:, 0], query[:, 0], atol=1e-6)  # position 0 is not turned
    np.testing.assert_allclose(attention.rotary(query)[:, 3:], attention.rotary(query[:, 3:], 3), atol=1e-5)
    np.testing.assert_allclose(scores(7, 7), scores(0, 0), atol=1e-4)  # all positions shifted: no score changes
    assert abs(scores(0, 7) - scores(0, 0)).max() > 0.1  # the keys alone shifted: they do
    lengths = (jnp.linalg.norm(x, axis=-1) for x in (attention.rotary(query, 3), query))
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    cosines = main.positional_encoding(5, 8)[:, 1::2]  # a pair (1, 1) turned by t has the sum 2 cos(t)
    np.testing.assert_allclose(attention.rotary(jnp.ones((5, 8))).sum(axis=-1), 2 * cosines.sum(axis=-1), atol=1e-5)


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
    for mask in (None, attention.padding_mask(jnp.array([7, 3, 5]), 7)):
        heads = jax.nn.dot_product_attention(query, key, value, mask=mask)
        expected = jnp.einsum("bnhv,hvd->bnd", heads, params["output"])
        np.testing.assert_allclose(tl.multi_head_attention(params, x, memory, memory, mask), expected, atol=1e-5)


# ---- 9. A cache of keys and values in main.py ------------------------------------------------------------------------


def test_cache_gives_the_same_logits_and_costs_less():
    """main.init_cache(params, memory, length) holds what a step finds done: keys and values of memory and of tokens.

    main.decode_step(params, cache, token, i) takes the token (...,) at position i and returns the logits (..., s) of
    the next one, and the cache. For each position of the cache, and for each of memory, an attention then takes
    4 d_model operations in a layer. To compute keys and values of all positions again would take 4 d_model^2 more.
    """
    d_model, layers = 64, 2
    params = jax.jit(lambda: main.init_model(jax.random.key(0), 11, layers, d_model, 2, 128))()  # positions matter
    source = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    target = np.array([[main.START, 2, 7, 1, 8, 2], [main.START, 1, 4, 1, 4, 2]])
    memory = jax.jit(lambda params: tl.encoder(params["encoder"], main.embed(params, source)))(params)
    expected, step = jax.jit(main.model)(params, source, target), jax.jit(main.decode_step)
    cache = main.init_cache(params, memory, 6)
    for i in range(6):
        logits, cache = step(params, cache, target[:, i], i)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-4)

    def operations(length):
        memory = jnp.zeros((length, d_model))
        cache = jax.eval_shape(lambda: main.init_cache(params, memory, length))
        return step.lower(params, cache, jnp.array(0), 0).cost_analysis()["flops"]

    # Two attentions. Twice their operations leave room for softmax and mask. XLA counts the layers of a scan once.
    assert operations(2048) - operations(1024) < 1024 * 2 * layers * 2 * 4 * d_model


# ---- 10. A sliding window in attention.py ----------------------------------------------------------------------------


def test_window_is_that_of_jax_nn_and_leaves_out_blocks(monkeypatch):
    """flash_attention(..., causal=True, window=w): a query sees the last w keys, its own included.

    Blocks of keys before the window are never computed, forward and backward: `_block_scores` is not called for them.
    """
    inputs = arrays((2, 3, 40, 8), (2, 3, 40, 8), (2, 3, 40, 8))

    def witness(query, key, value):
        swapped = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.nn.dot_product_attention(*swapped, is_causal=True, local_window_size=(9, 0)).swapaxes(1, 2)

    def window(query, key, value, window=10):
        return attention.flash_attention(query, key, value, causal=True, window=window, block_size=4)

    def gradients(function):
        return jax.grad(lambda *arguments: jnp.square(function(*arguments)).sum(), argnums=(0, 1, 2))

    np.testing.assert_allclose(jax.jit(window)(*inputs), jax.jit(witness)(*inputs), atol=1e-5)
    for actual, expected in zip(*(jax.jit(gradients(f))(*inputs) for f in (window, witness)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)

    computed, block_scores = [], attention._block_scores

    def spy(*arguments, **options):
        computed.append(None)
        return block_scores(*arguments, **options)

    monkeypatch.setattr(attention, "_block_scores", spy)
    with jax.disable_jit():  # without jit, a loop runs in Python
        gradients(window)(*(x[0, 0] for x in inputs), 9)
    # With a window of 9, each of ten blocks of queries needs at most three of keys: 27, once forward, once backward.
    assert 0 < len(computed) <= 2 * 27, f"{len(computed)} blocks are computed, and at most 54 are needed"
