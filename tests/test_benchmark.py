"""tests/benchmark.py still runs; its figures are not checked, for no test depends on time."""

import sys

import benchmark


def test_quick_benchmark_prints_its_tables(monkeypatch, capsys):
    """`python tests/benchmark.py --quick` prints the three tables of README, with every contestant in them."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick"])
    benchmark.main()
    output = capsys.readouterr().out
    for expected in ("| n |  | plain | flash | jax.nn |", "| 64 | gradient |", "| encoder_layer | gradient |"):
        assert expected in output
    assert "| time to compile | 1 layers | 2 layers | ratio |" in output
