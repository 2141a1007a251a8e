"""Convolutions of TinyViT: with batch norm, in an inverted bottleneck, and between stages.

Letters: B batch, h w map, dim and out channels. Channels last. Source: Wu et al. 2022 (TinyViT).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models import initializers, layers
from pgpsam_jax.sharding import context
from pgpsam_jax.sharding.context import gather_weight
from pgpsam_jax.sharding.matmul import matmul

EPS = 1e-5  # of batch norms, and of the LayerNorms of tokens
STRIP = 2**21  # numbers of hidden channels in a strip of rows, at most


class ConvNorm(nnx.Module):
    """Convolution and batch norm at its running averages, folded into one kernel and bias.

    kernel: (in, out) for 1x1, (3, 3, C) for depthwise, else (3, 3, in, out); zero padding of 1.
    """

    def __init__(self, kernel: tuple[int, ...], stride: int = 1, *, dtype, rngs: nnx.Rngs):
        fan_in = 9 if len(kernel) == 3 else math.prod(kernel[:-1])
        self.kernel = initializers.kernel_param(rngs, kernel, fan_in)
        self.scale = nnx.Param(initializers.array(np.ones(kernel[-1])))
        self.bias = initializers.zeros_param(kernel[-1])
        self.mean = layers.Buffer(initializers.array(np.zeros(kernel[-1])))
        self.var = layers.Buffer(initializers.array(np.ones(kernel[-1])))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x, halo: int = 0):
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPS)
        kernel = gather_weight((self.kernel[...] * scale).astype(self.dtype))
        bias = (self.bias[...] - self.mean[...] * scale).astype(self.dtype)
        x = x.astype(self.dtype)
        if kernel.ndim == 2:
            return matmul(x, kernel) + bias
        if kernel.ndim == 3:
            return layers.depthwise(x, kernel, stride=self.stride, halo=halo) + bias
        strides, pads = (self.stride,) * 2, ((1, 1), (1, 1))
        names = ("NHWC", "HWIO", "NHWC")
        return (
            jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=names) + bias
        )


class MBConv(nnx.Module):
    """Inverted bottleneck: 1x1 to more channels, depthwise 3x3, 1x1 back, beside a shortcut.

    A large map is computed in strips of rows, each anew in the backward pass: at 256 px the hidden
    channels of two images are 134 MB.
    """

    def __init__(self, dim: int, hidden: int, **common):
        self.expand = ConvNorm((dim, hidden), **common)
        self.depthwise = ConvNorm((3, 3, hidden), **common)
        self.project = ConvNorm((hidden, dim), **common)
        self.hidden = hidden

    def __call__(self, x):
        b, h, w, _ = x.shape
        rows = strip_rows(h, b * w * self.hidden)
        if rows == h:
            return self.contract(layers.gelu(self.expand(x)), x)
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))

        def strip(top):
            part = jax.lax.dynamic_slice_in_dim(padded, top, rows + 2, 1)
            row = top + jnp.arange(rows + 2)
            inside = (row > 0) & (row <= h)
            hidden = jnp.where(inside[:, None, None], layers.gelu(self.expand(part)), 0)
            return self.contract(hidden, part[:, 1:-1], halo=1)

        strips = jax.lax.map(jax.checkpoint(strip), jnp.arange(0, h, rows))
        return jnp.moveaxis(strips, 0, 1).reshape(x.shape)

    def contract(self, hidden, x, halo: int = 0):
        """What follows the first GELU; halo: rows that hidden has more above and below."""
        hidden = layers.gelu(self.depthwise(hidden, halo))
        return layers.gelu(x + self.project(hidden))


def strip_rows(height: int, row_size: int) -> int:
    """Rows of a map that are computed at a time: all, but on a CPU what stays in its cache.

    row_size: numbers in a row, over the whole batch.
    """
    if context.current().platform != "cpu":
        return height
    fitting = [n for n in range(1, height + 1) if height % n == 0 and n * row_size <= STRIP]
    return max(fitting, default=height)


class Merge(nnx.Module):
    """Between stages: 1x1, depthwise 3x3 of a stride, 1x1; (B, h, w, dim) to (B, h/s, w/s, out)."""

    def __init__(self, dim: int, out: int, stride: int, **common):
        self.expand = ConvNorm((dim, out), **common)
        self.depthwise = ConvNorm((3, 3, out), stride, **common)
        self.project = ConvNorm((out, out), **common)

    def __call__(self, x):
        return self.project(layers.gelu(self.depthwise(layers.gelu(self.expand(x)))))
