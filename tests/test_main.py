"""main.py: the model of Figure 1, its training, its data, and the program as a user runs it."""

import argparse
import re
import signal
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
import transformer_layer as tl
from attention import attention_weights
from common import arrays, finished, random_params, run_here, start

TEXT = "Never odd or even, 1234"
SMALL = ["--d-model", "16", "--num-heads", "2", "--d-ff", "24", "--batch-size", "8", "--steps", "7"]

# ---- The model -------------------------------------------------------------------------------------------------------

SOURCE, TARGET = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.array([[2, 7, 1], [8, 2, 8]])
# Sources of lengths 5, 2 and 0, and targets of lengths 3, 1 and 0, padded with END = 0.
SOURCES = np.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0], [0, 0, 0, 0, 0]])
TARGETS = np.array([[2, 7, 1, 0], [8, 0, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def params():
    """A model with a vocabulary of 11 tokens and two layers, with normally distributed parameters."""
    return random_params(main.init_model, 11, 2, 8, 2, 16)


def test_positional_encoding_needs_an_even_d_model():
    """Section 3.5: sines and cosines come in pairs."""
    with pytest.raises(ValueError, match=r"d_model must be even \(sines and cosines come in pairs\), got 5"):
        main.positional_encoding(4, 5)


def test_an_empty_vocabulary():
    """A model needs at least one token."""
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        main.init_model(jax.random.key(0), 0, 2, 8, 2, 16)


def test_length_zero(params):
    """Targets of length 0 remain empty; their loss is a mean of nothing: NaN. Sources may have length 0."""
    empty = np.zeros((2, 0), int)
    assert main.shift_right(empty).shape == (2, 0)
    assert np.isnan(main.loss(params, SOURCE, empty))
    assert np.isfinite(jax.jit(main.model)(params, empty, TARGET)).all()


@jax.jit
def outcome(params, source, target):
    """Logits, attention weights, loss, its gradient, and generated tokens: all that the model computes."""
    value, gradient = jax.value_and_grad(main.loss)(params, source, target)
    return {
        "logits": main.model(params, source, main.shift_right(target)),
        "weights": main.cross_attention_weights(params, source, target),
        "loss": value,
        "gradient": gradient,
        "generated": main.generate(params, source, 6),
    }


def assert_same(actual, expected, tolerance=1e-12):
    """Compares two pytrees, leaf by leaf."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, expected)


@pytest.fixture
def params64(params):
    """The parameters in float64, in which padding changes nothing beyond 1e-12."""
    with jax.enable_x64(True):
        yield jax.tree.map(lambda leaf: leaf.astype(np.float64), params)


def extended(tokens, *tail):
    """The tokens of a batch, each row with this tail."""
    return np.concatenate([tokens, np.tile(tail, (len(tokens), 1))], axis=1)


def test_nothing_after_end_in_a_source_changes_anything(params64):
    """The first END of a source and all tokens after it are padding: they change no logit, gradient or output."""
    expected = outcome(params64, SOURCES, TARGETS)
    for tail in ((0, 0, 0), (0, 2, 2)):
        actual = outcome(params64, extended(SOURCES, *tail), TARGETS)
        assert not np.any(np.asarray(actual["weights"])[..., 5:])
        actual["weights"] = actual["weights"][..., :5]
        assert_same(actual, expected)


def test_nothing_after_end_in_a_target_changes_anything(params64):
    """The loss and its gradient count the tokens up to the first END. Later tokens change only later logits."""
    expected = outcome(params64, SOURCES, TARGETS)
    padded, longer = (outcome(params64, SOURCES, extended(TARGETS, *tail)) for tail in ((0, 0), (2, 2)))
    assert_same(longer["weights"], padded["weights"])
    for actual in (padded, longer):
        actual["logits"], actual["weights"] = actual["logits"][:, :4], actual["weights"][..., :4, :]
        assert_same(actual, expected)


def test_a_batch_of_mixed_lengths_equals_each_string_alone(params64):
    """Strings of lengths 5, 2 and 0 in one batch: each result equals that of the string alone, without padding."""
    batch = outcome(params64, SOURCES, TARGETS)
    losses = [4 * jax.jit(main.loss)(params64, SOURCES[0], TARGETS[0])]
    for i, m, n in ((1, 2, 2), (2, 0, 1)):
        alone = outcome(params64, SOURCES[i, :m], TARGETS[i, :n])
        assert_same(batch["logits"][i, :n], alone["logits"])
        assert_same(batch["weights"][i, :, :n, :m], alone["weights"])
        np.testing.assert_array_equal(batch["generated"][i], alone["generated"])
        losses.append(n * alone["loss"])
    np.testing.assert_allclose(batch["loss"], sum(losses) / 7, rtol=1e-12)  # the mean over all 7 tokens


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


def test_dropout_in_training(params):
    """The loss and a training step take dropout options. A rate of 0 is no dropout, and the key decides what drops."""
    state = params, main.init_adam(params), 1, SOURCES, TARGETS, 100

    @jax.jit
    def losses(rng, rate):
        options = {"dropout_rng": rng, "dropout_rate": rate}
        return main.loss(params, SOURCES, TARGETS, **options), main.train_step(*state, **options)[-1]

    plain = float(jax.jit(main.loss)(params, SOURCES, TARGETS))
    none, first, again, other = (
        losses(jax.random.key(i), rate) for i, rate in ((0, 0.0), (1, 0.3), (1, 0.3), (2, 0.3))
    )
    np.testing.assert_allclose(none, 2 * [plain], rtol=1e-5)
    np.testing.assert_allclose(first, again)
    np.testing.assert_allclose(first[0], first[1], rtol=1e-5)
    assert abs(first[0] - plain) > 0.01
    assert abs(first[0] - other[0]) > 0.01


def varied_params(layers, heads):
    """A model with a vocabulary of 11 tokens that generates different tokens, END among them."""
    params = jax.jit(lambda: main.init_model(jax.random.key(0), 11, layers, 32, heads, 16))()
    params["embedding"] *= 20
    scale = params["decoder"]["feed_forward_norm"]["scale"]
    params["decoder"]["feed_forward_norm"]["scale"] = scale.at[-1].set(-1)  # otherwise it repeats one token
    return params


def generate_without_cache(params, source, length):
    """Runs the three lines of the docstring of `generate`, then sets the tokens after the first END to END."""
    code = re.search(r"\n\n( +for i in range.*?)\n\n", main.generate.__doc__, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    names = {"params": params, "source": source, "length": length, "model": jax.jit(main.model)}
    names |= {"shift_right": main.shift_right, "target": jnp.zeros((*np.shape(source)[:-1], length), int)}
    exec(textwrap.dedent(code), names)
    target = np.asarray(names["target"])
    return target * (target != main.END).cumprod(axis=-1)


@pytest.mark.parametrize(("lead", "length", "layers", "heads"), [((), 1, 1, 1), ((3,), 7, 2, 2), ((2, 2), 5, 3, 4)])
def test_generate_equals_the_algorithm_in_its_docstring(lead, length, layers, heads):
    """The KV cache changes no token, for sources of mixed lengths, and for outputs longer and shorter than they are."""
    params = varied_params(layers, heads)
    source = np.random.default_rng(1).integers(0, 11, (*lead, 5))
    target = jax.jit(main.generate, static_argnums=2)(params, source, length)
    np.testing.assert_array_equal(target, generate_without_cache(params, source, length))
    if length > 1:  # make sure that tokens differ, and that some outputs end early
        assert len(np.unique(target)) > 3
        assert (np.asarray(target)[..., -1] == main.END).any()


def test_generated_tokens_have_the_default_integer_dtype():
    """A source in uint8 can have a target with tokens above 255."""
    params = jax.jit(lambda: main.init_model(jax.random.key(0), 300, 1, 8, 2, 8))()
    params["embedding"] = params["embedding"].at[290].set(10 * params["embedding"][290])
    source = np.array([[250, 3, 0]], np.uint8)
    target = jax.jit(main.generate, static_argnums=2)(params, source, 3)
    np.testing.assert_array_equal(target, generate_without_cache(params, source, 3))
    assert target.dtype == jnp.int32
    assert np.max(target) > 255
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda: main.generate(params, source, 3)).dtype == jnp.int64


def test_generate_with_a_half_precision_embedding():
    """The cache has the wider dtype of memory and weights: a bfloat16 embedding with float32 layers loses nothing."""
    params = varied_params(2, 2)
    params["embedding"] = params["embedding"].astype(jnp.bfloat16)
    source = np.random.default_rng(2).integers(1, 11, (8, 6))
    target = jax.jit(main.generate, static_argnums=2)(params, source, 6)
    np.testing.assert_array_equal(target, generate_without_cache(params, source, 6))


@pytest.mark.parametrize("length", [0, 2.0, np.int64(2)])
def test_generate_needs_a_length(params, length):
    """The length is a Python int, because it is part of shapes."""
    with pytest.raises(ValueError, match="length must be a Python int of at least 1"):
        main.generate(params, SOURCE, length)


def test_a_step_of_generate_costs_no_more_than_linear_in_the_length():
    """With the KV cache, a step attends from one position. XLA counts the operations of a loop's body once."""
    params = jax.eval_shape(lambda: main.init_model(jax.random.key(0), 11, 2, 64, 2, 128))
    source = jax.ShapeDtypeStruct((16,), jnp.int32)
    encoder = jax.jit(main.encode).lower(params, source).cost_analysis()["flops"]

    def step(length):
        both = jax.jit(main.generate, static_argnums=2).lower(params, source, length).cost_analysis()["flops"]
        return both - encoder

    assert 0 < step(256) < 2.1 * step(128)


def test_cross_attention_weights_are_those_of_the_last_layer(params):
    """The recorded weights are softmax(Q K^T / sqrt(d_k)) of the last decoder layer, computed here step by step."""
    weights = jax.jit(main.cross_attention_weights)(params, SOURCES, TARGETS)
    memory, mask = main.encode(params, SOURCES)
    np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], params["decoder"]) for i in (0, 1))
    x = tl.decoder_layer(first, main.embed(params, main.shift_right(TARGETS)), memory, memory_mask=mask)
    attended = tl.multi_head_attention(last["self_attention"], x, x, x, causal=True)
    x = tl.layer_norm(last["self_attention_norm"], x + attended)
    query = jnp.einsum("bnd,dhk->bhnk", x, last["cross_attention"]["query"])
    key = jnp.einsum("bmd,dhk->bhmk", memory, last["cross_attention"]["key"])
    np.testing.assert_allclose(weights, attention_weights(query, key, mask), atol=1e-5)


