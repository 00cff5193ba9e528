"""main.py: the model of Figure 1, its training, and the program as a user runs it."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
import transformer_layer as tl
from attention import attention_weights, padding_mask
from common import early, random_params

PROGRAM = [sys.executable, str(Path(main.__file__))]
TEXT = "Never odd or even, 1234"
SMALL = {"d-model": 16, "num-heads": 2, "num-layers": 2, "d-ff": 24, "batch-size": 8, "steps": 7}
SMALL = [word for flag, value in SMALL.items() for word in (f"--{flag}", str(value))]

# ---- The model -------------------------------------------------------------------------------------------------------

SOURCE, TARGET = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.array([[2, 7, 1], [8, 2, 8]])


@pytest.fixture(scope="module")
def params():
    """A model of 11 symbols and two layers, of normal numbers."""
    return random_params(main.init_model, 11, 2, 8, 2, 16)


def test_positional_encoding_needs_an_even_width():
    """Section 3.5: sines and cosines come in pairs, so an odd d_model raises one sentence."""
    with pytest.raises(ValueError, match="d_model must be even, for sines and cosines come in pairs, got 5"):
        main.positional_encoding(4, 5)


def test_model_shapes(params):
    """Tokens (..., m) and (..., n) -> logits (..., n, s), with any leading axes."""
    assert set(params) == {"embedding", "encoder", "decoder"}
    assert jax.eval_shape(main.model, params, SOURCE, TARGET).shape == (2, 3, 11)
    assert jax.eval_shape(main.model, params, SOURCE[0], TARGET[0]).shape == (3, 11)


def test_the_mask_hides_positions_of_the_source(params):
    """With a padding mask, the logits are those of the source without its padding."""
    model = jax.jit(main.model)
    masked = model(params, SOURCE, TARGET, padding_mask(jnp.array([3, 3]), 5))
    np.testing.assert_allclose(masked, model(params, SOURCE[:, :3], TARGET), atol=1e-5)
    assert abs(masked - model(params, SOURCE, TARGET)).max() > 0.01


def test_dropout_of_encoder_and_decoder_differs(params, monkeypatch):
    """A random key makes dropout, another one in each sub-layer of encoder and decoder."""
    seen = []

    def spy(rng, x, rate):
        jax.debug.callback(lambda data: seen.append(tuple(np.ravel(data).tolist())), jax.random.key_data(rng))
        return x

    monkeypatch.setattr(tl, "dropout", spy)
    main.model(params, SOURCE, TARGET, dropout_rng=jax.random.key(0))
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2 * (2 + 3)


def test_generate_is_greedy(monkeypatch):
    """Each token is the likeliest one after START and the tokens so far, but never START itself.

    The model is one whose answer is plain: token i is 1 + (source i + the sum of the target so far + its last token)
    mod 10.
    """

    def plain_model(params, source, target):
        wanted = 1 + (source + jnp.cumsum(target, axis=-1) + target) % 10
        return jax.nn.one_hot(wanted, 11) + 2 * jax.nn.one_hot(main.START, 11)

    monkeypatch.setattr(main, "model", plain_model)
    written = []
    for i in range(SOURCE.shape[1]):
        written.append(1 + (SOURCE[:, i] + sum(written) + (written[-1] if written else main.START)) % 10)
    np.testing.assert_array_equal(jax.jit(lambda: main.generate({}, SOURCE))(), np.stack(written, axis=1))


def test_cross_attention_is_that_of_the_last_layer(params):
    """The weights kept by the attention handed in are softmax(Q K^T / sqrt(d_k)) of the last layer, Q from its norm."""
    weights = jax.jit(main.cross_attention_weights)(params, SOURCE, TARGET)
    memory = tl.encoder(params["encoder"], main.embed(params, SOURCE))
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], params["decoder"]) for i in (0, 1))
    x = tl.decoder_layer(first, main.embed(params, main.shift_right(TARGET)), memory)
    attended = tl.multi_head_attention(last["self_attention"], x, x, x, causal=True)
    x = tl.layer_norm(last["self_attention_norm"], x + attended)
    projections = last["cross_attention"]
    query = jnp.einsum("bnd,dhk->bhnk", x, projections["query"])
    key = jnp.einsum("bmd,dhk->bhmk", memory, projections["key"])
    np.testing.assert_allclose(weights, attention_weights(query, key), atol=1e-5)


# ---- Its training ----------------------------------------------------------------------------------------------------


def test_adam_first_step():
    """Adam's first step moves each parameter by the learning rate against the sign of its gradient."""
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    gradient = {"a": jnp.array([0.5, -1e-3]), "b": jnp.array(7.0)}
    updated, _ = jax.jit(main.adam)(params, main.init_adam(params), gradient, 1, 0.25)
    np.testing.assert_allclose(updated["a"], [0.75, -1.75], rtol=1e-5)
    np.testing.assert_allclose(updated["b"], 2.75, rtol=1e-5)


