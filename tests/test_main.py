"""main.py: the model of Figure 1, its training, its data, and the program as a user runs it."""

import io
import re
import signal
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import main
import transformer_layer as tl
from common import arrays, cpu_mesh, finished, many_devices, placed, random_params, run_here, start

TEXT = "Never odd or even, 1234"
SMALL = ["--d-model", "16", "--num-heads", "2", "--d-ff", "24", "--batch-size", "8", "--steps", "7"]

# ---- The model -------------------------------------------------------------------------------------------------------

SIZES = 11, 2, 8, 2, 16  # vocab_size, layers, d_model, heads, d_ff
SOURCE, TARGET = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.array([[2, 7, 1], [8, 2, 8]])
# Sources of lengths 5, 2, 0 and 2, and targets of lengths 3, 1, 0 and 1, padded with END = 0.
SOURCES = np.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0], [0, 0, 0, 0, 0], [6, 6, 0, 0, 0]])
TARGETS = np.array([[2, 7, 1, 0], [8, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]])


@pytest.fixture(scope="module")
def params():
    """The parameters of a small model, normally distributed."""
    return random_params(main.init_model, *SIZES)


def test_empty_targets(params):
    """Targets of length 0 remain empty; their loss is a mean of nothing: NaN."""
    assert main.shift_right(np.zeros((2, 0), int)).shape == (2, 0)
    assert np.isnan(jax.jit(main.loss)(params, SOURCE, np.zeros((2, 0), int)))


def outcome(params, source, target):
    """Logits, attention weights, loss, and generated tokens: all that the model computes."""
    return {
        "logits": main.model(params, source, main.shift_right(target)),
        "weights": main.cross_attention_weights(params, source, target),
        "loss": main.loss(params, source, target),
        "generated": main.generate(params, source, 6),
    }


@jax.jit
def outcome_and_gradient(params, source, target):
    """All that the model computes, and the gradient of the loss."""
    return {**outcome(params, source, target), "gradient": jax.grad(main.loss)(params, source, target)}


