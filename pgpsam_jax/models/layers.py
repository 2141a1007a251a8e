"""Small layers shared by the models.

Letters: B batch, H W grid, T tokens, D width, M parallel heads of an MLP. Channels are last.
Parameters are float32; `dtype` is the compute type, LayerNorm statistics stay float32.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models.initializers import (
    array,
    fan_in_normal,
    kernel_param,
    ones_init,
    zeros_init,
    zeros_param,
)
from pgpsam_jax.sharding.context import gather_weight
from pgpsam_jax.sharding.matmul import matmul, split_matmul

ENCODER_EPS = 1e-6  # image encoder and every channel LayerNorm of SAM ("LayerNorm2d")
DECODER_EPS = 1e-5  # token LayerNorms of the two-way transformer (PyTorch's default)


def wide(dtype):
    """Returns the type of softmaxes, long sums and losses: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def wide_einsum(spec: str, a, b):
    """Computes an einsum that is summed and returned in at least float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide(jnp.result_type(a, b)))


class Buffer(nnx.Variable):
    """A constant array of a model: saved and converted, never trained nor decayed."""


class Linear(nnx.Module):
    """x @ kernel + bias on the last axis; kernel (in, out).

    split: axis of the kernel that is split over the devices of `tensor`; 1 leaves the output split,
    0 takes a split input (B, ...), None splits nothing.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        use_bias: bool = True,
        init=fan_in_normal,
        split: int | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(array(init(rngs, (dim, out))))
        if use_bias:
            self.bias = zeros_param(out)
        self.use_bias, self.split, self.dtype = use_bias, split, dtype

    def __call__(self, x):
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.split is None:
            x = matmul(x, gather_weight(kernel))
        else:
            x = split_matmul(x, kernel, self.split)
        return x + self.bias[...].astype(self.dtype) if self.use_bias else x


def conv_arrays(arrays: Any, /, *, dtype: Any = jnp.float32, inexact: bool = True) -> Any:
    """`promote_dtype` of an `nnx.Conv`: input, kernel and bias cast, the kernel gathered."""
    x, kernel, bias = arrays
    bias = None if bias is None else bias.astype(dtype)
    return x.astype(dtype), gather_weight(kernel.astype(dtype)), bias


