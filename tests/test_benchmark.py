"""tests/benchmark.py still runs; its figures are not checked, for no test depends on time."""

import subprocess
import sys
from pathlib import Path

from common import early


@early
def quick_benchmark():
    """The finished `python tests/benchmark.py --quick`."""
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "--quick"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_quick_benchmark_prints_its_tables(quick_benchmark):
    """`python tests/benchmark.py --quick` prints the three tables of README, with every contestant in them."""
    assert (quick_benchmark.returncode, quick_benchmark.stderr) == (0, "")
    for expected in ("| n |  | plain | flash | jax.nn |", "| 64 | gradient |", "| encoder_layer |"):
        assert expected in quick_benchmark.stdout
    assert "| time to compile | 1 layers | 2 layers | ratio |" in quick_benchmark.stdout