# ---- Dtypes and kinds of arrays -------------------------------------------------------------------------------------


def test_numpy_parameters_and_lists_of_tokens(params):
    """Parameters may be NumPy arrays, as from `np.load`, and tokens may be lists, also inside jit.

    Here in float32, and with a source that is padded further.
    """
    expected = outcome(jax.tree.map(jnp.asarray, params), SOURCES, TARGETS)
    padded = extended(SOURCES, 0, 0).tolist()
    actual = jax.jit(lambda: outcome.__wrapped__(params, padded, TARGETS.tolist()))()
    actual["weights"] = actual["weights"][..., :5]
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize(("dtype", "x64"), [(jnp.bfloat16, False), (jnp.float32, True)])
@pytest.mark.parametrize(
    "step", [3, np.int32(3), np.int64(3), np.array(3), jnp.int32(3)], ids=lambda step: str(type(step))
)
def test_training_keeps_dtypes(params, step, dtype, x64):
    """Parameters and moments keep their dtypes, whatever kind of number the step is."""
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        state = params, main.init_adam(params)
        *new, _ = jax.eval_shape(lambda *state: main.train_step(*state, step, SOURCE, SOURCE, 100), *state)
        assert jax.tree.map(lambda leaf: leaf.dtype, tuple(new)) == jax.tree.map(lambda leaf: leaf.dtype, state)
        assert jax.eval_shape(main.embed, params, SOURCE).dtype == dtype


