"""README.md: its commands run, its code runs, and what it says of the source and the tests is so."""

import ast
import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

import main
import test_paper
from transformer_layer import init_encoder_layer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"`(python [^`]+)`", README) + re.findall(
    r"\bpython main\.py [^&;\n]*", "".join(text for kind, text in BLOCKS if kind == "sh")
)


def test_the_table_of_the_papers_claims():
    """README's table of claims has a row for each test of test_paper.py, in order: its docstring's first line."""
    expected = ["| claim | section | test |", "| --- | --- | --- |"]
    for name, function in vars(test_paper).items():
        if name.startswith("test_"):
            section, claim = function.__doc__.splitlines()[0].split(": ", maxsplit=1)
            expected.append(f"| {claim.removesuffix('.')} | {section.removeprefix('Section ')} | `{name}` |")
    section = README.split("\n## The paper's claims and their tests\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == expected


def test_links_lead_to_their_lines():
    """The guided reading links each function to the line of its definition; all linked files exist."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 16
    for name, file, line in links:
        assert (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1].startswith(f"def {name}("), name
    for target in re.findall(r"\]\((?!https?:|\.\./)([^)#]+)", README):
        assert (ROOT / target).is_file(), target


def test_the_examples_of_jax_run():
    """The Python blocks run one after the other, each of at most five lines and those that import."""
    names = {}
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 5
    for text in blocks:
        lines = [line for line in text.splitlines() if not line.startswith(("#", "import ", "from "))]
        assert len(lines) <= 5
        exec(text, names)


def test_the_parameters_as_a_tree():
    """README's tree of an encoder layer's parameters has their names and shapes."""
    params = jax.eval_shape(lambda: init_encoder_layer(jax.random.key(0), d_model=512, num_heads=8, d_ff=2048))
    lines = [
        f"{name:<23}" + "  ".join(f"{key} {leaf.shape}" for key, leaf in leaves.items())
        for name, leaves in params.items()
    ]
    assert "\n".join(lines) + "\n" in [text for kind, text in BLOCKS if kind == "text"]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_are_understood(monkeypatch, command):
    """Each command that README names is of a script that exists; main.py accepts its arguments.

    The runs themselves are tested in test_main.py, test_scale.py and test_benchmark.py, the first two by CI.
    """
    _, script, *arguments = shlex.split(command.replace("$i", "0"))
    assert (ROOT / script).is_file()
    if script == "main.py" and arguments != ["--help"]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        main.parse_arguments()


def test_the_pictures_show_the_source():
    """The lines of code in the pictures' boxes stand in attention.py or transformer_layer.py."""
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("attention.py", "transformer_layer.py"))
    tree = ast.parse((ROOT / "images" / "draw.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "code"]
    lines = [call.args[0].value for call in calls]
    assert len(lines) >= 10
    for line in lines:
        assert line in source, line
