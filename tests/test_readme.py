"""README.md: what it says about the tests is so."""

from pathlib import Path

import test_paper


def test_the_table_of_the_papers_claims():
    """README's table of claims has a row for each test of test_paper.py, in order: its docstring's first line."""
    expected = ["| claim | section | test |", "| --- | --- | --- |"]
    for name, function in vars(test_paper).items():
        if name.startswith("test_"):
            section, claim = function.__doc__.splitlines()[0].split(": ", maxsplit=1)
            expected.append(f"| {claim.removesuffix('.')} | {section.removeprefix('Section ')} | `{name}` |")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## The paper's claims and their tests\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == expected