def test_adam_keeps_dtypes_in_a_scan(params):
    """Moments keep their dtype when gradients are wider, so that Adam can be the body of `jax.lax.scan`."""
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)

    def step(state, i):
        return main.adam(*state, params, i, 0.01), None

    jax.eval_shape(lambda *state: jax.lax.scan(step, state, jnp.arange(1, 4)), half, main.init_adam(half))


def test_average_of_half_precision_in_a_scan():
    """Section 6.1: the mean of bfloat16 parameters is kept in float32, and can be the carry of `jax.lax.scan`."""
    checkpoints = arrays((75, 100), dtype=jnp.bfloat16)[0] + 3

    def step(mean, checkpoint_and_count):
        return main.average(mean, *checkpoint_and_count), None

    start = main.average(checkpoints[0], checkpoints[0], 1)
    mean, _ = jax.lax.scan(step, start, (checkpoints[1:], jnp.arange(2, 76)))
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, checkpoints.astype(jnp.float32).mean(axis=0), rtol=1e-5)


# ---- Training --------------------------------------------------------------------------------------------------------


def test_train_step_is_adam_on_the_gradient_of_the_loss(params):
    """One jitted step equals its parts called in sequence."""
    new, moments, value = jax.jit(main.train_step)(params, main.init_adam(params), 1, SOURCE, TARGET, 600)
    gradient = jax.jit(jax.grad(main.loss))(params, SOURCE, TARGET)
    rate = 8**-0.5 * 600**-1.5
    expected, expected_moments = jax.jit(main.adam)(params, main.init_adam(params), gradient, 1, rate)
    np.testing.assert_allclose(value, jax.jit(main.loss)(params, SOURCE, TARGET), rtol=1e-6)
    assert_close = np.testing.assert_allclose
    jax.tree.map(lambda actual, exact: assert_close(actual, exact, rtol=1e-3, atol=1e-7), moments, expected_moments)
    jax.tree.map(lambda actual, exact: assert_close(actual, exact, atol=rate / 10), new, expected)


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
    for wrong in ("aaaaaa", "ac"):
        with pytest.raises(ValueError, match=f"at most 5 characters, all from ' ab', got .*'{wrong}'"):
            main.as_tokens(["a", wrong], 5, " ab")


