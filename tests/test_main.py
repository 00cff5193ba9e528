"""main.py: the model of Figure 1, its training, and the program as a user runs it."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
import transformer_layer as tl
from attention import attention_weights, padding_mask
from common import arrays, finished, random_params, run_here, start

TEXT = "Never odd or even, 1234"
SMALL = ["--d-model", "16", "--num-heads", "2", "--d-ff", "24", "--batch-size", "8", "--steps", "7"]

# ---- The model -------------------------------------------------------------------------------------------------------

SOURCE, TARGET = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.array([[2, 7, 1], [8, 2, 8]])


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


def test_targets_of_length_zero(params):
    """Shifted right, they remain empty. Their loss is a mean of nothing: NaN."""
    empty = np.zeros((2, 0), int)
    assert main.shift_right(empty).shape == (2, 0)
    assert np.isnan(main.loss(params, SOURCE, empty))


def test_a_padding_mask_equals_a_shorter_source(params):
    """Masked source positions change nothing."""
    model = jax.jit(main.model)
    masked = model(params, SOURCE, TARGET, padding_mask(jnp.array([3, 3]), 5))
    np.testing.assert_allclose(masked, model(params, SOURCE[:, :3], TARGET), atol=1e-5)
    assert abs(masked - model(params, SOURCE, TARGET)).max() > 0.01


def test_dropout_differs_between_sublayers_layers_and_stacks(params, monkeypatch):
    """Each sub-layer of each layer, in encoder and decoder, drops with its own random key."""
    keys = []

    def recording_dropout(rng, x, rate):
        jax.debug.callback(lambda data: keys.append(tuple(np.ravel(data).tolist())), jax.random.key_data(rng))
        return x

    monkeypatch.setattr(tl, "dropout", recording_dropout)
    main.model(params, SOURCE, TARGET, dropout_rng=jax.random.key(0))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * (2 + 3)


@pytest.mark.parametrize(("lead", "length", "layers", "heads"), [((), 1, 1, 1), ((3,), 7, 2, 2), ((2, 2), 5, 3, 4)])
def test_generate_writes_what_the_whole_model_would(lead, length, layers, heads):
    """Each token is the most likely one except START, given the source and the tokens before it.

    The model is causal, so one run on the result gives the logits of every step.
    """
    params = jax.jit(lambda: main.init_model(jax.random.key(0), 11, layers, 32, heads, 16))()
    params["embedding"] *= 20
    scale = params["decoder"]["feed_forward_norm"]["scale"]
    params["decoder"]["feed_forward_norm"]["scale"] = scale.at[-1].set(-1)  # otherwise it repeats one token
    source = np.random.default_rng(1).integers(1, 11, (*lead, length))
    target = jax.jit(main.generate)(params, source)
    logits = np.array(jax.jit(main.model)(params, source, main.shift_right(target)))
    if length > 1:  # make sure that tokens differ, and that START would win somewhere
        assert len(np.unique(target)) > 3
        assert (logits.argmax(axis=-1) == main.START).any()
    logits[..., main.START] = -np.inf
    np.testing.assert_array_equal(target, logits.argmax(axis=-1))


def test_a_step_of_generate_costs_no_more_than_linear_in_the_length():
    """With the KV cache, a step attends from one position. XLA counts the operations of a loop's body once."""
    params = jax.eval_shape(lambda: main.init_model(jax.random.key(0), 11, 2, 64, 2, 128))

    def step(length):
        source = jax.ShapeDtypeStruct((length,), jnp.int32)
        encode = jax.jit(lambda params, source: tl.encoder(params["encoder"], main.embed(params, source)))
        both, encoder = (jax.jit(f).lower(params, source).cost_analysis()["flops"] for f in (main.generate, encode))
        return both - encoder

    assert 0 < step(256) < 2.1 * step(128)


def test_cross_attention_weights_are_those_of_the_last_layer(params):
    """The recorded weights are softmax(Q K^T / sqrt(d_k)) of the last decoder layer, computed here step by step."""
    weights = jax.jit(main.cross_attention_weights)(params, SOURCE, TARGET)
    memory = tl.encoder(params["encoder"], main.embed(params, SOURCE))
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], params["decoder"]) for i in (0, 1))
    x = tl.decoder_layer(first, main.embed(params, main.shift_right(TARGET)), memory)
    attended = tl.multi_head_attention(last["self_attention"], x, x, x, causal=True)
    x = tl.layer_norm(last["self_attention_norm"], x + attended)
    query = jnp.einsum("bnd,dhk->bhnk", x, last["cross_attention"]["query"])
    key = jnp.einsum("bmd,dhk->bhmk", memory, last["cross_attention"]["key"])
    np.testing.assert_allclose(weights, attention_weights(query, key), atol=1e-5)


# ---- Dtypes and kinds of arrays -------------------------------------------------------------------------------------


def test_numpy_parameters_and_lists_of_tokens(params):
    """Parameters may be NumPy arrays, as from `np.load`, and tokens may be lists, also inside jit."""
    functions = main.model, main.loss, main.cross_attention_weights
    for function in (*functions, lambda params, source, _: main.generate(params, source)):
        expected = jax.jit(function)(jax.tree.map(jnp.asarray, params), SOURCE, TARGET)
        closed_over = jax.jit(lambda function=function: function(params, SOURCE.tolist(), TARGET.tolist()))()
        np.testing.assert_allclose(closed_over, expected, atol=1e-5)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_generate_keeps_the_dtype_of_its_source(params, dtype):
    """The target has the dtype of the source, under x64, too, and without a warning."""
    with jax.enable_x64(True):
        assert jax.eval_shape(main.generate, params, SOURCE.astype(dtype)).dtype == dtype


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