def assert_same(actual, expected):
    """Compares two pytrees, leaf by leaf."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), actual, expected)


@pytest.fixture
def params64():
    """The parameters in float64, in which padding changes nothing beyond 1e-12."""
    with jax.enable_x64(True):
        yield random_params(main.init_model, *SIZES, dtype=np.float64)


@pytest.mark.parametrize("token", [0, 2])
def test_nothing_after_end_changes_anything(params64, token):
    """Tokens after the first END, and more padding, change nothing but later logits. Here on 8 devices, if possible."""
    expected = outcome_and_gradient(params64, SOURCES, TARGETS)
    source, target = (np.pad(tokens, [(0, 0), (0, 3)]) for tokens in (SOURCES, TARGETS))
    after_source, after_target = (np.cumsum(tokens == main.END, axis=1) > 1 for tokens in (source, target))
    source[after_source] = target[after_target] = token
    mesh = cpu_mesh(4, 2) if len(jax.devices("cpu")) >= 8 else cpu_mesh(1, 1)
    actual = outcome_and_gradient(*placed(mesh, params64, source, target))
    assert not np.any(actual["weights"][..., 5:])
    actual["logits"] = np.asarray(actual["logits"])[~after_target]
    expected["logits"] = expected["logits"][~after_target[:, :4]]
    actual["weights"] = actual["weights"][..., :4, :5]
    assert_same(actual, expected)


def test_a_batch_of_mixed_lengths_equals_each_string_alone(params64):
    """Each result of a batch equals that of the string alone, without padding.

    The parameters are NumPy arrays, as from `np.load`, and the tokens of the batch are lists, also inside jit.
    """
    batch, total = jax.jit(lambda: outcome(params64, SOURCES.tolist(), TARGETS.tolist()))(), 0
    for i, (m, n) in enumerate([(5, 4), (2, 2), (0, 1), (2, 2)]):  # lengths, with END in the target
        alone = jax.jit(outcome)(params64, SOURCES[i, :m], TARGETS[i, :n])
        assert_same(batch["logits"][i, :n], alone["logits"])
        assert_same(batch["weights"][i, :, :n, :m], alone["weights"])
        np.testing.assert_array_equal(batch["generated"][i], alone["generated"])
        total += n * alone["loss"]
    np.testing.assert_allclose(batch["loss"], total / 9, rtol=1e-12)  # the mean over all 9 tokens


def test_dropout_differs_between_sublayers_layers_and_stacks(params, monkeypatch):
    """Each sum of embeddings and positions, and each sub-layer of each layer, drops with its own random key."""
    keys = []

    def recording_dropout(rng, x, rate):
        jax.debug.callback(lambda data: keys.append(tuple(np.ravel(data).tolist())), jax.random.key_data(rng))
        return x

    monkeypatch.setattr(tl, "dropout", recording_dropout)
    monkeypatch.setattr(main, "dropout", recording_dropout)
    main.model(params, SOURCE, TARGET, dropout_rng=jax.random.key(0))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 + 2 * (2 + 3)


@pytest.mark.parametrize(
    ("lead", "length", "layers", "heads", "dtype"),
    [((), 1, 1, 1, jnp.float32), ((3,), 7, 2, 2, jnp.float32), ((4, 8), 5, 3, 4, jnp.bfloat16)],
)
def test_generate_equals_the_algorithm_in_its_docstring(lead, length, layers, heads, dtype):
    """The KV cache changes no token, for sources of mixed lengths, and for outputs longer and shorter than they are.

    With a bfloat16 embedding and float32 layers, the cache is float32. The source is uint8; some tokens of the output
    are above 255.
    """
    params = jax.jit(lambda: main.init_model(jax.random.key(0), 300, layers, 32, heads, 16))()
    params["embedding"] = (20 * params["embedding"]).astype(dtype)
    scale = params["decoder"]["feed_forward_norm"]["scale"]
    params["decoder"]["feed_forward_norm"]["scale"] = scale.at[-1].set(-1)  # otherwise it repeats one token
    source = np.random.default_rng(1).integers(-50, 256, (*lead, 5)).clip(main.END).astype(np.uint8)
    code = re.search(r"\n\n( +for i in range.*?)\n\n", main.generate.__doc__, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    names = {"params": params, "source": source, "length": length, "target": jnp.zeros((*lead, length), int)}
    names |= {"model": jax.jit(main.model), "shift_right": main.shift_right}
    exec(textwrap.dedent(code), names)
    expected = names["target"] * (names["target"] != main.END).cumprod(axis=-1)
    target = jax.jit(main.generate, static_argnums=2)(params, source, length)
    np.testing.assert_array_equal(target, expected)
    assert target.dtype == jnp.int32
    with jax.enable_x64(True):  # JAX's default integer dtype is int64 here
        assert jax.eval_shape(lambda: main.generate(params, source, length)).dtype == jnp.int64
    if length > 1:  # make sure that tokens differ, and that some outputs end early
        assert len(np.unique(target)) > 3
        assert np.max(target) > 255
        assert (np.asarray(target)[..., -1] == main.END).any()


def test_the_cost_of_a_step_of_generate():
    """With the KV cache, a step attends from one position, projects only that one, and copies nothing.

    XLA counts the operations of a loop's body once. Its plan of the memory shows copies of the cache.
    """
    d_model, num_layers = 64, 3
    params = jax.eval_shape(lambda: main.init_model(jax.random.key(0), 11, num_layers, d_model, 2, 128))

    def compiled(function, m):
        source = jax.ShapeDtypeStruct((m,), jnp.int32)
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.jit(function).lower(params, source).compile()

    def flops_of_a_step(m, n):
        def before_the_loop(params, source):
            memory, mask = main.encode(params, source)
            return main.init_cache(params, memory, n), mask

        both = compiled(lambda params, source: main.generate(params, source, n), m)
        return both.cost_analysis()["flops"] - compiled(before_the_loop, m).cost_analysis()["flops"]

    shortest = flops_of_a_step(128, 128)
    assert 0 < flops_of_a_step(128, 256) < 2.1 * shortest
    # In cross-attention, a step multiplies one query with m keys, and m weights with m values. It does not project m
    # positions of memory, which takes 4 m d_model^2.
    products = 4 * 128 * d_model
    assert products <= flops_of_a_step(256, 128) - shortest < 1.5 * products

    def memory(n):
        return compiled(lambda params, source: main.generate(params, source, n), 4).memory_analysis().temp_size_in_bytes

    cache = 2 * 1024 * num_layers * d_model * 4  # keys and values of 1,024 positions, in float32
    assert cache <= memory(2048) - memory(1024) < 2 * cache


def test_cross_attention_weights_are_those_of_the_last_layer(params):
    """The weights times the values are what the last cross-attention outputs: they lead to the logits of the model."""

    @jax.jit
    def weights_and_logits(params):
        weights = main.cross_attention_weights(params, SOURCES, TARGETS)
        memory, mask = main.encode(params, SOURCES)
        first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], params["decoder"]) for i in range(2))
        x = main.embed(params, main.shift_right(TARGETS))
        x = tl.decoder_layer(first, x, memory, memory_mask=mask)
        self_attention = tl.multi_head_attention(last["self_attention"], x, x, x, causal=True)
        x = tl.layer_norm(last["self_attention_norm"], x + self_attention)
        values = jnp.einsum("...md,dhv->...hmv", memory, last["cross_attention"]["value"])
        cross_attention = jnp.einsum("...hnv,hvd->...nd", weights @ values, last["cross_attention"]["output"])
        x = tl.layer_norm(last["cross_attention_norm"], x + cross_attention)
        x = tl.layer_norm(last["feed_forward_norm"], x + tl.feed_forward(last["feed_forward"], x))
        return weights, x @ params["embedding"].T, main.model(params, SOURCES, main.shift_right(TARGETS))

    weights, logits, expected = weights_and_logits(params)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal((weights > 0)[:, 0, 0], np.arange(5) < [[5], [2], [0], [2]])


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "x64"), [(jnp.bfloat16, False), (jnp.float32, True)])
@pytest.mark.parametrize("step", [3, np.int64(3), np.array(3), jnp.int32(3)], ids=lambda x: str(type(x)))
def test_training_keeps_dtypes(params, step, dtype, x64):
    """Parameters and moments keep their dtypes, whatever kind of number the step is."""
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        state = params, main.init_adam(params)
        *new, _ = jax.eval_shape(lambda *state: main.train_step(*state, step, SOURCE, SOURCE, 100), *state)
        assert jax.tree.map(lambda leaf: leaf.dtype, tuple(new)) == jax.tree.map(lambda leaf: leaf.dtype, state)
        assert jax.eval_shape(main.embed, params, SOURCE).dtype == dtype
        assert jax.eval_shape(main.loss, params, SOURCE, TARGET).dtype == jnp.float32


def test_half_precision_in_a_scan(params):
    """`adam` and `average` can be the body of `jax.lax.scan`: moments keep their dtype, and means are in float32."""
    checkpoints = arrays((75, 100), dtype=jnp.bfloat16)[0] + 3
    mean, _ = jax.lax.scan(
        lambda mean, checkpoint_and_count: (main.average(mean, *checkpoint_and_count), None),
        main.average(checkpoints[0], checkpoints[0], 1),
        (checkpoints[1:], jnp.arange(2, 76)),
    )
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, checkpoints.astype(jnp.float32).mean(axis=0), rtol=1e-5)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    adam = lambda state, i: (main.adam(*state, params, i, 0.01), None)  # noqa: E731 - the gradient is in float32
    jax.eval_shape(lambda *state: jax.lax.scan(adam, state, jnp.arange(1, 4)), half, main.init_adam(half))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"must be even \(sines and cosines come in pairs\), got 5", lambda p: main.positional_encoding(4, 5)),
        ("vocab_size must be at least 1, got 0", lambda p: main.init_model(jax.random.key(0), 0, 2, 8, 2, 16)),
        (r"length must be a Python int of at least 1 \(.*\), got 0", lambda p: main.generate(p, SOURCE, 0)),
        (r"length must be .* got 2\.0", lambda p: main.generate(p, SOURCE, 2.0)),
        (r"length must be .* got np\.int64\(2\)", lambda p: main.generate(p, SOURCE, np.int64(2))),
        ("at most 5 characters, all from ' ab', got 'aaaaaa'", lambda p: main.as_tokens(["a", "aaaaaa"], 5, " ab")),
        ("at most 5 characters, all from ' ab', got 'ac'", lambda p: main.as_tokens(["a", "ac"], 5, " ab")),
        (r"all from ' ab', got 'a\\x00'", lambda p: main.as_tokens(["a", "a\0"], 5, " ab")),
    ],
)
def test_bad_arguments(params, message, call):
    """An invalid argument of a function raises one error that names it, its value, and what it must be."""
    with pytest.raises(ValueError, match=message):
        call(params)


def global_norm(tree):
    """The Euclidean norm of all numbers of a pytree."""
    return np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64))


@pytest.mark.parametrize("norm", [0.0, 3e-4, 0.27, 5.0, 500.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_clipping(norm, dtype):
    """A gradient of norm 5 gets norm 0.3. One of norm 0.3 or less stays. The direction and the dtypes stay, too.

    The norm is computed in float32: in float16, 400^2 overflows.
    """
    unit = {"a": jnp.array([0.6, 0.0]), "b": [jnp.array([[0.8]], dtype), jnp.zeros((0, 2))]}
    gradient = jax.tree.map(lambda leaf: (norm * leaf).astype(leaf.dtype), unit)
    clipped = jax.jit(main.clip)(gradient)
    for actual, leaf in zip(jax.tree.leaves(clipped), jax.tree.leaves(gradient), strict=True):
        assert actual.dtype == leaf.dtype
        expected = 0.3 / max(norm, 0.3) * leaf.astype(float)
        np.testing.assert_allclose(actual.astype(float), expected, rtol=3 * float(jnp.finfo(dtype).eps))


def test_the_first_training_step(params):
    """Adam's first step moves each parameter by the learning rate, against the sign of its gradient.

    Its moments are 0.1 g and 0.02 g^2, where g is the gradient of the loss, scaled to norm 0.3. The loss is that of
    before the step. A dropout rate of 0 is no dropout, and the key decides what drops.
    """
    plain, gradient = jax.device_get(jax.jit(jax.value_and_grad(main.loss))(params, SOURCES, TARGETS))
    norm = global_norm(gradient)
    assert norm > 1
    train_step = jax.jit(main.train_step)

    def step(seed, rate):
        options = {"dropout_rng": jax.random.key(seed), "dropout_rate": rate}
        return jax.device_get(train_step(params, main.init_adam(params), 1, SOURCES, TARGETS, 600, **options))

    new, moments, value = step(0, 0.0)
    rate = 8**-0.5 * 600**-1.5
    for old, p, m, v, g in zip(*map(jax.tree.leaves, (params, new, moments["m"], moments["v"], gradient)), strict=True):
        g = g * (0.3 / norm)
        np.testing.assert_allclose(m, 0.1 * g, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(v, 0.02 * g**2, rtol=1e-4, atol=1e-12)
        clear = abs(g) > 1e-6  # larger than the error of the gradient
        np.testing.assert_allclose((p - old)[clear], -rate * np.sign(g)[clear], rtol=0.01)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    dropped = [step(seed, 0.3)[-1] for seed in (1, 1, 2)]
    assert dropped[0] == dropped[1]
    assert min(abs(dropped[0] - plain), abs(dropped[0] - dropped[2])) > 1e-4


# ---- The data --------------------------------------------------------------------------------------------------------


def test_random_pairs_are_reversed():
    """The default task: strings of one length, with at most 8 different symbols each, and the same strings reversed."""
    pairs = main.random_pairs(np.random.default_rng(0), 100, 30)
    assert pairs.shape == (100, 2)
    for source, target in pairs:
        assert target == main.task(source) == source[::-1]
        assert len(source) == 30
        assert 2 < len(set(source)) <= 8
    assert set("".join(pairs.flat)) == set(map(chr, range(32, 127)))


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_tokens_and_text(shape):
    """Token i is symbol i - 1; strings are padded with END. `as_text` reads up to the first END."""
    strings = np.array("é ab", dtype="<U9") if shape == () else np.resize(np.array(["", "é ab", " ", "b"]), shape)
    tokens = main.as_tokens(strings, 5, " abé")
    assert tokens.shape == (*shape, 5)
    np.testing.assert_array_equal(main.as_tokens("é ab", 5, " abé"), [4, 1, 2, 3, main.END])
    for string, row in zip(strings.flat, tokens.reshape(-1, 5), strict=True):
        assert main.as_text(row, " abé") == string
    assert main.as_text([2, 0, 3], " abé") == "a"
    assert main.as_tokens([], 5, "ab").shape == (0, 5)


def test_read_pairs(tmp_path):
    """A byte order mark, CRLF, blank lines, further columns, empty strings, quotes, # and any letters are fine.

    So are 100 characters. A line with nothing but a tab is blank, and only "\\n" ends a line.
    """
    file = tmp_path / "pairs.tsv"
    file.write_bytes('\ufeffa b\tc\r\n\r\n  \n#\t"q" \tmore\tcolumns\n\tempty\nñ\u00a0日本\t\n\t\nlong\t'.encode())
    with file.open("a", encoding="utf-8") as lines:
        lines.write(100 * "x" + "\nlast\tli\u2028ne")
    expected = [["a b", "c"], ["#", '"q" '], ["", "empty"], ["ñ\u00a0日本", ""]]
    expected += [["long", 100 * "x"], ["last", "li\u2028ne"]]
    assert main.read_pairs(file).tolist() == expected


@pytest.mark.parametrize(("distinct", "count"), [(2, 1), (19, 1), (20, 2), (639, 63), (700, 64)])
def test_no_test_source_occurs_in_training(distinct, count):
    """A tenth of the sources, at most 64, are for the test, TEXT first. Training has all pairs of the others.

    Sources repeat, with other targets: the last one is the answer. An empty source is never tested.
    """
    sources = ["", *(f"{i}" for i in range(1, distinct))]
    pairs = np.array([(source, f"{target}{source}") for target in "ab" for source in sources])
    drawn = set()
    for seed, text in enumerate(10 * ["1", "a new one", ""]):
        test, training = main.hold_out(np.random.default_rng(seed), pairs, text)
        assert len({source for source, _ in test}) == len(test) == count
        assert (test[0, 0] == text) == (text == "1")
        assert all(source and answer == f"b{source}" for source, answer in test)
        held_out = set(test[:, 0])
        assert training.tolist() == [pair for pair in pairs.tolist() if pair[0] not in held_out]
        drawn.add(tuple(test[-1]))
    assert distinct < 20 or len(drawn) > 10  # random


def parsed(*flags, pairs=None):
    """The arguments of a command line."""
    args = main.argument_parser().parse_args(flags)
    args.pairs = pairs
    return args


def test_the_data_of_a_file():
    """Symbols are those of FILE, sorted. Without a TEXT, it is a random source of the test pairs, never empty."""
    pairs = np.array([("", "x"), *((chr(1000 - i), f"{i}") for i in range(40))])
    texts = set()
    for seed in range(10):
        text, symbols, test, training = main.make_data(parsed(pairs=pairs), np.random.default_rng(seed))
        assert (text, symbols) == (test[0, 0], "".join(sorted(set("".join(pairs.flat)))))
        assert (len(test), len(training)) == (4, 37)
        texts.add(text)
    assert len(texts) > 5
    assert "" not in texts


def test_the_default_data(monkeypatch):
    """64 random strings, TEXT first, and 20,000 others, which --seed determines. Short strings are in both."""
    data = []
    monkeypatch.setattr(main, "run", lambda args, generator, mesh, *arguments: data.append(arguments))
    for seed in "001":
        run_here(monkeypatch, "abc", "--seed", seed)
    (text, symbols, test, training), again, other = data
    assert (text, symbols) == ("abc", "".join(map(chr, range(32, 127))))
    assert (test.shape, training.shape, test[0].tolist()) == ((64, 2), (20_000, 2), ["abc", "cba"])
    assert (training == again[3]).all()
    assert (training != other[3]).mean() > 0.9
    assert main.training_heading(380, test, np.delete(training, 0, 0)).startswith("380 steps on 19,999 pairs")
    assert main.training_heading(1, test, test[:1]) == "1 step on 1 pair, 1 of the 64 test strings among them"
    assert main.training_heading(2, test[:1], test[1:]) == "2 steps on 63 pairs"


def programs(*flags):
    """`init` and `train` of a small model with 8 symbols, for a batch of 8 strings of 3 tokens."""
    sizes = "--d-model", "16", "--num-heads", "2", "--d-ff", "24", "--steps", "77"
    init, train, *_ = main.make_programs(parsed(*sizes, *flags), 9)
    return init, lambda state, step: train(state, step, *2 * [np.ones((8, 3), np.int32)])


@many_devices
def test_the_training_program():
    """The state keeps its sharding and is donated. The mean is over the last 75 of 77 steps; before, it is params."""
    with jax.set_mesh(cpu_mesh(2, 2)):
        init, train = programs()
        state, history = init(), [None]
        for step in range(1, 6):
            old, (state, _) = state, train(state, step)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            history.append(np.array(state["params"]["embedding"]))
            expected = np.mean(history[3:] or history[-1:], axis=0)
            np.testing.assert_allclose(state["mean"]["embedding"], expected, rtol=1e-5, atol=1e-7)
    assert state["params"]["encoder"]["self_attention"]["query"].sharding.spec == P(None, None, "model")
    assert state["moments"]["v"]["decoder"]["feed_forward"]["b1"].sharding.spec == P(None, "model")


def test_what_the_training_step_gets(monkeypatch):
    """Its flags, and a random key of dropout that the seed and the step decide, or none. The seed decides params."""

    def step_that_shows_its_arguments(params, moments, step, source, target, warmup_steps, dropout_rng, dropout_rate):
        key = jnp.zeros(2) if dropout_rng is None else jax.random.key_data(dropout_rng)
        return params, moments, (step, warmup_steps, dropout_rate, key)

    monkeypatch.setattr(main, "train_step", step_that_shows_its_arguments)
    with jax.set_mesh(cpu_mesh(1, 1)):
        init, train = programs("--warmup-steps", "90")
        state, (step, warmup_steps, rate, key) = train(init(), 4)
        assert (step, warmup_steps, rate, np.any(key)) == (4, 90, 0, False)
        first, second = programs("--dropout-rate", "0.25"), programs("--dropout-rate", "0.25", "--seed", "1")
        shown = [train(init(), step)[1] for init, train in (first, second) for step in (1, 2)]
        assert {float(rate) for _, _, rate, _ in shown} == {0.25}
        assert len({tuple(key.tolist()) for *_, key in shown}) == 4
        assert np.all(np.array(second[0]()["params"]["embedding"]) != state["params"]["embedding"])


# ---- The program -----------------------------------------------------------------------------------------------------


def test_the_default_run_reverses_a_text_it_never_saw():
    """`python main.py TEXT`, with TEXT as four words: its five parts in order, as in README, and the anti-diagonal."""
    (output,) = finished(start(*TEXT.split(), XLA_FLAGS=""))
    headings = ["Parameters", "Forward pass", "Training", "Result", "Attention"]
    assert re.findall(r"^\d\. (\w+(?: pass)?)", output, re.MULTILINE) == headings
    assert f'input   "{TEXT}"\noutput  "{TEXT[::-1]}"\nexact matches' in output
    steps = re.findall(r'^step +\d+  loss +[\d.]+  accuracy +([\d.]+)%  ".*"$', output, re.MULTILINE)
    assert len(steps) == 6
    pattern = r"^exact matches: (\d+)/64 \(final parameters\), (\d+)/64 \(average of the last 75 steps\)$"
    final, mean = map(int, re.search(pattern, output, re.MULTILINE).groups())
    assert mean >= max(final, 56)
    assert (final == 64) == (float(steps[-1]) == 100)  # all strings match if all tokens do
    assert (mean == 64) == ("wrong outputs" not in output)
    assert all(len(line) <= 80 for line in output.splitlines())
    assert "\r" not in output  # the counter is for terminals
    title, *rows = output.splitlines()[-len(TEXT) - 1 :]
    assert title == f"  {TEXT}"
    assert [row[0] for row in rows] == list(TEXT[::-1])
    darkest = [row.find("█", 2) - 2 for row in rows]
    # Output i attends to input i from the end. A weight may be split between two neighbors.
    assert sum(column == len(TEXT) - 1 - i for i, column in enumerate(darkest)) >= len(TEXT) - 4

    def without_numbers(line):
        line = re.sub(r"(?<=%)  .*", "", line)  # the output of a half-trained model
        return re.sub(r" *\d[\d.]*(?=%| ms|$|/)|(?<=loss) +[\d.]+", " #", line)

    readme = Path(main.__file__).with_name("README.md").read_text(encoding="utf-8")
    sample = re.search(r"^```text\n(3\. .*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    lines = iter([without_numbers(line) for line in output.splitlines()])
    for line in sample.splitlines():
        assert without_numbers(line) in lines, line


def test_flags_seed_and_terminals(monkeypatch):
    """The same seed gives the same output. A terminal gets a counter, too, and without an encoding, an ASCII map."""
    text = "0123456789" * 4
    in_pipe, in_terminal = (run_here(monkeypatch, text, *SMALL, encoding=encoding) for encoding in ("utf-8", None))
    assert "(2, 16, 2, 8)" in in_pipe  # layers, d_model, heads, d_k
    assert "(2, 16, 24)" in in_pipe  # layers, d_model, d_ff
    assert "(8, 41, 96)" in in_pipe  # logits: batch size, length with END, vocab_size
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^params.* ([\d,]+)$", in_pipe, re.M)]
    assert f" {sum(sizes):,}\n\n2." in in_pipe
    assert all(len(line) <= 80 for line in in_pipe.splitlines())
    assert re.search(r'^step .*% {2}".{34}"$', in_pipe, re.M)  # longer outputs are cut
    assert "(1, 1)  (data, model)\n" in in_pipe
    assert "exact matches: 0/64 (final parameters), 0/64 (average of the last 7 steps)" in in_pipe
    assert f'\nanswer  "{text[::-1]}"\n' in in_pipe
    assert "\nwrong outputs (3 of 63):\n" in in_pipe  # besides TEXT
    assert len(re.findall(r'\ninput   ".{40}"\noutput  ".*"\nanswer  ".{40}"\n', in_pipe)) == 4
    assert in_terminal.count("\r") == 7
    pipe, terminal = (re.sub(r" *[\d.]+ ms|(?m:^.*\r)", "", output) for output in (in_pipe, in_terminal))
    assert pipe.translate(str.maketrans("░▒▓█", ".:*#")) == terminal


def test_a_text_that_the_file_lacks(monkeypatch, tmp_path):
    """It has no answer, and does not count. Also: one step, dropout, an ASCII terminal, and a FILE of two lines.

    TEXT is longer than any source, and the test pair has the longest target.
    """
    file = tmp_path / "pairs.tsv"
    file.write_text("bababa\tcafé\nab\tx\n", encoding="utf-8")
    arguments = ["bébébébé", "--pairs", str(file), *SMALL, "--batch-size", "1", "--dropout-rate", "0.5", "--steps", "1"]
    output = run_here(monkeypatch, *arguments, encoding="ascii")
    assert "3. Training: 1 step on 1 pair\n" in output
    assert '\ninput   "b?b?b?b?"\n' in output
    assert 'exact matches: 0/1 (final parameters)\n\nwrong outputs (1 of 1):\n\ninput   "bababa"\n' in output
    assert output.count("answer") == 1


def exact_matches_of_the_average(output):
    """Of 64, as part 4 prints them. Seeds differ by a few, and versions of JAX, too."""
    return int(re.search(r"exact matches: .* (\d+)/64 \(average", output)[1])


def test_times_of_day_are_learned_from_a_file(monkeypatch, tmp_path):
    """`python main.py --pairs FILE` learns a task to exact matches on 64 pairs that it never saw."""
    pairs = [(f"{h % 12 or 12}:{m:02} {'ap'[h // 12]}m", f"{h:02}:{m:02}") for h in range(24) for m in range(60)]
    file = tmp_path / "times.tsv"
    file.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    sizes = ["--num-layers", "1", "--num-heads", "2", "--d-model", "32", "--d-ff", "32", "--batch-size", "32"]
    output = run_here(monkeypatch, "7:05 pm", "--pairs", str(file), *sizes, "--steps", "300")
    assert "3. Training: 300 steps on 1,376 pairs\n" in output
    assert exact_matches_of_the_average(output) > 48  # by chance: none


def test_six_layers_learn(monkeypatch):
    """The paper's depth: six layers also learn to reverse every test string."""
    sizes = ["--num-layers", "6", "--num-heads", "1", "--d-model", "32", "--d-ff", "32", "--warmup-steps", "400"]
    output = run_here(monkeypatch, "abc", *sizes, "--batch-size", "32", "--steps", "200")
    assert exact_matches_of_the_average(output) > 48