def test_read_pairs(tmp_path):
    """A byte order mark, CRLF, blank lines, further columns, empty strings, quotes, # and any letters are fine."""
    file = tmp_path / "pairs.tsv"
    file.write_bytes(
        '\ufeffa b\tc\r\n\r\n  \n#\t"q" \tmore\tcolumns\r\n\tempty\nñ\u00a0日本\t\n\t\nlast\tline'.encode()
    )
    expected = [["a b", "c"], ["#", '"q" '], ["", "empty"], ["ñ\u00a0日本", ""], ["", ""], ["last", "line"]]
    assert main.read_pairs(file).tolist() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\n\nc d\n", "{}, line 3: no tab between source and target"),
        ("a\tb\na\t" + 101 * "x", "{}, line 2: a string of more than 100 characters"),
        ("a\0\tb", "{}, line 1: a NUL character"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, content, message):
    """The error names the file and the line."""
    file = tmp_path / "pairs.tsv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        main.read_pairs(file)
    assert str(raised.value) == message.format(file)


def test_no_test_source_occurs_in_training():
    """Sources that repeat, also with other targets, are either for the test or for training. TEXT is first."""
    pairs = np.array([(f"{i % 40}", f"{i % 40}" if i < 120 else f"x{i}") for i in range(160)] + [("", "e")])
    for text, known in (("7", True), ("a new one", False), ("", True)):
        sources, answers, training = main.hold_out(np.random.default_rng(0), pairs, text, 16)
        assert len(sources) == len(set(sources)) == len(answers) == 16
        assert sources[0] == text
        assert (answers[0] is not None) == known
        assert None not in answers[1:]
        assert all([source, answer] in pairs.tolist() for source, answer in zip(sources[1:], answers[1:], strict=True))
        expected = [pair for pair in pairs.tolist() if pair[0] not in sources]
        assert training.tolist() == expected


# ---- The program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def default_run():
    """The output of `python main.py TEXT`, with TEXT as four words, on one device."""
    (output,) = finished(start(*TEXT.split(), XLA_FLAGS=""))
    return output


