"""Self-attention with SAM's decomposed relative positions: chooses a kernel and runs it.

Letters: B batch (windows folded in), N heads, H W token grid of the queries, T = H * W tokens, C
channels per head. Operands are head-major, (B, N, T, C): the layout CPU and GPU matmuls want.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam import attention_kernels as kernels
from pgpsam_jax.models.sam.attention_kernels import LANES
from pgpsam_jax.models.sam.relative_position import fold, window_of
from pgpsam_jax.sharding import context

NAMES = ("auto", "naive", "folded", "lean", "cudnn", "splash")


def attention(
    backend: str, q, k, v, rel_h, rel_w, grid: tuple[int, int], padding=None, *, recompute=False
):
    """Computes self-attention with relative positions.

    Args:
      backend: one of `NAMES`; see `choose` for "auto".
      q, k, v: (B, N, T, C).
      rel_h, rel_w: (2n - 1, C), tables of the window's rows and columns.
      grid: (H, W), with H * W = T.
      padding: key and value, (N, C) each, of the window's cells outside the token grid; needed
        where there are any.
      recompute: whether a backend that writes scores to memory recomputes them in the backward
        pass.

    Returns:
      (B, N, T, C).
    """
    depth = q.shape[-1] + sum(grid) + (grid != window_of(rel_h, rel_w))
    name = choose(backend, q.shape[2], depth, q.dtype)
    if name in _FOLDED:
        run, operands = _FOLDED[name], fold(q, k, v, rel_h, rel_w, grid, padding)
    else:
        operands = q, k, v, rel_h, rel_w, padding
        run = functools.partial(_UNFOLDED[name], grid=grid)
    return (jax.checkpoint(run) if recompute and name in ("naive", "folded") else run)(*operands)


def choose(
    requested: str, tokens: int, depth: int, dtype, here: context.TracingContext | None = None
) -> str:
    """Returns the backend for T tokens of `depth` channels after folding, or raises `UserError`.

    GPU: the fused kernel wherever its head dim allows. TPU: the fused kernel where tokens fill
    its blocks, which windows do not; in float32 it would not heed JAX's matmul precision. Lean
    elsewhere: the fastest on CPU, and without arrays that wait for the backward pass.
    """
    here = here or context.current()
    half, full = jnp.dtype(dtype).itemsize == 2, tokens % LANES == 0
    limit = 256 if here.capability >= 9 else 128 if here.capability >= 8 else 0
    fits = {
        "cudnn": here.platform == "gpu" and half and depth <= limit,
        "splash": here.platform in ("tpu", "cpu"),
    }
    if requested == "auto":
        tpu = here.platform == "tpu" and half
        requested = "cudnn" if fits["cudnn"] else "splash" if tpu and full else "lean"
    if not fits.get(requested, True):
        wants = {
            "cudnn": "needs an NVIDIA GPU of compute capability 8.0, compute_dtype bfloat16 and at "
            "most 128 channels a head after folding (256 from capability 9.0)",
            "splash": "needs a TPU",
        }
        raise UserError(
            f"model.attention {requested!r} {wants[requested]}; here are "
            f"{here.platform} {here.capability or ''}, {jnp.dtype(dtype).name} and {depth} "
            "channels; choose auto"
        )
    return "lean" if requested == "splash" and not full else requested


_UNFOLDED = {"naive": kernels.naive, "lean": kernels.lean}
_FOLDED: dict[str, Callable[..., jax.Array]] = {
    "folded": kernels.attend,
    "cudnn": kernels.cudnn,
    "splash": kernels.splash,
}


def split_windows(x, size: tuple[int, int]):
    """(B, H, W, ...), divisible by the window's `size`, to (B * windows, *size, ...), B major."""
    (b, h, w, *rest), (rows, columns) = x.shape, size
    x = x.reshape(b, h // rows, rows, w // columns, columns, *rest).swapaxes(2, 3)
    return x.reshape(-1, rows, columns, *rest)


def join_windows(x, grid: tuple[int, int]):
    """Inverse of `split_windows`: (B * windows, rows, columns, D) to (B, H, W, D)."""
    (h, w), (_, rows, columns, d) = grid, x.shape
    x = x.reshape(-1, h // rows, w // columns, rows, columns, d).swapaxes(2, 3)
    return x.reshape(-1, h, w, d)