def test_accuracy_counts_tokens_up_to_end():
    """Of targets of lengths 3 and 1, END included, three of four tokens are right, and one string of two."""
    target, output = np.array([[5, 6, 0, 0], [0, 0, 0, 0]]), np.array([[5, 7, 0, 0], [0, 0, 0, 0]])
    assert main.accuracy(output, target) == 0.75
    assert main.accuracy(np.array([[5, 6, 1, 0], [1, 0, 0, 0]]), target) == 0.5
    assert main.exact_matches(output, target) == "1/2"


def test_mistakes(capsys):
    """Up to three wrong outputs are shown, TEXT's aside, with source, output and answer below each other."""
    test = np.array([("1", "one"), ("2", "two"), ("3", "three"), ("4", "four"), ("5", "five"), ("6", "six")])
    main.show_mistakes(test, ["", "two", "tree", "", "fives", "sex"], "1")
    shown = """
wrong outputs (3 of 4):

input   "3"
output  "tree"
answer  "three"

input   "4"
output  ""
answer  "four"

input   "5"
output  "fives"
answer  "five"
"""
    assert capsys.readouterr().out == shown
    main.show_mistakes(test, ["", *test[1:, 1]], "1")
    assert capsys.readouterr().out == ""


def test_wide_and_combining_characters(monkeypatch):
    """A shade is as wide as its character: two columns for 日, none for combining accents and vowels."""
    assert [main.columns(symbol) for symbol in "日e\u0301\u0e31\u200d\u20dd"] == [2, 1, 0, 0, 0, 0]
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    main.show_attention(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "日e\u0301x", "本x\u0e31")
    assert output.getvalue() == "  日e\u0301x\n本##\nx\n\u0e31     #\n"