def test_the_default_run_reverses_a_text_it_never_saw(default_run):
    """`python main.py TEXT` prints its five parts in order, learns to reverse, and draws the anti-diagonal."""
    headings = ["Parameters", "Forward pass", "Training", "Result", "Attention"]
    assert re.findall(r"^\d\. (\w+(?: pass)?)", default_run, re.MULTILINE) == headings
    assert f'input   "{TEXT}"\noutput  "{TEXT[::-1]}"\nexact matches' in default_run
    steps = re.findall(r'^step +\d+  loss +[\d.]+  accuracy +([\d.]+)%  ".*"$', default_run, re.MULTILINE)
    assert len(steps) == 6
    pattern = r"^exact matches: (\d+)/16 \(final parameters\), (\d+)/16 \(average of the last 75 steps\)$"
    final, mean = map(int, re.search(pattern, default_run, re.MULTILINE).groups())
    assert mean >= max(final, 15)
    assert (final == 16) == (float(steps[-1]) == 100)  # all strings match if all tokens do
    assert all(len(line) <= 80 for line in default_run.splitlines())
    assert "\r" not in default_run  # the counter is for terminals
    title, *rows = default_run.splitlines()[-len(TEXT) - 1 :]
    assert title == f"  {TEXT}"
    assert [row[0] for row in rows] == list(TEXT[::-1])
    darkest = [row.find("█", 2) - 2 for row in rows]
    # Output i attends to input i from the end. A weight may be split between two neighbors.
    assert sum(column == len(TEXT) - 1 - i for i, column in enumerate(darkest)) >= len(TEXT) - 4


