"""Where and how the tests run: on the CPU with 8 virtual devices, compiled quickly, with programs run beside them.

JAX reads these variables when it starts. The caller's own values win: `JAX_PLATFORMS=cuda python -m pytest` runs on a
GPU, `XLA_FLAGS= python -m pytest` compiles as any other program does.
"""

import gc
import os

# Unasked, JAX would take a GPU. Beside one, the tests of sharding still need the CPU, for its virtual devices.
platforms = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ["JAX_PLATFORMS"] = platforms if "cpu" in platforms else f"{platforms},cpu"
# On a GPU, JAX multiplies float32 matrices in fewer bits, unless it is asked for all of them.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax  # noqa: E402 - the two variables above come first

# The tests are about numbers, so XLA compiles them quickly instead of well, in a third of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # XLA ends the process where it does not know a flag: only where it was tried
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"{QUICK} --xla_force_host_platform_device_count=8")

gc.disable()  # to look through all that JAX has traced, again and again, takes a tenth of the time and frees little

from common import EARLY  # noqa: E402 - only now may JAX be used


def pytest_collection_modifyitems(items):
    """What waits for a program comes last."""
    items.sort(key=lambda item: not EARLY.keys().isdisjoint(item.fixturenames))


def pytest_collection_finish(session):
    """Begin the program runs that the collected tests ask for."""
    if not session.config.option.collectonly:
        for name in dict.fromkeys(name for item in session.items for name in item.fixturenames):
            EARLY.get(name, bool)()