class DepthwiseConv(nnx.Module):
    """Depthwise convolution (h x w odd, zero padding, same size), (B, H, W, C) to the same shape.

    A sum of h * w shifts: every backend runs it fast, forward and backward.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], *, use_bias=True, dtype, rngs: nnx.Rngs
    ):
        self.kernel = kernel_param(rngs, (*size, channels), math.prod(size))
        self.bias = zeros_param(channels) if use_bias else None
        self.dtype = dtype

    def __call__(self, x):
        x = depthwise(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise(x, kernel, dilation: int = 1, stride: int = 1, halo: int = 0):
    """Depthwise convolution of (B, H, W, C) with (h, w, C), zero padding.

    halo: rows above and below the result that x has, in place of padding.
    """
    return _depthwise(x, kernel, dilation, stride, halo)


def _depthwise(x, kernel, dilation: int, stride: int, halo: int):
    (_, h, w, _), (rows, columns, _) = x.shape, kernel.shape
    above, beside = (dilation * (n // 2) for n in (rows, columns))
    pads = ((above - halo,) * 2, (beside,) * 2)
    size = tuple(-(-n // stride) for n in (h - 2 * halo, w))
    return _shifts(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, size, dilation, stride)


def _shifts(x, kernel, size: tuple[int, int], dilation: int, stride: int):
    """Sum of kernel[i, j] times x from row i and column j on, in steps of dilation and stride."""
    # Without the barrier XLA takes slices of what x was made of, and makes it anew for each.
    x, (h, w) = jax.lax.optimization_barrier(x), size
    return sum(
        kernel[i, j]
        * x[
            :,
            dilation * i : dilation * i + stride * (h - 1) + 1 : stride,
            dilation * j : dilation * j + stride * (w - 1) + 1 : stride,
        ]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


def _depthwise_forward(x, kernel, *sizes):
    return _depthwise(x, kernel, *sizes), (x, kernel)


def _depthwise_backward(dilation: int, stride: int, halo: int, kept, slope):
    """By autodiff the gradient of x is a sum of padded terms, each of which makes slope anew."""
    x, kernel = kept
    pads = [(0, 0, 0)]
    for axis, halo_here in ((1, halo), (2, 0)):
        reach, spread = dilation * (kernel.shape[axis - 1] // 2), stride * (slope.shape[axis] - 1)
        before = reach + halo_here
        pads.append((before, x.shape[axis] + 2 * reach - before - spread - 1, stride - 1))
    wide_slope = jax.lax.pad(slope, jnp.zeros((), slope.dtype), [*pads, (0, 0, 0)])
    by_x = _shifts(wide_slope, kernel[::-1, ::-1], x.shape[1:3], dilation, 1)
    _, pullback = jax.vjp(lambda k: _depthwise(x, k, dilation, stride, halo), kernel)
    return by_x, *pullback(slope)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def gelu(x):
    """GELU with erf, as SAM uses it (JAX's default is the tanh approximation), in float32 within.

    By erf, as PyTorch has it. `jax.nn.gelu` takes erfc, which costs a CPU three times as much for
    digits of its tail that no sum after it sees.
    """
    root = np.sqrt(0.5, dtype=wide(x.dtype))
    scaled = root * x
    return (root * (scaled + scaled * jax.lax.erf(scaled))).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis with two-pass variance, exact for large means."""

    scale: nnx.Param[jax.Array]  # never None, as it may be in the base

    def __init__(self, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        super().__init__(
            dim,
            epsilon=eps,
            use_fast_variance=False,
            scale_init=ones_init,
            bias_init=zeros_init,
            dtype=dtype,
            rngs=rngs,
        )


def resize_bilinear(x, size: tuple[int, int]):
    """(B, H, W, D) to (B, *size, D): half-pixel centers, no antialias, as PyTorch interpolates."""
    shape = (x.shape[0], *size, x.shape[-1])
    if x.shape == shape:
        return x
    return jax.image.resize(x, shape, "bilinear", antialias=False)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to tokens, (B, H*p, W*p, 3) -> (B, H, W, D), as one matmul."""

    def __init__(self, patch: int, channels: int, dim: int, *, dtype, rngs: nnx.Rngs):
        shape = (patch, patch, channels, dim)
        self.kernel = kernel_param(rngs, shape, patch * patch * channels)
        self.bias = zeros_param(dim)
        self.dtype = dtype

    def __call__(self, x):
        kernel = gather_weight(self.kernel[...].astype(self.dtype))
        p, _, channels, _ = kernel.shape
        b, h, w, _ = x.shape
        x = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, channels).swapaxes(2, 3)
        x = matmul(x.reshape(b, h // p, w // p, -1), kernel.reshape(-1, kernel.shape[-1]))
        return x + self.bias[...].astype(self.dtype)


class MlpBlock(nnx.Module):
    """Two linear layers with an activation between, on the last axis.

    split: whether the hidden channels are split over the devices of `tensor`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation,
        init=fan_in_normal,
        split: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        first, second = (1, 0) if split else (None, None)
        self.lin1 = Linear(dim, hidden, init=init, split=first, dtype=dtype, rngs=rngs)
        self.lin2 = Linear(hidden, dim, init=init, split=second, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.lin2(self.activation(self.lin1(x)))


class ReluMlp(nnx.Module):
    """`depth` linear layers with ReLU between: SAM's IoU head."""

    def __init__(self, sizes: tuple[int, ...], *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            Linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes)
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class ParallelLinear(nnx.Module):
    """M independent linear layers in one product, (B, M, in) -> (B, M, out)."""

    def __init__(self, count: int, dim: int, out: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = kernel_param(rngs, (count, dim, out), dim)
        self.bias = zeros_param(count, out)
        self.dtype = dtype

    def __call__(self, x):
        kernel = gather_weight(self.kernel[...].astype(self.dtype))
        x = jnp.einsum("bmi,mio->bmo", x.astype(self.dtype), kernel)
        return x + self.bias[...].astype(self.dtype)


class ParallelMlp(nnx.Module):
    """M independent ReLU MLPs, one per mask token: SAM's hypernetworks."""

    def __init__(self, count: int, sizes: tuple[int, ...], *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            ParallelLinear(count, a, b, dtype=dtype, rngs=rngs)
            for a, b in itertools.pairwise(sizes)
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Upsample2x(nnx.Module):
    """Transposed convolution 2x2 stride 2, (B, H, W, in) -> (B, 2H, 2W, out).

    Its windows do not overlap, so it is one matmul and a reshape.
    """

    def __init__(self, dim: int, out: int, *, fan_in: int = 0, dtype, rngs: nnx.Rngs):
        self.kernel = kernel_param(rngs, (dim, 2, 2, out), fan_in or dim)
        self.bias = zeros_param(out)
        self.dtype = dtype

    def __call__(self, x):
        b, h, w, _ = x.shape
        kernel = gather_weight(self.kernel[...].astype(self.dtype))
        x = matmul(x.astype(self.dtype), kernel.reshape(kernel.shape[0], -1))
        x = x.reshape(b, h, w, 2, 2, -1).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, -1)
        return x + self.bias[...].astype(self.dtype)
