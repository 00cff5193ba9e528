"""README.md: its commands run, its code runs, and what it says of the source and the tests is so."""

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
import test_paper
from attention import causal_mask, padding_mask, scaled_dot_product_attention
from common import arrays, random_params
from transformer_layer import encoder_layer, init_encoder_layer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"`(python [^`]+)`", README) + re.findall(
    r"\bpython main\.py [^&;\n]*", "".join(text for kind, text in BLOCKS if kind == "sh")
)


def test_the_claims_that_readme_names():
    """README's five claims are those of tests in test_paper.py: the first lines of their docstrings."""
    docstrings = [function.__doc__ for name, function in vars(test_paper).items() if name.startswith("test_")]
    claims = [re.sub(r"^Section |, (Equation|Table|footnote) \d", "", text.splitlines()[0]) for text in docstrings]
    named = re.findall(r"^- (\d\.[\d.]*: .*)$", README, re.MULTILINE)
    assert len(named) == 5
    for claim in named:
        assert f"{claim}." in claims


def test_verbose_output_is_the_list_of_claims(capsys):
    """`python -m pytest tests/test_paper.py -v` shows each test's claim below its name."""
    name = "test_5_3_learning_rate_peaks_at_warmup_and_falls_as_the_inverse_square_root"
    assert pytest.main([f"{test_paper.__file__}::{name}", "-v", "-p", "no:cacheprovider"]) == 0
    claim = getattr(test_paper, name).__doc__.splitlines()[0]
    assert re.search(rf"::{name} PASSED\n    {re.escape(claim)}", capsys.readouterr().out)


def test_links_lead_to_their_lines():
    """The guided reading links each function to the line of its definition; all linked files exist."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 16
    for name, file, line in links:
        assert (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1].startswith(f"def {name}("), name
    for target in re.findall(r"\]\((?!https?:|\.\./)([^)#]+)", README):
        assert (ROOT / target).is_file(), target


def python_blocks():
    """The names that the Python blocks define, run one after the other; cuDNN's kernel is XLA's where there is none.

    The last line of each of the five on JAX shows something, with the result as a comment behind it.
    """
    names, blocks, shown = {}, [text for kind, text in BLOCKS if kind == "python"], 0
    assert len(blocks) == 6
    for text in blocks:
        exec(text if jax.default_backend() == "gpu" else text.replace('"cudnn"', "None"), names)
        for expression, result in re.findall(r"^(\S.*?)  # (.*)\n\Z", text, re.MULTILINE):
            assert str(eval(expression, names)) == result, expression
            shown += 1
    assert shown == 5
    return names


def test_the_python_blocks_run():
    """The blocks on JAX run, and the adapter of "On a GPU" gives the plain function's numbers, alone and in a layer."""
    attend = python_blocks()["cudnn_attention"]
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    tolerance = 2e-6 if dtype == jnp.float32 else 0.05
    inputs = arrays((2, 3, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16), dtype=dtype)
    masks = None, padding_mask(jnp.array([5, 8]), 8), causal_mask(8)
    for mask, causal in itertools.product(masks, (False, True)):
        output, expected = (
            jax.jit(functools.partial(function, causal=causal))(*inputs, mask)
            for function in (attend, scaled_dot_product_attention)
        )
        np.testing.assert_allclose(output.astype(float), expected.astype(float), atol=tolerance)
    layer = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(init_encoder_layer, 48, 3, 8))
    x = arrays((2, 8, 48), dtype=dtype)[0]
    output, expected = encoder_layer(layer, x, masks[1], attention=attend), encoder_layer(layer, x, masks[1])
    np.testing.assert_allclose(output.astype(float), expected.astype(float), atol=5 * tolerance)


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
    script, *arguments = shlex.split(command.replace("NAME", "rotary").removeprefix("python "), comments=True)
    if script == "-m":  # pytest
        script, arguments = next((word for word in arguments if word.startswith("tests/")), "tests/conftest.py"), []
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
