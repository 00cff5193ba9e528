"""Sets up JAX for the tests: the CPU with 8 virtual devices, and fast compilation.

Your own values of these variables take precedence: `JAX_PLATFORMS=cuda python -m pytest` runs on a GPU, and
`XLA_FLAGS= python -m pytest` compiles with full optimization.
"""

import os

# Even on a GPU, the sharding tests need the virtual devices of the CPU.
platforms = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ["JAX_PLATFORMS"] = platforms if "cpu" in platforms else f"{platforms},cpu"
# On a GPU, JAX multiplies float32 matrices in lower precision by default.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax  # noqa: E402 - JAX reads the variables above at import

# The tests run small programs once, so favor compile time: these flags cut it to a third.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # XLA aborts on unknown flags; this one was tested up to 0.10
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"{FLAGS} --xla_force_host_platform_device_count=8")
