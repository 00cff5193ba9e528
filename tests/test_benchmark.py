"""tests/benchmark.py runs, at small sizes. Times are not checked."""

import pytest

import benchmark


@pytest.mark.parametrize(
    ("table", "arguments", "rows"),
    [
        (benchmark.attention_table, (1, [64], "float32", 1), ["| n = 64, forward |", "| n = 64, gradient |"]),
        (benchmark.layer_table, ("small", 1, 8, "float32", 1), ["| its matrix products |", "| encoder_layer |"]),
        (benchmark.model_table, (2, 8, 1, 16, 2, 32, 1), ["| training step |", "| greedy decoding |"]),
    ],
)
def test_tables(table, arguments, rows, monkeypatch, capsys):
    """Each table has a row for each measurement."""
    monkeypatch.setitem(benchmark.MODELS, "small", (16, 2, 32))
    monkeypatch.setattr(benchmark, "installed", lambda package: False)
    table(*arguments)
    output = capsys.readouterr().out
    for row in rows:
        assert row in output
    assert output.count(" ms") >= 2
