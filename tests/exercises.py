"""The ten exercises of README. Here are the texts of 1 to 5; those of 6 to 10 are the docstrings of their checks.

Each of these checks fails until its exercise is solved:

    python -m pytest tests/exercises.py -s -k gpt           (or rotary, grouped, beam, window)

A plain `pytest` does not collect this file. With -s, the checks print what they computed. Once you change the model,
other tests fail, as expected. `git restore .` undoes your changes: do this before the next exercise. Exercises 3 and 4
need `pip install torch`.

1. The paper's depth. Run `python main.py --num-layers 6`. Then, in `_init_layers` of transformer_layer.py, divide by 1
   instead of sqrt(2 N), and run it again.
   Check: with the scaling, the average matches 64/64 test strings. Without it, accuracy stays below 20%, and there are
   no exact matches. Why? See the docstring of `init_encoder`.

2. Another task. In main.py, let `task` rotate the string by one character: `string[-1:] + string[:-1]`. Run
   `python main.py`.
   Check: part 4 prints the rotated text, and the average matches 64/64. In part 5, where is the diagonal now?

3. GELU. In `feed_forward` of transformer_layer.py, replace `jax.nn.relu(...)` by
   `jax.nn.gelu(..., approximate=False)`. PyTorch has this activation, too: in tests/data/make_golden.py, change the
   activation in `layer` to "gelu", and run the script, which writes new golden data.
   Check: tests/test_pytorch.py passes. tests/test_paper.py fails in sections 3.1, 3.3, 3.4 and 5.4: the paper has ReLU.

4. Pre-norm. In `encoder_layer` and `decoder_layer`, compute x + Sublayer(LayerNorm(x)) instead of
   LayerNorm(x + Sublayer(x)), with dropout where it was, on the output of the sub-layer. Do not normalize `memory`, and
   do not add GPT-2's final LayerNorm. In tests/data/make_golden.py, set `norm_first` in `layer` to True, and run it.
   Check: tests/test_pytorch.py passes. tests/test_paper.py fails in sections 3.1, 3.4 and 5.4: the paper has post-norm.

5. Learned positions. In `init_model` of main.py, split the key in four, and add the entry
   `"positions": 0.02 * jax.random.normal(rngs[3], (256, d_model))`. In `embed`, use its first n rows instead of
   `positional_encoding`, and add them to the embeddings before the multiplication by sqrt(d_model). Run
   `python main.py`, then once more without any positions.
   Check: part 3 ends above 95%, and without positions below 30%. Why? With learned positions, tests/test_paper.py fails
   in sections 3.4 and 6.2: there is one more array of parameters.
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
    """Exercise 6: a GPT, a decoder-only model. It learns the title of the paper by heart.

    In main.py, write three functions:

        init_gpt(rng, vocab_size, num_layers, d_model, num_heads, d_ff)
        gpt(params, tokens)         tokens (..., n) -> logits (..., n, s) of the next token, at each position
        gpt_loss(params, tokens)    mean cross-entropy of each token after the first, given those before it -> ()

    `init_gpt` returns a dict with the keys "embedding" and "encoder", both as in `init_model`. `gpt` consists of
    `embed`, `encoder` with causal=True, and the product with the embedding, as in `model`. There is no `shift_right`:
    the logits at position i score token i + 1. There is no padding, no dropout and no label smoothing.
    """
    title, symbols = "Attention Is All You Need", "".join(map(chr, range(32, 127)))
    tokens = main.as_tokens(title, 25, symbols)
    params = jax.jit(lambda: main.init_gpt(jax.random.key(0), 96, 1, 32, 1, 64))()
    assert set(params) == {"embedding", "encoder"}
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
    """Exercise 7: rotary positions (RoPE, arXiv 2104.09864). A score depends only on the distance between positions.

    In attention.py, write `rotary(x, start=0)`, which rotates queries or keys x (..., n, k) -> (..., n, k). Their
    positions are start, start + 1, ... Cut the k dimensions into k / 2 pairs. At position pos, rotate pair i by the
    angle of section 3.5, pos / 10000^(2i / k): (a, b) becomes (a cos - b sin, a sin + b cos). Pair i is either
    neighbors, x[..., 2i] and x[..., 2i + 1], as in the RoPE paper, or x[..., i] and x[..., i + k / 2], as in GPT-NeoX.
    """
    query, key = arrays((2, 5, 8), (2, 5, 8))

    def scores(query_start, key_start):
        return attention.rotary(query, query_start) @ attention.rotary(key, key_start).swapaxes(1, 2)

    np.testing.assert_allclose(attention.rotary(query)[:, 0], query[:, 0], atol=1e-6)  # position 0 is not rotated
    np.testing.assert_allclose(attention.rotary(query)[:, 3:], attention.rotary(query[:, 3:], 3), atol=1e-5)
    np.testing.assert_allclose(scores(7, 7), scores(0, 0), atol=1e-4)  # shifting all positions changes no score
    assert abs(scores(0, 7) - scores(0, 0)).max() > 0.1  # shifting only the keys does
    for starts in ((0, 0), (7, 7), (0, 7)):
        first_row = np.asarray(scores(*starts)[0, 0], np.float64).round(3)
        print(f"\nquery from {starts[0]}, keys from {starts[1]}: {first_row}", end="")
    norms = (jnp.linalg.norm(x, axis=-1) for x in (attention.rotary(query, 3), query))
    np.testing.assert_allclose(*norms, rtol=1e-5)
    cosines = main.positional_encoding(5, 8)[:, 1::2]  # a pair (1, 1) rotated by t has the sum 2 cos(t)
    np.testing.assert_allclose(attention.rotary(jnp.ones((5, 8))).sum(axis=-1), 2 * cosines.sum(axis=-1), atol=1e-5)


def test_grouped_query_attention_equals_jax_nn_and_needs_a_smaller_cache():
    """Exercise 8: grouped-query attention (arXiv 2305.13245). With fewer key heads, the KV cache is smaller.

    In transformer_layer.py, let `init_multi_head_attention(rng, d_model, num_heads, num_key_heads=None)` return key and
    value (d, num_key_heads, k); None means num_heads. No other function needs a new argument, because all read the
    number of heads from the shapes. `init_encoder_layer` need not pass num_key_heads on: the check makes its own model.

    Consecutive query heads share a key head: with 6 query heads and 2 key heads, query heads 0 to 2 use key head 0.
    `multi_head_attention` stays as it is: it passes query (..., 6, n, k), key (..., 2, m, k) and value (..., 2, m, v)
    to `attention`. In attention.py, let `_checked`, which every attention function calls, repeat key and value with
    `jnp.repeat(..., axis=-3)` if all three have a head axis and query has more heads. `generate` then stores few heads,
    and repeats them only to attend. Repeated earlier, in `multi_head_attention`, they would not fit its cache.
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

    # A whole model with two key heads computes the same as a model in which each of them occurs three times.
    init = jax.jit(lambda: main.init_model(jax.random.key(4), 11, 2, 12, 6, 20))
    few, repeated = init(), init()
    for model in (few, repeated):
        model["embedding"] *= 20
        model["decoder"]["feed_forward_norm"]["scale"] *= jnp.array([[1], [-1]])  # otherwise it repeats one token
    for stack, sublayer in (("encoder", "self"), ("decoder", "self"), ("decoder", "cross")):
        for name in ("key", "value"):
            two_heads = few[stack][f"{sublayer}_attention"][name][:, :, :2]  # (l, d, h, k)
            few[stack][f"{sublayer}_attention"][name] = two_heads
            repeated[stack][f"{sublayer}_attention"][name] = jnp.repeat(two_heads, 3, axis=2)
    source = np.array([[3, 1, 4, 1, 5], [9, 2, 6, main.END, main.END]])
    generate = jax.jit(main.generate, static_argnums=2)
    generated = generate(few, source, 7)
    assert len(np.unique(generated)) > 3
    np.testing.assert_array_equal(generated, generate(repeated, source, 7))
    sizes = []
    for params in (few, repeated):
        cache = jax.eval_shape(lambda params=params: main.init_cache(params, main.encode(params, source)[0], 7))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(cache)))
    assert 3 * sizes[0] == sizes[1]
    print(f"\na KV cache of {sizes[0]:,} numbers instead of {sizes[1]:,}", end="")


