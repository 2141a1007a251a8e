"""Products of activations with kernels that are stored in parts over the devices."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from pgpsam_jax.sharding import context

_Kept = tuple[jax.Array | None, jax.Array | None]


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., D) times (D, *E) as one product, (..., *E).

    XLA's CPU backend runs the weight gradient, a contraction over all leading axes, twice as fast
    when they are one axis.
    """
    product = jnp.tensordot(x.reshape(-1, x.shape[-1]), kernel, 1)
    return product.reshape(*x.shape[:-1], *kernel.shape[1:])


def split_matmul(
    x: jax.Array, kernel: jax.Array, split: int, stored: int | None = None
) -> jax.Array:
    """Multiplies rows x (B, ...) with a stored kernel, each device with its part.

    split, stored: see `context.gather_shardings`. The gathered kernel is not stored for the
    backward pass, which gathers it again.
    """
    steps = context.gather_shardings(kernel.shape, split, stored)
    if not steps:
        return matmul(x, kernel)
    x = context.split_batch(x) if split else x
    out = _matmul_of_parts(x, kernel, steps)
    return out if split else context.split_batch(out)  # the sum over devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_of_parts(x: jax.Array, kernel: jax.Array, steps: context.Steps) -> jax.Array:
    return matmul(x, context.apply_shardings(kernel, steps))


def _matmul_forward(
    x: CustomVJPPrimal, kernel: CustomVJPPrimal, steps: context.Steps
) -> tuple[jax.Array, _Kept]:
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    # The compiler lets every later use of a value be one of its constrained copy. Behind a barrier
    # it is another value, and the one that is kept stays in parts.
    gathered = context.apply_shardings(jax.lax.optimization_barrier(kernel.value), steps)
    return matmul(x.value, gathered), kept


def _matmul_backward(steps: context.Steps, kept: _Kept, slope: jax.Array) -> _Kept:
    (x, kernel), outer = kept, len(steps[0].spec) - 1
    rows = slope.shape[:-outer]
    slope = slope.reshape(-1, *slope.shape[-outer:])
    by_x = by_kernel = None
    if kernel is not None:
        kernel, slope = jax.lax.optimization_barrier((kernel, slope))
        kernel = context.apply_shardings(kernel, steps)
        outputs = tuple(range(1, outer + 1))
        by_x = jnp.tensordot(slope, kernel, (outputs, outputs)).reshape(*rows, -1)
    if x is not None:
        by_kernel = jnp.tensordot(x.reshape(-1, x.shape[-1]), slope, (0, 0))
    return by_x, by_kernel


_matmul_of_parts.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)