def test_train_step_is_adam_on_the_gradient_of_the_loss(params):
    """One jitted step returns what its parts return, one after the other."""
    new, moments, value = jax.jit(main.train_step)(params, main.init_adam(params), 1, SOURCE, TARGET)
    gradient = jax.jit(jax.grad(main.loss))(params, SOURCE, TARGET)
    rate = 8**-0.5 * main.WARMUP_STEPS**-1.5
    expected, expected_moments = jax.jit(main.adam)(params, main.init_adam(params), gradient, 1, rate)
    np.testing.assert_allclose(value, jax.jit(main.loss)(params, SOURCE, TARGET), rtol=1e-6)
    for actual, exact in zip(jax.tree.leaves(moments), jax.tree.leaves(expected_moments), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-3, atol=1e-7)
    for actual, exact in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, exact, atol=rate / 10)


# ---- The program -----------------------------------------------------------------------------------------------------


@early
def default_run():
    """The output of `python main.py TEXT` on one device."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "XLA_FLAGS": ""}
    done = subprocess.run(
        [*PROGRAM, TEXT], capture_output=True, encoding="utf-8", errors="replace", env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_default_run_reverses_a_text_it_never_saw(default_run):
    """`python main.py TEXT` shows its five parts in order, learns to reverse, and draws the anti-diagonal."""
    output = default_run
    headings = ["Parameters", "Forward pass", "Training", "Result", "Attention"]
    assert re.findall(r"^\d\. (\w+(?: pass)?)", output, re.MULTILINE) == headings
    assert f"written  {TEXT[::-1]}\n" in output
    assert len(re.findall(r"^step +\d+  loss +[\d.]+  right +[\d.]+%  .{23}$", output, re.MULTILINE)) == 6
    last, mean = map(
        int, re.search(r"last parameters (\d+), mean of last 50 steps (\d+)$", output, re.MULTILINE).groups()
    )
    assert mean >= max(last, 31)
    right = float(re.findall(r"right +([\d.]+)%", output)[-1])
    assert (last == 32) == (right == 100)  # all strings are right where all symbols are
    assert all(len(line) <= 80 for line in output.splitlines())
    heat_maps = output.splitlines()[-len(TEXT) :]
    darkest = [line.find("█", 2 + len(TEXT) + 4 + 2) - (2 + len(TEXT) + 4 + 2) for line in heat_maps]
    # Position i of the output is read at position i from the end; a weight may be split between two neighbours.
    assert sum(column == len(TEXT) - 1 - row for row, column in enumerate(darkest)) >= len(TEXT) - 4
    before = [line.ljust(80)[2 : 2 + len(TEXT)].find("█") for line in heat_maps]
    assert sum(column == len(TEXT) - 1 - row for row, column in enumerate(before)) <= 4


def test_readme_shows_this_run(default_run):
    """Each line that README shows of the output is one of this run, in order, the numbers that vary aside."""

    def without_numbers(line):
        line = re.sub(r"(?<=%)  .*", "", line)  # what a half-trained model writes
        return re.sub(r" *\d[\d.]*(?=%| ms|$)|(?<=loss) +[\d.]+|(?<=parameters )\d+", " #", line)

    readme = Path(main.__file__).with_name("README.md").read_text(encoding="utf-8")
    sample = re.search(r"^```text\n(3\. .*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    lines = iter([without_numbers(line) for line in default_run.splitlines()])
    for line in sample.splitlines():
        assert without_numbers(line) in lines, line


def run_here(monkeypatch, encoding, *arguments):
    """Run main.py in this process, which remembers what it has compiled, with a standard output of that encoding."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    monkeypatch.setattr(sys, "stdout", output)
    main.main()
    output.seek(0)
    return output.read()