# ---- The program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def default_run():
    """The output of `python main.py TEXT` on one device."""
    (output,) = finished(start(TEXT, XLA_FLAGS=""))
    return output


def test_the_default_run_reverses_a_text_it_never_saw(default_run):
    """`python main.py TEXT` prints its five parts in order, learns to reverse, and draws the anti-diagonal."""
    headings = ["Parameters", "Forward pass", "Training", "Result", "Attention"]
    assert re.findall(r"^\d\. (\w+(?: pass)?)", default_run, re.MULTILINE) == headings
    assert f'output  "{TEXT[::-1]}"\n' in default_run
    steps = re.findall(r'^step +\d+  loss +[\d.]+  accuracy +([\d.]+)%  ".{23}"$', default_run, re.MULTILINE)
    assert len(steps) == 6
    pattern = r"^exact matches: (\d+)/16 \(final parameters\), (\d+)/16 \(average of the last 75 steps\)$"
    final, mean = map(int, re.search(pattern, default_run, re.MULTILINE).groups())
    assert mean >= max(final, 15)
    assert (final == 16) == (float(steps[-1]) == 100)  # all strings match if all characters do
    assert all(len(line) <= 80 for line in default_run.splitlines())
    rows, offset = default_run.splitlines()[-len(TEXT) :], 2 + len(TEXT) + 4 + 2
    after = [row.find("█", offset) - offset for row in rows]
    # Output i attends to input i from the end. A weight may be split between two neighbors.
    assert sum(column == len(TEXT) - 1 - i for i, column in enumerate(after)) >= len(TEXT) - 4
    before = [row[2 : 2 + len(TEXT)].find("█") for row in rows]
    assert sum(column == len(TEXT) - 1 - i for i, column in enumerate(before)) <= 4


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
    blocks, plain = (run_here(monkeypatch, "Hello", *SMALL, encoding=encoding) for encoding in ("utf-8", "ascii"))
    for expected in (
        "(2, 16, 2, 8)",  # layers, d_model, heads, d_k
        "(2, 16, 24)",  # layers, d_model, d_ff
        "(8, 5, 96)",  # logits: batch size, length, vocab_size
        f"({jax.device_count()}, 1)  (data, model)\n",
        "step     7  loss",
        "exact matches: 0/8 (final parameters), 0/8 (average of the last 7 steps)",
        "  Hello              Hello\n",
    ):
        assert expected in blocks
    assert plain.isascii()
    without_times = [re.sub(r" *[\d.]+ ms", "", output) for output in (blocks, plain)]
    assert without_times[0].translate(str.maketrans("░▒▓█", ".:*#")) == without_times[1]


def test_no_steps_and_a_long_text(monkeypatch):
    """`--steps 0` trains nothing, so the two maps are equal. Maps too wide for 80 columns go below each other."""
    output = run_here(monkeypatch, "0123456789" * 4, *SMALL, "--steps", "0")
    assert "3. Training: skipped (--steps 0)\n\n4. " in output
    assert "exact matches: 0/8 (final parameters)\n" in output
    before, after = re.search(r"before training\n(.*)after training\n(.*)", output, re.DOTALL).groups()
    assert before == after
    assert len(before.splitlines()) == 41
    assert all(len(line) <= 80 for line in output.splitlines())


def test_six_layers_learn(monkeypatch):
    """The paper's depth: six layers also learn to reverse every test string."""
    sizes = ["--num-layers", "6", "--num-heads", "1", "--d-model", "32", "--d-ff", "32", "--warmup-steps", "400"]
    output = run_here(monkeypatch, "abc", *sizes, "--batch-size", "32", "--steps", "200")
    assert "32/32 (average of the last 75 steps)" in output


def test_a_closed_pipe():
    """`python main.py | head -1` ends without a traceback."""
    with start(*SMALL, "--steps", "0", "Hello") as process:
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["naïve"], r"TEXT must be printable ASCII, got 'na\xefve'"),
        ([""], "TEXT must have 1 to 100 characters, got 0"),
        (["x" * 101], "TEXT must have 1 to 100 characters, got 101"),
        (["two", "words"], 'put TEXT in quotes if it has several words: "two words"'),
        (["--d-ff", "0"], "--d-ff must be from 1 to 2^31 - 1, got 0"),
        (["--steps", "-1"], "--steps must be from 0 to 2^31 - 1, got -1"),
        (["--seed", "2147483648"], "--seed must be from 0 to 2^31 - 1, got 2147483648"),
        (["--d-model", "1.5"], "argument --d-model: invalid int value: '1.5'"),
        (["--d-model", "9"], "--d-model must be even (sines and cosines come in pairs), got 9"),
        (["--num-heads", "3"], "--num-heads must divide --d-model, got 3 and 64"),
        (["--model-parallel", "3"], "--model-parallel must divide the number of devices, got 3 and 8"),
        (["--model-parallel", "8"], "--model-parallel must divide --num-heads, got 8 and 4"),
        (["--model-parallel", "4", "--d-ff", "6"], "--model-parallel must divide --d-ff, got 4 and 6"),
        (["--batch-size", "12"], "--batch-size must be a multiple of 8 (devices / --model-parallel), got 12"),
        (["--distributed"], "--distributed: JAX found no launcher; use srun, or mpirun of Open MPI 4"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    """Invalid input prints the usage and an error that names the flag, and exits with status 2."""

    def no_launcher():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax.distributed, "initialize", no_launcher)  # its error without a launcher
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output) == (2, "")
    assert errors.startswith("usage: main.py ")
    assert errors.endswith(f"main.py: error: {message}\n")
