"""Modulated deformable depthwise convolution (Zhu et al. 2019, "Deformable ConvNets v2") on XLA.

Letters: B batch, H W grid, L = H*W, C channels, T = 9 taps. Channels last: a sampled point is one
contiguous row of C numbers, so bilinear sampling gathers four rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers

KINDS = ("deformable", "plain")
_SIDE = 3
TAPS = _SIDE * _SIDE


def tap_points(grid: tuple[int, int], dilation: int):
    """(H, W, T, 2) float32: the row and column each tap reads where its offset is zero."""
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    center = np.stack([rows, columns], axis=-1)[:, :, None]
    steps = dilation * (np.arange(_SIDE) - 1)
    taps = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(TAPS, 2)
    return (center + taps).astype(np.float32)


def deformable_depthwise(x, kernel, offsets, modulation, dilation: int):
    """Sum over taps of kernel * modulation * x at the tap's moved point, bilinear, zero outside.

    x (B, H, W, C); kernel (3, 3, C); offsets (B, H, W, T, 2) in pixels, row then column, taps
    row-major; modulation (B, H, W, T). Returns (B, H, W, C).
    """
    b, h, w, c = x.shape
    # One ring of zeros around the image stands for all that lies outside of it.
    image = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, (h + 2) * (w + 2), c)
    index, weight = _neighbors(tap_points((h, w), dilation) + offsets, (h, w))
    weight = (weight * modulation[..., None]).astype(x.dtype)

    # One tap at a time, sampled again in the backward pass: 36 sampled copies of the image are
    # neither held nor compiled. Against all taps at once: 1/8 of the memory, half of the time.
    @jax.checkpoint
    def add_tap(out, tap):
        index, weight, kernel = tap
        rows = jax.vmap(lambda pixels, places: pixels[places])(image, index)  # (B, L, 4, C)
        return out + kernel * jnp.einsum("bls,blsc->blc", weight, rows), None

    index, weight = (jnp.moveaxis(a.reshape(b, h * w, TAPS, 4), 2, 0) for a in (index, weight))
    start = jnp.zeros((b, h * w, c), x.dtype)
    out, _ = jax.lax.scan(add_tap, start, (index, weight, kernel.reshape(TAPS, c)))
    return out.reshape(b, h, w, c)


def _neighbors(points, grid: tuple[int, int]):
    """Of points (..., 2): places (..., 4) in the flat ringed image of the pixels around each, and
    their bilinear weights."""
    h, w = grid
    steps = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    corner = jnp.floor(jax.lax.stop_gradient(points))[..., None, :]
    ringed = jnp.clip(corner + steps, -1, np.array([h, w], np.float32)).astype(jnp.int32) + 1
    near = jnp.abs(1 - steps - (points[..., None, :] - corner))
    return ringed[..., 0] * (w + 2) + ringed[..., 1], near[..., 0] * near[..., 1]


class DeformableConv(nnx.Module):
    """3x3 depthwise convolution whose taps move: offsets and modulation come from the input.

    They start at zero and 1/2, so it starts as half the plain dilated convolution. kind `plain`
    is that convolution without the half, and without offsets: no gathers, for accelerators.
    """

    def __init__(self, channels: int, dilation: int, *, kind: str, dtype, rngs: nnx.Rngs):
        if kind not in KINDS:
            raise UserError(f"model.dcn is {kind!r}; choose {' or '.join(KINDS)}")
        self.kernel = initializers.kernel_param(
            rngs, (_SIDE, _SIDE, channels), TAPS * channels // 2
        )
        self.bias = initializers.zeros_param(channels)
        if kind == "deformable":
            self.offset = nnx.Conv(
                channels,
                3 * TAPS,
                (_SIDE, _SIDE),
                kernel_dilation=dilation,
                kernel_init=nnx.initializers.zeros,
                promote_dtype=layers.conv_arrays,
                dtype=dtype,
                rngs=rngs,
            )
        self.kind, self.dilation, self.dtype = kind, dilation, dtype

    def __call__(self, x):
        """(B, H, W, C) to the same shape."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.kind == "plain":
            out = layers.depthwise(x, kernel, self.dilation)
        else:
            moves = self.offset(x)
            moves = moves.astype(layers.wide(moves.dtype))
            offsets = moves[..., : 2 * TAPS].reshape(*x.shape[:3], TAPS, 2)
            modulation = jax.nn.sigmoid(moves[..., 2 * TAPS :])
            out = deformable_depthwise(x, kernel, offsets, modulation, self.dilation)
        return out + self.bias[...].astype(self.dtype)
