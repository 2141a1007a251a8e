"""Random numbers, initializers, and parameters made from them.

All are float32. Kernels start from N(0, 1 / fan-in) unless a model says otherwise.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_CHUNK = 1 << 16
_SMALL_CHUNK = 1 << 12  # what most parameters fit in: the same numbers as the first of a chunk


@functools.partial(jax.jit, static_argnums=(1, 3))
def _sample_chunk(key, distribution: str, index, size: int):
    return getattr(jax.random, distribution)(jax.random.fold_in(key, index), (size,))


@jax.jit
def _fold_in(key, number):
    return jax.random.fold_in(key, number)


class FastRngs(nnx.Rngs):
    """The keys of `nnx.Rngs(seed).params`, each by one compiled call instead of several."""

    def __init__(self, seed):
        self._key = jax.random.key(seed) if isinstance(seed, int) else seed
        self._numbers = itertools.count()

    def params(self):
        return _fold_in(self._key, next(self._numbers))


class ShapeOnlyRngs(nnx.Rngs):
    """Replaces random streams where only shapes are needed: every number is zero.

    Tracing a draw per parameter takes longer than the rest of a model (10 s for `release`).
    """

    def __init__(self):
        pass

    def params(self):
        return None


def sample(rngs: nnx.Rngs, shape: tuple[int, ...], distribution: str = "normal"):
    """Returns random numbers of any shape, N(0, 1) or `uniform` in [0, 1).

    Sampled in chunks of two sizes: a compiled program per parameter shape would take half a minute.
    """
    key, size = rngs.params(), math.prod(shape)
    if key is None:
        return jnp.zeros(shape)
    chunk = _SMALL_CHUNK if size <= _SMALL_CHUNK else _CHUNK
    chunks = [_sample_chunk(key, distribution, i, chunk) for i in range(-(-size // chunk))]
    traced = isinstance(key, jax.core.Tracer)
    numpy = jnp if traced else np
    return numpy.concatenate(chunks)[:size].reshape(shape)


def array(values):
    """float32, on the default device.

    The type is given because JAX compiles a program for every shape of a NumPy array without one.
    """
    return jnp.asarray(values, jnp.float32)


def kernel_init(key, shape, dtype=jnp.float32):
    """Initializer for `nnx.Conv`: N(0, 1 / fan-in), as all kernels here start."""
    rngs = ShapeOnlyRngs() if key is None else FastRngs(key)
    return jnp.asarray(_kernel(rngs, shape, math.prod(shape[:-1])), dtype)


def ones_init(key, shape, dtype=jnp.float32):
    """Initializer for scales of `nnx`: ones, without a compiled program for every shape."""
    return jnp.asarray(np.ones(shape, dtype), dtype)


def zeros_init(key, shape, dtype=jnp.float32):
    """Initializer for biases of `nnx`: zeros, without a compiled program for every shape."""
    return jnp.asarray(np.zeros(shape, dtype), dtype)


def _kernel(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int):
    return sample(rngs, shape) * np.float32(fan_in**-0.5)


def xavier_uniform(rngs: nnx.Rngs, shape: tuple[int, int]):
    """Glorot's uniform kernel of a dense layer, (in, out)."""
    bound = np.float32((6 / sum(shape)) ** 0.5)
    return bound * (2 * sample(rngs, shape, "uniform") - 1)


def fan_in_normal(rngs: nnx.Rngs, shape: tuple[int, int]):
    """N(0, 1 / in) kernel of a dense layer, (in, out): the default here."""
    return _kernel(rngs, shape, shape[0])


def normal_param(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Returns a parameter from N(0, 1), as SAM's and the paper's embeddings are initialized."""
    return nnx.Param(array(sample(rngs, shape)))


def kernel_param(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """Returns a kernel from N(0, 1 / fan_in)."""
    return nnx.Param(array(_kernel(rngs, shape, fan_in)))


def scale(param: nnx.Param, factor: float) -> None:
    """Multiplies the initial value of a parameter; 0 for a layer whose first output is zero."""
    param.set_value(param[...] * np.float32(factor))


def zeros_param(*shape: int) -> nnx.Param:
    return nnx.Param(array(np.zeros(shape, np.float32)))
