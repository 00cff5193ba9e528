"""Before XLA starts: the tests are about numbers, so it compiles them quickly instead of well, in a third of the time.

`XLA_FLAGS= python -m pytest` compiles them as any other program.
"""

import os

import jax

QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # XLA ends the process where it does not know a flag: only where it was tried
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)
