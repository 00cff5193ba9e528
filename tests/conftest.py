"""How the tests stay quick: by what XLA is told before it starts, and by programs that run beside the other tests.

The tests are about numbers, so XLA compiles them quickly instead of well, in a third of the time. `XLA_FLAGS= python -m
pytest` compiles them as any other program.
"""

import gc
import os

import jax

gc.disable()  # to look through all that JAX has traced, again and again, takes a tenth of the time and frees little

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # XLA ends the process where it does not know a flag: only where it was tried
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

from common import EARLY  # noqa: E402 - only now may JAX be used


def pytest_collection_modifyitems(items):
    """What waits for a program comes last."""
    items.sort(key=lambda item: not EARLY.keys().isdisjoint(item.fixturenames))


def pytest_collection_finish(session):
    """Begin the program runs that the collected tests ask for."""
    if not session.config.option.collectonly:
        for name in dict.fromkeys(name for item in session.items for name in item.fixturenames):
            EARLY.get(name, bool)()
