"""What several test files share: random inputs and parameters, made by NumPy so that nothing is compiled for them."""

import jax
import jax.numpy as jnp
import numpy as np

try:
    from jax import enable_x64
except ImportError:  # its place in older versions of JAX
    from jax.experimental import enable_x64

__all__ = ["arrays", "enable_x64", "random_params"]


def arrays(*shapes, seed=0, dtype=jnp.float32):
    """Standard normal arrays of the given shapes."""
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def random_params(init, *sizes, seed=0):
    """The tree of `init(rng, *sizes)` with normal leaves: also the biases and scales differ from 0 and 1."""
    tree = jax.eval_shape(lambda: init(jax.random.key(0), *sizes))
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.4 * generator.standard_normal(leaf.shape)).astype(np.float32), tree)
