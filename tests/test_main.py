"""main.py: the model around the encoder, its training, and the program as a user runs it."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from common import early, random_params

PROGRAM = [sys.executable, str(Path(main.__file__))]
SMALL = {"length": 12, "d-model": 16, "num-heads": 2, "num-layers": 2, "d-ff": 24, "batch-size": 1, "steps": 7}
SMALL = [word for flag, value in SMALL.items() for word in (f"--{flag}", str(value))]


def run(*arguments, **environment):
    """Run main.py as a user does, and return its standard output."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "XLA_FLAGS": "", **environment}
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, encoding="utf-8", env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@early
def default_run():
    """The output of `python main.py TEXT`."""
    return run("Never odd or even, 1234")


def test_the_default_run_reverses_a_text_it_never_saw(default_run):
    """`python main.py TEXT` shows its five parts in order, learns to reverse, and draws the anti-diagonal."""
    output = default_run
    headings = ["Parameters", "Forward pass", "Training", "Result", "Attention"]
    assert re.findall(r"^\d\. (\w+(?: pass)?)", output, re.MULTILINE) == headings
    assert "output  4321 ,neve ro ddo reveN\n" in output
    assert float(re.findall(r"accuracy on held-out strings +([\d.]+)%", output)[-1]) >= 99
    assert float(re.search(r"largest difference +(\S+)", output)[1]) < 1e-5
    assert all(len(line) <= 80 for line in output.splitlines())
    heat_maps = output.splitlines()[-32:]
    # After training, the darkest cell of row i is the one of column 31 - i, or its neighbour where two are close.
    darkest = [line[40:].find("█") for line in heat_maps]
    assert sum(abs(column - (31 - row)) <= 1 for row, column in enumerate(darkest) if column >= 0) >= 24


def test_readme_shows_this_run(default_run):
    """Each line that README shows of the output is one of this run, in order, the numbers that vary aside."""

    def without_numbers(line):
        return re.sub(r" *\d[\d.e-]*(?=%| ms|$)|(?<=loss) +[\d.]+", " #", line.rstrip())

    readme = Path(main.__file__).with_name("README.md").read_text(encoding="utf-8")
    sample = re.search(r"^```text\n(2\. .*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
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

    `--steps 0` trains nothing and draws one map; an empty TEXT and a batch of one string are fine too.
    """
    blocks, plain = (run_here(monkeypatch, encoding, "Hello", *SMALL) for encoding in ("utf-8", "ascii"))
    for expected in (
        "(2, 16, 2, 8)",  # layers, d_model, heads, d_k
        "(2, 16, 24)",  # layers, d_model, d_ff
        "(1, 12, 95)",  # logits: batch size, length, symbols
        "step     7  loss",
        "5. Attention of layer 2 of 2, heads 1 to 2 of 2: before | after 7 steps",
    ):
        assert expected in blocks
    assert plain.isascii()
    without_times = [re.sub(r" *[\d.]+ ms", "", output) for output in (blocks, plain)]
    assert without_times[0].translate(str.maketrans("░▒▓█", ".:*#")) == without_times[1]

    untrained = run_here(monkeypatch, "utf-8", "", *SMALL, "--steps", "0")
    assert "no steps: the model stays untrained" in untrained
    assert "heads 1 to 2 of 2: untrained" in untrained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["naïve"], r"TEXT must be printable ASCII, got '\xef'"),
        (["tab\t"], r"TEXT must be printable ASCII, got '\t'"),
        (["x" * 33], "TEXT must fit into --length 32, got 33 characters"),
        (["--length", "8"], "TEXT must fit into --length 8, got 25 characters"),
        *(
            ([flag, "0"], f"argument {flag}: must be an integer from 1 to 2^31 - 1, got '0'")
            for flag in ("--length", "--d-model", "--num-heads", "--num-layers", "--d-ff", "--batch-size")
        ),
        (["--steps", "-1"], "argument --steps: must be an integer from 0 to 2^31 - 1, got '-1'"),
        (["--seed", "1.5"], "argument --seed: must be an integer from 0 to 2^31 - 1, got '1.5'"),
        (["--d-model", "9"], "--d-model must be even and a multiple of --num-heads, got 9 and 1"),
        (["--num-heads", "3"], "--d-model must be even and a multiple of --num-heads, got 64 and 3"),
        (["--seed", "2147483648"], "argument --seed: must be an integer from 0 to 2^31 - 1, got '2147483648'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    """Wrong input ends with exit status 2 and one sentence on standard error."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"main.py: {message}\n")


def test_interrupt():
    """Ctrl-C ends the program with status 130 and no traceback."""
    process = subprocess.Popen(
        [*PROGRAM, "--steps", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("1. Parameters")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")


def test_positional_encoding_needs_an_even_width():
    """Section 3.5: sines and cosines come in pairs, so an odd d_model raises one sentence."""
    with pytest.raises(ValueError, match="d_model must be even, for sines and cosines come in pairs, got 5"):
        main.positional_encoding(4, 5)


def test_model_shapes_and_tied_embedding():
    """Tokens (..., n) -> logits (..., n, s), with one embedding matrix at both ends (section 3.4)."""
    params = random_params(main.init_model, 11, 2, 8, 2, 16)
    assert set(params) == {"embedding", "encoder"}
    tokens = jnp.arange(15).reshape(3, 5) % 11
    assert jax.eval_shape(main.model, params, tokens).shape == (3, 5, 11)
    assert jax.eval_shape(main.model, params, tokens[0]).shape == (5, 11)


def test_adam_first_step():
    """Adam's first step moves each parameter by the learning rate against the sign of its gradient."""
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    gradient = {"a": jnp.array([0.5, -1e-3]), "b": jnp.array(7.0)}
    updated, _ = jax.jit(main.adam)(params, main.init_adam(params), gradient, 1.0, 0.25)
    np.testing.assert_allclose(updated["a"], [0.75, -1.75], rtol=1e-5)
    np.testing.assert_allclose(updated["b"], 2.75, rtol=1e-5)