def test_beam_search_finds_better_strings():
    """Exercise 9: beam search (section 6.1). It often finds a more likely target than greedy decoding.

    In main.py, write `beam_search(params, source, length, beam_size)`: one source (m,) -> the best target (length,) and
    its score (). It works under `jax.jit`, where length and beam_size are static.

    The score is the sum of log_softmax(logits)[token] over the tokens up to and including the first END, or over all
    tokens if there is no END, without the length penalty of the paper. After END, a target has only ENDs, and its score
    stays. A beam is a target written up to position i. In each of `length` steps, extend each beam by each token of the
    vocabulary, and keep the beam_size best results: `jax.lax.top_k` of the flattened (beam_size, s) scores. Start with
    one beam of score 0 and the others at -infinity; otherwise all beams stay equal. You need no KV cache:
    `model(params, source, shift_right(targets))` accepts source (m,) with targets (beam_size, length).
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
    """Exercise 10: a sliding window, as in Longformer (arXiv 2004.05150). For a fixed window, time is linear in n.

    In attention.py, let `flash_attention(..., causal=True, window=w)` attend only to the last w keys, the query's own
    included: a query at position i attends to keys i - w + 1 to i. By default, window is None: to all keys up to i.
    Pass `window` to `_flash`, `_forward` and `_backward` as a static argument, like `causal`, and mask earlier keys in
    `_block_scores`. Key blocks before the window are skipped, forward and backward: both loops over j start at the
    first block that the first query of block i attends to.
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
