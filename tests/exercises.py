"""The checks of README's exercises 6 to 10. Each fails until its exercise is solved correctly.

    python -m pytest tests/exercises.py -k rotary -s

A plain `pytest` does not collect this file. With -s, it shows the output of the checks that print something.
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

import attention
import main
import transformer_layer as tl
from common import arrays, random_params


def test_gpt_continues_the_title_of_the_paper():
    """Exercise 6. main.init_gpt(rng, vocab_size, num_layers, d_model, num_heads, d_ff) returns embedding and encoder.

    main.gpt(params, tokens) (..., n) -> logits (..., n, s) of the next tokens, from a causal encoder.
    main.gpt_loss(params, tokens) is the mean cross-entropy of each token after the first, given those before it.
    """
    title, symbols = "Attention Is All You Need", "".join(map(chr, range(32, 127)))
    tokens = main.as_tokens(title, 25, symbols)
    params = jax.jit(lambda: main.init_gpt(jax.random.key(0), 96, 1, 32, 1, 64))()
    gpt = jax.jit(main.gpt)
    logits = gpt(params, tokens)
    assert logits.shape == (25, 96)
    np.testing.assert_allclose(gpt(params, tokens[:10]), logits[:10], atol=1e-5)  # it is causal

    correct = jax.nn.log_softmax(logits[:-1])[jnp.arange(24), tokens[1:]]
    np.testing.assert_allclose(jax.jit(main.gpt_loss)(params, tokens), -correct.mean(), rtol=1e-5)

    @jax.jit
    def train_step(params, moments, step):
        return main.adam(params, moments, jax.grad(main.gpt_loss)(params, tokens), step, 0.003)

    def write():
        written = tokens[:3]
        while len(written) < len(tokens):
            written = np.append(written, np.argmax(gpt(params, written)[-1]))
        return main.as_text(written, symbols)

    moments = main.init_adam(params)
    for step in range(1, 301):
        params, moments = train_step(params, moments, step)
        if step in (1, 30, 100, 300):
            print(f'\nstep {step:>3}  "{write()}"', end="")
    assert write() == title  # catches targets that are off by one


def test_rotary_scores_depend_on_the_distance():
    """Exercise 7. attention.rotary(x, start=0) rotates x (..., n, k), a query or key; its first position is `start`.

    You may pair neighbors, as in the paper, or x[..., i] and x[..., i + k / 2]. The angles are as in section 3.5.
    """
    query, key = arrays((2, 5, 8), (2, 5, 8))

    def scores(query_start, key_start):
        return attention.rotary(query, query_start) @ attention.rotary(key, key_start).swapaxes(1, 2)

    np.testing.assert_allclose(attention.rotary(query)[:, 0], query[:, 0], atol=1e-6)  # position 0 is not rotated
    np.testing.assert_allclose(attention.rotary(query)[:, 3:], attention.rotary(query[:, 3:], 3), atol=1e-5)
    np.testing.assert_allclose(scores(7, 7), scores(0, 0), atol=1e-4)  # shifting all positions changes no score
    assert abs(scores(0, 7) - scores(0, 0)).max() > 0.1  # shifting only the keys does
    for starts in ((0, 0), (7, 7), (0, 7)):
        print(f"\nquery from {starts[0]}, keys from {starts[1]}: {np.round(scores(*starts)[0, 0], 3)}", end="")
    norms = (jnp.linalg.norm(x, axis=-1) for x in (attention.rotary(query, 3), query))
    np.testing.assert_allclose(*norms, rtol=1e-5)
    cosines = main.positional_encoding(5, 8)[:, 1::2]  # a pair (1, 1) rotated by t has the sum 2 cos(t)
    np.testing.assert_allclose(attention.rotary(jnp.ones((5, 8))).sum(axis=-1), 2 * cosines.sum(axis=-1), atol=1e-5)


def test_grouped_query_attention_equals_jax_nn():
    """Exercise 8. init_multi_head_attention(rng, d_model, num_heads, num_key_heads=None): key (d, num_key_heads, k).

    multi_head_attention needs no new argument. Consecutive query heads share a key head: here, 0 to 2 share key head 0.
    """
    params = random_params(tl.init_multi_head_attention, 12, 6, 2)
    assert [params[name].shape for name in ("query", "key", "value")] == [(12, 6, 2), (12, 2, 2), (12, 2, 2)]
    x, memory = arrays((3, 5, 12), (3, 7, 12))
    query, key, value = (  # jax.nn has positions before heads, and accepts fewer heads of keys and values
        jnp.einsum("bnd,dhk->bnhk", inputs, params[name])
        for name, inputs in (("query", x), ("key", memory), ("value", memory))
    )
    for mask in (None, attention.padding_mask(jnp.array([7, 3, 5]), 7)):
        heads = jax.nn.dot_product_attention(query, key, value, mask=mask)
        expected = jnp.einsum("bnhv,hvd->bnd", heads, params["output"])
        np.testing.assert_allclose(tl.multi_head_attention(params, x, memory, memory, mask), expected, atol=1e-5)
    print(f"\na KV cache of {2 * key.size} numbers instead of {2 * memory.size}", end="")


def test_beam_search_finds_better_strings():
    """Exercise 9. main.beam_search(params, source, length, beam_size): source (m,) -> best target (length,), and score.

    The score is the sum of log_softmax(logits)[token] over the tokens up to the first END, that one included, or over
    all tokens if there is no END. After END, a target has only ENDs, and its score stays. Works under `jax.jit`.
    """
    vocab_size, length = 5, 4
    params = jax.jit(lambda: main.init_model(jax.random.key(0), vocab_size, 2, 16, 2, 16))()
    params["embedding"] *= 20
    params["decoder"]["feed_forward_norm"]["scale"] *= jnp.array([[1], [-1]])  # otherwise it repeats one token
    generate = jax.jit(main.generate, static_argnums=2)
    beam_search = jax.jit(main.beam_search, static_argnums=(2, 3))

    @jax.jit
    def score(source, target):
        log_probabilities = jax.nn.log_softmax(main.model(params, source, main.shift_right(target)))
        scores = jnp.take_along_axis(log_probabilities, target[:, None], axis=-1)[:, 0]
        return scores[0] + jnp.where(target[:-1].cumprod() != main.END, scores[1:], 0).sum()

    every_string = np.array(list(itertools.product(range(vocab_size), repeat=length)))
    after_end = every_string * (every_string != main.END).cumprod(axis=-1) != every_string
    every_string = every_string[~after_end.any(axis=-1)]
    ended = improved = 0
    for source in np.random.default_rng(0).integers(1, vocab_size, (8, length)):
        greedy = generate(params, source, length)
        narrow, narrow_score = beam_search(params, source, length, 1)
        np.testing.assert_array_equal(narrow, greedy)  # a beam of one is greedy decoding
        np.testing.assert_allclose(narrow_score, score(source, greedy), atol=1e-4)
        scores = jax.vmap(lambda target, source=source: score(source, target))(every_string)
        widest, best_score = beam_search(params, source, length, len(every_string))
        np.testing.assert_array_equal(widest, every_string[scores.argmax()])  # no prefix is ever dropped
        np.testing.assert_allclose(best_score, scores.max(), atol=1e-4)
        found, found_score = beam_search(params, source, length, 4)
        np.testing.assert_allclose(found_score, score(source, found), atol=1e-4)
        assert narrow_score - 1e-4 <= found_score <= best_score + 1e-4
        print(f"\ngreedy {narrow} {narrow_score:.3f}  beam of 4 {found} {found_score:.3f}", end="")
        improved += found_score > narrow_score + 1e-4
        ended += main.END in widest
    assert improved
    assert ended


def test_window_equals_jax_nn_and_skips_blocks(monkeypatch):
    """Exercise 10. flash_attention(..., causal=True, window=w): a query attends to the last w keys, its own included.

    Key blocks before the window are skipped, forward and backward: `_block_scores` is not called for them.
    """
    inputs = arrays((2, 3, 40, 8), (2, 3, 40, 8), (2, 3, 40, 8))

    def reference(query, key, value):
        swapped = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.nn.dot_product_attention(*swapped, is_causal=True, local_window_size=(9, 0)).swapaxes(1, 2)

    def window(query, key, value, window=10, block_size=4):
        return attention.flash_attention(query, key, value, causal=True, window=window, block_size=block_size)

    def gradients(function):
        return jax.grad(lambda *arguments: jnp.square(function(*arguments)).sum(), argnums=(0, 1, 2))

    np.testing.assert_allclose(jax.jit(window)(*inputs), jax.jit(reference)(*inputs), atol=1e-5)
    for actual, expected in zip(*(jax.jit(gradients(f))(*inputs) for f in (window, reference)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)

    computed, block_scores = [], attention._block_scores

    def recording_block_scores(*arguments, **options):
        computed.append(None)
        return block_scores(*arguments, **options)

    with monkeypatch.context() as patch, jax.disable_jit():  # loops run in Python
        patch.setattr(attention, "_block_scores", recording_block_scores)
        gradients(window)(*(x[0, 0] for x in inputs), 9)
    # With a window of 9, each of ten query blocks needs at most three key blocks: 27, once forward, once backward.
    assert 0 < len(computed) <= 2 * 27, f"{len(computed)} blocks are computed, and at most 54 are needed"

    long = arrays((8192, 64), (8192, 64), (8192, 64))
    for width in (8192, 256):
        attend = jax.jit(lambda *qkv, width=width: window(*qkv, width, 256)).lower(*long).compile()
        start = time.perf_counter()
        jax.block_until_ready(attend(*long))
        print(f"\nn = 8,192, window {width:>5,}: {(time.perf_counter() - start) * 1e3:6.1f} ms", end="")