def test_flags_seed_encoding_and_no_steps(monkeypatch):
    """All sizes can be set; the same seed gives the same output, times aside; ASCII terminals get ASCII maps.

    `--steps 0` trains nothing: the two maps are the same.
    """
    blocks, plain = (run_here(monkeypatch, encoding, "Hello", *SMALL) for encoding in ("utf-8", "ascii"))
    for expected in (
        "(2, 16, 2, 8)",  # layers, d_model, heads, d_k
        "(2, 16, 24)",  # layers, d_model, d_ff
        "(8, 5, 96)",  # logits: batch size, length, symbols
        "step     7  loss",
        "right to the letter: last parameters 0, mean of last 7 steps 0",
        "5. Attention over the source in decoder layer 2: before training | after",
    ):
        assert expected in blocks
    assert blocks.count("  Hello      Hello\n") == 2  # one for each head
    assert plain.isascii()
    without_times = [re.sub(r" *[\d.]+ ms", "", output) for output in (blocks, plain)]
    assert without_times[0].translate(str.maketrans("░▒▓█", ".:*#")) == without_times[1]

    untrained = run_here(monkeypatch, "ascii", "Hello", *SMALL, "--steps", "0")
    for line in untrained.splitlines()[-5:]:
        assert line.ljust(18)[2:7] == line.ljust(18)[13:18]


@early
def run_without_a_reader():
    """What main.py writes to standard error where nobody reads its standard output any more."""
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # output waits in a buffer, as it does unless asked otherwise
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen([*PROGRAM, *SMALL, "--steps", "0", "Hello"], env=environment, **pipes) as process:
        process.stdout.close()
        return process.stderr.read()


def test_a_reader_who_leaves(run_without_a_reader):
    """`python main.py | head -1` ends without a traceback."""
    assert run_without_a_reader == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["naïve"], r"TEXT must be one or more printable ASCII symbols, got 'na\xefve'"),
        (["tab\t"], r"TEXT must be one or more printable ASCII symbols, got 'tab\t'"),
        ([""], "TEXT must be one or more printable ASCII symbols, got ''"),
        (["two", "words"], 'TEXT of several words needs quotes: python main.py "two words"'),
        *(
            ([flag, "0"], f"{flag} must be an integer from 1 to 2^31 - 1, got '0'")
            for flag in ("--d-model", "--num-heads", "--num-layers", "--d-ff", "--batch-size", "--model-parallel")
        ),
        (["--steps", "-1"], "--steps must be an integer from 0 to 2^31 - 1, got '-1'"),
        (["--seed", "1.5"], "--seed must be an integer from 0 to 2^31 - 1, got '1.5'"),
        (["--seed", "2147483648"], "--seed must be an integer from 0 to 2^31 - 1, got '2147483648'"),
        (["--d-model", "9"], "d_model must be even, for sines and cosines come in pairs, got 9"),
        (["--num-heads", "3"], "num_heads must divide d_model, got 3 heads and d_model = 64"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--model-parallel", "3"], "--model-parallel must divide the number of devices, got 3 and 8"),
        (["--model-parallel", "2"], "--model-parallel must divide --num-heads, got 2 and 1"),
        (
            ["--model-parallel", "4", "--num-heads", "4", "--d-ff", "6"],
            "--model-parallel must divide --d-ff, got 4 and 6",
        ),
        (["--batch-size", "12"], "--batch-size must be a multiple of 8 on this mesh, got 12"),
        (["--distributed"], "--distributed needs a launcher that JAX knows, such as mpirun or srun"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    """Wrong input ends with exit status 2 and one sentence on standard error."""

    def no_launcher():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax.distributed, "initialize", no_launcher)  # what it does where none has started the process
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"main.py: {message}\n")
