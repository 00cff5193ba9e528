"""README.md: its commands and code run, and its excerpts are in the source."""

import ast
import functools
import itertools
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from attention import causal_mask, padding_mask, scaled_dot_product_attention
from common import arrays, random_params
from transformer_layer import encoder_layer, init_encoder_layer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "".join(
    (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("attention", "transformer_layer", "main")
)
BLOCKS = {kind: [] for kind in ("sh", "py", "python", "text")}
for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
    BLOCKS[kind].append(text)
COMMANDS = re.findall(r"`(python [^`]+)`", README) + re.findall(r"\bpython main\.py .*", "".join(BLOCKS["sh"]))


def test_ci_runs_the_first_two_commands():
    """.ci/run contains README's commands to install, run and test, as they are."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "".join(BLOCKS["sh"][:2]) in script


def test_excerpts_are_in_the_source():
    """README shows the equations as they are in the files."""
    excerpts = [excerpt for block in BLOCKS["py"] for excerpt in block.rstrip().split("\n\n")]
    assert len(excerpts) == 3
    for excerpt in excerpts:
        assert f"\n{excerpt}\n" in SOURCE


def test_links_and_names():
    """Linked files exist, and the functions in the guided reading are defined in the source."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).is_file(), target
    rows = re.findall(r"^\| (?:\d\.\d|Figure).*? \| (`.*?) \|", README, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) >= 20
    for name in names:
        assert f"\ndef {name}(" in SOURCE, name


def test_the_python_blocks_run():
    """Each block that ends in a comment has this result. `cudnn_attention` gives plain attention's results."""
    names, results = {}, 0
    for text in BLOCKS["python"]:
        exec(text if jax.default_backend() == "gpu" else text.replace('"cudnn"', "None"), names)
        for expression, result in re.findall(r"^(\S.*?)  # (.*)\n\Z", text, re.MULTILINE):
            assert str(eval(expression, names)) == result, expression
            results += 1
    assert results == 5

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    tolerance = 2e-6 if dtype == jnp.float32 else 0.05
    inputs = arrays((2, 3, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16), dtype=dtype)
    masks = None, padding_mask(jnp.array([5, 8]), 8), causal_mask(8)
    for mask, causal in itertools.product(masks, (False, True)):
        output, expected = (
            jax.jit(functools.partial(function, causal=causal))(*inputs, mask)
            for function in (names["cudnn_attention"], scaled_dot_product_attention)
        )
        np.testing.assert_allclose(output.astype(float), expected.astype(float), atol=tolerance)
    layer = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(init_encoder_layer, 48, 3, 8))
    x = arrays((2, 8, 48), dtype=dtype)[0]
    output, expected = (
        encoder_layer(layer, x, masks[1], attention=attention)
        for attention in (names["cudnn_attention"], scaled_dot_product_attention)
    )
    np.testing.assert_allclose(output.astype(float), expected.astype(float), atol=5 * tolerance)


def test_the_parameter_tree():
    """README shows the names and shapes of an encoder layer's parameters."""
    params = jax.eval_shape(lambda: init_encoder_layer(jax.random.key(0), d_model=512, num_heads=8, d_ff=2048))
    lines = [
        f"{name:<23}" + "  ".join(f"{key} {leaf.shape}" for key, leaf in leaves.items())
        for name, leaves in params.items()
    ]
    assert "\n".join(lines) + "\n" in BLOCKS["text"]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_are_accepted(monkeypatch, command):
    """Each command runs a script that exists, and main.py accepts its arguments."""
    script, *arguments = shlex.split(command.removeprefix("python "), comments=True)
    if script == "-m":  # pytest
        script, arguments = next(word for word in arguments if word.startswith("tests/")), []
    assert (ROOT / script).is_file()
    if script == "main.py" and not {"--help", "--distributed"} & set(arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        monkeypatch.setattr(jax, "make_mesh", lambda *arguments, **options: None)
        main.parse_arguments()


def test_the_pictures_show_the_source():
    """The code in the boxes of the pictures is in the source."""
    tree = ast.parse((ROOT / "images" / "draw.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "code"]
    assert len(calls) >= 10
    for call in calls:
        assert call.args[0].value in SOURCE, call.args[0].value
