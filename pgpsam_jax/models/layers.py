"""Small layers shared by the models.

Letters: B batch, H W grid, T tokens, D width, M parallel heads of an MLP. Channels are last.
Parameters are float32; `dtype` is the compute type, LayerNorm statistics stay float32.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

ENCODER_EPS = 1e-6  # image encoder and every channel LayerNorm of SAM ("LayerNorm2d")
DECODER_EPS = 1e-5  # token LayerNorms of the two-way transformer (PyTorch's default)


class Buffer(nnx.Variable):
    """A constant array of a model: saved and converted, never trained nor decayed."""


def normal_param(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A parameter drawn from N(0, 1), as SAM's and the paper's embeddings start."""
    return nnx.Param(jax.random.normal(rngs.params(), shape))


def gelu(x):
    """GELU with erf, as SAM uses it (JAX's default is the tanh approximation)."""
    return jax.nn.gelu(x, approximate=False)


def layer_norm(dim: int, *, eps: float, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis with two-pass variance, exact for large means."""
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, dtype=dtype, rngs=rngs)


def resize_bilinear(x, size: tuple[int, int]):
    """(B, H, W, D) to (B, *size, D): half-pixel centres, no antialias, as PyTorch interpolates."""
    shape = (x.shape[0], *size, x.shape[-1])
    if x.shape == shape:
        return x
    return jax.image.resize(x, shape, "bilinear", antialias=False)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to tokens, (B, H*p, W*p, 3) -> (B, H, W, D), as one matmul."""

    def __init__(self, patch: int, channels: int, dim: int, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (patch, patch, channels, dim)))
        self.bias = nnx.Param(jnp.zeros((dim,)))
        self.dtype = dtype

    def __call__(self, x):
        kernel = self.kernel[...].astype(self.dtype)
        p, _, channels, _ = kernel.shape
        b, h, w, _ = x.shape
        x = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, channels)
        return jnp.einsum("bhpwqc,pqcd->bhwd", x, kernel) + self.bias[...].astype(self.dtype)


class MlpBlock(nnx.Module):
    """Two linear layers with an activation between, on the last axis."""

    def __init__(self, dim: int, hidden: int, *, activation, dtype, rngs: nnx.Rngs, out=None):
        self.lin1 = nnx.Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.lin2 = nnx.Linear(hidden, out or dim, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.lin2(self.activation(self.lin1(x)))


class ReluMlp(nnx.Module):
    """`depth` linear layers with ReLU between: SAM's IoU head."""

    def __init__(self, sizes: tuple[int, ...], *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes)
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class ParallelLinear(nnx.Module):
    """M independent linear layers in one product, (B, M, in) -> (B, M, out)."""

    def __init__(self, count: int, dim: int, out: int, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (count, dim, out)))
        self.bias = nnx.Param(jnp.zeros((count, out)))
        self.dtype = dtype

    def __call__(self, x):
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return jnp.einsum("bmi,mio->bmo", x.astype(self.dtype), kernel) + bias


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

    def __init__(self, dim: int, out: int, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (dim, 2, 2, out)))
        self.bias = nnx.Param(jnp.zeros((out,)))
        self.dtype = dtype

    def __call__(self, x):
        b, h, w, _ = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        x = jnp.einsum("bhwi,ipqo->bhpwqo", x.astype(self.dtype), kernel)
        return x.reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(self.dtype)
