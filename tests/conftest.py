"""Before JAX starts: the tests are about numbers, so LLVM need not optimize, which halves the time to compile them."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
