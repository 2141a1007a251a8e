"""Modulated deformable depthwise convolution (Zhu et al. 2019, "Deformable ConvNets v2") on XLA.

Letters: B batch, H W grid, L = H*W, C channels, T = 9 taps. Channels last: a sampled point is one
contiguous row of C numbers, so bilinear sampling is four gathers of rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import layers

KINDS = ("deformable", "plain")
_SIDE = 3
TAPS = _SIDE * _SIDE


def tap_points(grid: tuple[int, int], dilation: int):
    """(H, W, T, 2) float32: the row and column each tap reads where its offset is zero."""
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    centre = np.stack([rows, columns], axis=-1)[:, :, None]
    steps = dilation * (np.arange(_SIDE) - 1)
    taps = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(TAPS, 2)
    return (centre + taps).astype(np.float32)


def deformable_depthwise(x, kernel, offsets, modulation, dilation: int):
    """Sum over taps of kernel * modulation * x at the tap's moved point, bilinear, zero outside.

    x (B, H, W, C); kernel (3, 3, C); offsets (B, H, W, T, 2) in pixels, row then column, taps
    row-major; modulation (B, H, W, T). Returns (B, H, W, C). Points and weights are float32.
    """
    b, h, w, c = x.shape
    points = tap_points((h, w), dilation) + offsets.astype(jnp.float32)
    # One ring of zeros around the image stands for all that lies outside of it.
    image = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, (h + 2) * (w + 2), c)
    corner = jnp.floor(jax.lax.stop_gradient(points))
    fraction = points - corner
    kernel = kernel.reshape(TAPS, c)
    out = 0
    for tap in range(TAPS):
        sampled = 0
        for down in (0, 1):
            for right in (0, 1):
                place = corner[..., tap, :] + np.array([down, right], np.float32)
                inside = jnp.clip(place, -1, np.array([h, w], np.float32)).astype(jnp.int32) + 1
                index = (inside[..., 0] * (w + 2) + inside[..., 1]).reshape(b, h * w, 1)
                near = jnp.abs(1 - np.array([down, right], np.float32) - fraction[..., tap, :])
                weight = near[..., 0] * near[..., 1] * modulation[..., tap]
                rows = jnp.take_along_axis(image, index, axis=1, mode="promise_in_bounds")
                sampled += weight.reshape(b, h * w, 1).astype(x.dtype) * rows
        out += kernel[tap] * sampled
    return out.reshape(b, h, w, c)


class DeformableConv(nnx.Module):
    """3x3 depthwise convolution whose taps move: offsets and modulation come from the input.

    They start at zero and 1/2, so it starts as half the plain dilated convolution. kind `plain`
    is that convolution without the half, and without offsets: no gathers, for accelerators.
    """

    def __init__(self, channels: int, dilation: int, *, kind: str, dtype, rngs: nnx.Rngs):
        if kind not in KINDS:
            raise UserError(f"model.dcn is {kind!r}; choose {' or '.join(KINDS)}")
        self.kernel = layers.kernel_param(rngs, (_SIDE, _SIDE, channels), TAPS * channels // 2)
        self.bias = layers.zeros_param(channels)
        if kind == "deformable":
            self.offset = nnx.Conv(
                channels,
                3 * TAPS,
                (_SIDE, _SIDE),
                kernel_dilation=dilation,
                kernel_init=nnx.initializers.zeros,
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
            moves = self.offset(x).astype(jnp.float32)
            offsets = moves[..., : 2 * TAPS].reshape(*x.shape[:3], TAPS, 2)
            modulation = jax.nn.sigmoid(moves[..., 2 * TAPS :])
            out = deformable_depthwise(x, kernel, offsets, modulation, self.dilation)
        return out + self.bias[...].astype(self.dtype)