@pytest.mark.parametrize(("output", "weights"), [("", np.ones((0, 2))), ("a", np.full((1, 2), np.nan))])
def test_nothing_to_draw(capsys, output, weights):
    """An empty output and weights that are not finite print one sentence."""
    main.show_attention(weights, "ab", output)
    assert re.fullmatch("nothing to draw: the (output is empty|weights are not finite)\n", capsys.readouterr().out)


def test_a_closed_pipe():
    """`python main.py | head -1` ends without a traceback."""
    with start(*SMALL, "--steps", "0", "Hello") as process:
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize("ignored", [False, True])
def test_control_c_during_compilation(ignored):
    """Ctrl-C ends the program by the signal itself, so that a shell loop around it ends, too; there is no traceback.

    A program that was started with SIGINT ignored, as in the background of a shell script, goes on.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)  # inherited
    try:
        process = start(*SMALL, "--steps", "0", "Hello")
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        while not process.stdout.readline().startswith("devices"):  # then the forward pass is compiled
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=180)
        assert (process.returncode, errors) == (0 if ignored else -signal.SIGINT, "")
        assert ("5. Attention" in output) == ignored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["naïve"], r"TEXT must be printable ASCII, not '\xef'"),
        ([""], "TEXT must have 1 to 100 characters, got 0"),
        (["x" * 50, "x" * 50], "TEXT must have 1 to 100 characters, got 101"),
        (["--d-ff", "0"], "argument --d-ff: must be at least 1 and below 2147483648, got 0"),
        (["--steps", "-1"], "argument --steps: must be at least 0 and below 2147483648, got -1"),
        (["--seed", "2147483648"], "argument --seed: must be at least 0 and below 2147483648, got 2147483648"),
        (["--d-model", "1.5"], "argument --d-model: invalid int value: '1.5'"),
        (["--d-model", "9"], "--d-model must be even (sines and cosines come in pairs), got 9"),
        (["--num-heads", "3"], "--num-heads must divide --d-model, got 3 and 64"),
        (["--dropout-rate", "1"], "argument --dropout-rate: must be at least 0 and below 1, got 1.0"),
        (["--dropout-rate", "nan"], "argument --dropout-rate: must be at least 0 and below 1, got nan"),
        (["--model-parallel", "3"], "--model-parallel must divide the number of devices, got 3 and 8"),
        (["--model-parallel", "8"], "--model-parallel must divide --num-heads, got 8 and 4"),
        (["--model-parallel", "4", "--d-ff", "6"], "--model-parallel must divide --d-ff, got 4 and 6"),
        (["--batch-size", "12"], "--batch-size must be a multiple of 8 (devices / --model-parallel), got 12"),
        (["--distributed"], "--distributed: JAX found no launcher; use srun, or mpirun of Open MPI 4"),
        (["--pairs", b"a\tb\nb\tc", "é"], r"TEXT must be characters of FILE, not '\xe9'"),
        (["--pairs", b"a\tb\nb\tc", "a" * 101], "TEXT must have 1 to 100 characters, got 101"),
        (["--pairs", b"a\tb\na\td\n", "a"], "FILE needs at least 2 distinct sources, got 1"),
        (["--pairs", b"\n \n\t\n"], "FILE needs at least 2 distinct sources, got 0"),
        (["--pairs", b"a\tb\n\nc d\n"], "argument --pairs: pairs.tsv, line 3: no tab between source and target"),
        (
            ["--pairs", b"a\tb\na\t" + 101 * b"x"],
            "argument --pairs: pairs.tsv, line 2: a string of more than 100 characters",
        ),
        (["--pairs", b"a\0\tb"], "argument --pairs: pairs.tsv, line 1: a control character"),
        (["--pairs", b"a\tb\n\na\t\x1b[2Jb"], "argument --pairs: pairs.tsv, line 3: a control character"),
        (["--pairs", b"\xc2\x85\tb"], "argument --pairs: pairs.tsv, line 1: a control character"),
        (["--pairs", "missing.tsv"], "cannot read missing.tsv: [Errno 2] No such file or directory: 'missing.tsv'"),
        (["--pairs", "."], "argument --pairs: cannot read .: [Errno 21] Is a directory: '.'"),
        (["--pairs", b"ab\tc\n\n\xe9\td"], "can't decode byte 0xe9 in position 6: invalid continuation byte"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, message):
    """Invalid input prints the usage and an error that names the flag. The exit status is 2. Bytes go into a file."""

    def no_launcher():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.chdir(tmp_path)
    for i, content in enumerate(arguments):
        if isinstance(content, bytes):
            Path("pairs.tsv").write_bytes(content)
            arguments = [*arguments[:i], "pairs.tsv", *arguments[i + 1 :]]
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax.distributed, "initialize", no_launcher)  # its error without a launcher
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    output, errors = capsys.readouterr()
    usage, error = errors.split("main.py: error: ")
    assert (stopped.value.code, output, usage[:15]) == (2, "", "usage: main.py ")
    assert error.endswith(f"{message}\n")
