"""What several test files share: random inputs and parameters, and programs that run beside the tests."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

try:
    from jax import enable_x64
except ImportError:  # its place in older versions of JAX
    from jax.experimental import enable_x64

__all__ = ["EARLY", "arrays", "early", "enable_x64", "many_devices", "random_params"]

# A mark for tests that need the 8 virtual devices of the CPU that conftest.py asks for.
many_devices = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="XLA_FLAGS asks for fewer than 8 CPU devices")

EARLY = {}  # what begins, by the name of its fixture
WORKER = ThreadPoolExecutor(max_workers=1)  # beside the tests, one program at a time fills two cores


def early(function):
    """A session fixture that conftest.py begins in the background as soon as a test that asks for it is collected."""
    future = functools.cache(lambda: WORKER.submit(function))
    EARLY[function.__name__] = future
    return pytest.fixture(scope="session", name=function.__name__)(lambda: future().result())


def arrays(*shapes, seed=0, dtype=jnp.float32):
    """Standard normal arrays of the given shapes, made by NumPy so that nothing is compiled for them."""
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def random_params(init, *sizes, seed=0):
    """The tree of `init(rng, *sizes)` with normal leaves: also the biases and scales differ from 0 and 1."""
    tree = jax.eval_shape(lambda: init(jax.random.key(0), *sizes))
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.4 * generator.standard_normal(leaf.shape)).astype(np.float32), tree)
