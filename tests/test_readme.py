"""README.md: its commands and code run, and its excerpts are in the source."""

import ast
import datetime
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

import main
from transformer_layer import init_encoder_layer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
BLOCKS = {kind: [] for kind in ("sh", "py", "python", "text")}
for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
    BLOCKS[kind].append(text)
COMMANDS = re.findall(r"`[^`\n]*\b(python [^`\n]+)`", README)


def test_ci_runs_the_first_commands():
    """.ci/run contains README's commands to install, run and test, as they are."""
    assert BLOCKS["sh"][0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_excerpts_are_in_the_source():
    """README shows the equations as they are in the files."""
    (excerpt,) = BLOCKS["py"]
    assert f"\n{excerpt}" in SOURCE


def test_links_and_names():
    """Linked files exist, and the functions in the guided reading are defined in the source."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).is_file(), target
    rows = re.findall(r"^\| (?:\d\.\d|Figure).*? \| (`.*?) \|", README, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 20
    for name in names:
        assert f"\ndef {name}(" in SOURCE, name


def test_the_python_blocks_run(monkeypatch, tmp_path):
    """The first block writes dates and their ISO form. Each other block ends in an expression and its result."""
    monkeypatch.chdir(tmp_path)
    first, *blocks = BLOCKS["python"]
    exec(first, {})
    pairs = main.read_pairs("dates.tsv")
    assert pairs.shape == (20_000, 2)
    assert all(datetime.date.fromisoformat(target).strftime("%Y") in source for source, target in pairs)
    assert len(blocks) == 7
    names = {}
    for text in blocks:
        exec(text, names)
        expression, result = text.splitlines()[-1].split("  # ")
        assert repr(eval(expression, names)) == result


def test_the_parameter_tree():
    """README shows the names and shapes of an encoder layer's parameters."""
    params = jax.eval_shape(lambda: init_encoder_layer(jax.random.key(0), d_model=512, num_heads=8, d_ff=2048))
    lines = [
        f"{name:<23}" + "  ".join(f"{key} {leaf.shape}" for key, leaf in leaves.items())
        for name, leaves in params.items()
    ]
    assert "\n".join(lines) + "\n" in BLOCKS["text"]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_are_accepted(monkeypatch, tmp_path, command):
    """Each command runs a script that exists, and main.py accepts its arguments."""
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["python"][0], {})  # writes dates.tsv
    script, *arguments = shlex.split(command.removeprefix("python "), comments=True)
    if script == "-m":  # pytest
        script, arguments = next(word for word in arguments if word.startswith("tests/")), []
    assert (ROOT / script).is_file()
    if script == "main.py" and not {"--help", "--distributed"} & set(arguments):
        args = main.argument_parser().parse_args(arguments)
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        monkeypatch.setattr(jax, "make_mesh", lambda *arguments, **options: None)
        main.make_data(args, np.random.default_rng(0))
        main.make_mesh(args)


def test_the_pictures_show_the_source():
    """The code in the boxes of the pictures is in the source."""
    tree = ast.parse((ROOT / "images" / "draw.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "code"]
    assert len(calls) >= 10
    for call in calls:
        assert call.args[0].value in SOURCE, call.args[0].value