def test_readme_shows_this_run(default_run):
    """Each line of output in README is in this run, in order, except for numbers that vary."""

    def without_numbers(line):
        line = re.sub(r"(?<=%)  .*", "", line)  # the output of a half-trained model
        return re.sub(r" *\d[\d.]*(?=%| ms|$|/)|(?<=loss) +[\d.]+", " #", line)

    readme = Path(main.__file__).with_name("README.md").read_text(encoding="utf-8")
    sample = re.search(r"^```text\n(3\. .*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    lines = iter([without_numbers(line) for line in default_run.splitlines()])
    for line in sample.splitlines():
        assert without_numbers(line) in lines, line


def test_flags_seed_and_encoding(monkeypatch):
    """All sizes can be set; the same seed gives the same output, except for times; ASCII terminals get ASCII maps."""
    blocks, plain = (
        run_here(monkeypatch, "Hello", *SMALL, encoding=encoding, one_device=True) for encoding in ("utf-8", "ascii")
    )
    for expected in (
        "(2, 16, 2, 8)",  # layers, d_model, heads, d_k
        "(2, 16, 24)",  # layers, d_model, d_ff
        "(8, 6, 96)",  # logits: batch size, length with END, vocab_size
        "(1, 1)  (data, model)\n",
        "step     7  loss",
        "exact matches: 0/8 (final parameters), 0/8 (average of the last 7 steps)",
        '\nanswer  "olleH"\n',
    ):
        assert expected in blocks
    assert plain.isascii()
    without_times = [re.sub(r" *[\d.]+ ms", "", output) for output in (blocks, plain)]
    assert without_times[0].translate(str.maketrans("░▒▓█", ".:*#")) == without_times[1]


def test_a_terminal_sees_a_counter(monkeypatch, tmp_path):
    """On a terminal, the counter of steps is overwritten by the next line. Output without an encoding works.

    Also: a TEXT that FILE lacks has no answer, and with a batch of one there is nothing to count. Dropout is on. There
    is a single step, after which the donated parameters and moments must not be used again.
    """
    file = tmp_path / "pairs.tsv"
    file.write_text("ab\tcafé\nba\tx\n", encoding="utf-8")
    arguments = ["abba", "--pairs", str(file), *SMALL, "--batch-size", "1", "--dropout-rate", "0.5", "--steps", "1"]
    output = run_here(monkeypatch, *arguments, encoding=None, one_device=True)
    counter, line = re.search(r"^(step     1  loss +[\d.]+)\r(step     1  loss .*)$", output, re.MULTILINE).groups()
    assert line.startswith(f'{counter}  accuracy       -  "')
    assert "3. Training: 1 steps on 2 pairs\n" in output
    assert '\ninput   "abba"\n' in output
    assert "answer" not in output
    assert "exact matches: - (final parameters)\n" in output


def test_no_steps_and_a_long_text(monkeypatch):
    """`--steps 0` trains nothing. Training lines and maps of short texts fit 80 columns."""
    output = run_here(monkeypatch, "0123456789" * 4, *SMALL, "--steps", "0", one_device=True)
    assert "3. Training: skipped (--steps 0)\n\n4. " in output
    assert "exact matches: 0/8 (final parameters)\n" in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_times_of_day_are_learned_from_a_file(monkeypatch, tmp_path):
    """`python main.py --pairs FILE` learns a task to exact matches on pairs that it never saw."""
    pairs = [(f"{h % 12 or 12}:{m:02} {'ap'[h // 12]}m", f"{h:02}:{m:02}") for h in range(24) for m in range(60)]
    file = tmp_path / "times.tsv"
    file.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    sizes = ["--num-layers", "1", "--num-heads", "2", "--d-model", "32", "--d-ff", "32", "--batch-size", "32"]
    output = run_here(monkeypatch, "7:05 pm", "--pairs", str(file), *sizes, "--steps", "300", one_device=True)
    assert "3. Training: 300 steps on 1,408 pairs\n" in output
    assert '\noutput  "19:05"\n' in output
    assert "32/32 (average of the last 75 steps)\n" in output


def test_six_layers_learn(monkeypatch):
    """The paper's depth: six layers also learn to reverse every test string."""
    sizes = ["--num-layers", "6", "--num-heads", "1", "--d-model", "32", "--d-ff", "32", "--warmup-steps", "400"]
    output = run_here(monkeypatch, "abc", *sizes, "--batch-size", "32", "--steps", "200", one_device=True)
    assert "32/32 (average of the last 75 steps)" in output


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


def test_control_c_during_compilation():
    """Ctrl-C ends the program with status 130 and without a traceback, and loses no output."""
    with start(*SMALL, "Hello") as process:
        while not process.stdout.readline().startswith("devices"):  # then the forward pass is compiled
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["naïve"], r"TEXT must be printable ASCII, not '\xef'"),
        ([""], "TEXT must have 1 to 100 characters, got 0"),
        (["x" * 50, "x" * 50], "TEXT must have 1 to 100 characters, got 101"),
        (["--d-ff", "0"], "--d-ff must be from 1 to 2^31 - 1, got 0"),
        (["--steps", "-1"], "--steps must be from 0 to 2^31 - 1, got -1"),
        (["--seed", "2147483648"], "--seed must be from 0 to 2^31 - 1, got 2147483648"),
        (["--d-model", "1.5"], "argument --d-model: invalid int value: '1.5'"),
        (["--d-model", "9"], "--d-model must be even (sines and cosines come in pairs), got 9"),
        (["--num-heads", "3"], "--num-heads must divide --d-model, got 3 and 64"),
        (["--dropout-rate", "1"], "--dropout-rate must be at least 0 and below 1, got 1.0"),
        (["--dropout-rate", "nan"], "--dropout-rate must be at least 0 and below 1, got nan"),
        (["--model-parallel", "3"], "--model-parallel must divide the number of devices, got 3 and 8"),
        (["--model-parallel", "8"], "--model-parallel must divide --num-heads, got 8 and 4"),
        (["--model-parallel", "4", "--d-ff", "6"], "--model-parallel must divide --d-ff, got 4 and 6"),
        (["--batch-size", "12"], "--batch-size must be a multiple of 8 (devices / --model-parallel), got 12"),
        (["--distributed"], "--distributed: JAX found no launcher; use srun, or mpirun of Open MPI 4"),
        (
            ["--pairs", "missing.tsv"],
            "argument --pairs: cannot read missing.tsv: [Errno 2] No such file or directory: 'missing.tsv'",
        ),
        (["--pairs", "pairs.tsv", "--batch-size", "1", "é"], r"TEXT must be characters of FILE, not '\xe9'"),
        (["--pairs", "pairs.tsv", "a"], "FILE needs 16 distinct sources besides TEXT (--batch-size), got 1"),
        (["--pairs", "blank.tsv"], "FILE needs 16 distinct sources besides TEXT (--batch-size), got 0"),
        (["--pairs", "."], "argument --pairs: cannot read .: [Errno 21] Is a directory: '.'"),
        (
            ["--pairs", "latin1.tsv"],
            "argument --pairs: cannot read latin1.tsv: 'utf-8' codec can't decode byte "
            "0xe9 in position 6: invalid continuation byte",
        ),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, message):
    """Invalid input prints the usage and an error that names the flag, and exits with status 2."""

    def no_launcher():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("pairs.tsv", b"a\tb\nb\tc\na\td\n"),
        ("blank.tsv", b"\n \n"),
        ("latin1.tsv", b"ab\tc\n\n\xe9\td"),
    ):
        Path(name).write_bytes(content)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax.distributed, "initialize", no_launcher)  # its error without a launcher
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output) == (2, "")
    assert errors.startswith("usage: main.py ")
    assert errors.endswith(f"main.py: error: {message}\n")
