"""ResNet-18 up to its third group of blocks: the CNN that SAM-LST has beside SAM's encoder.

Batches are normalized as the original trains them: in training by the mean and variance of the
global batch, else by running averages, so that a slice's output does not depend on the others.
The averages (`nnx.BatchStat`) are set by the training step, not learned.

Letters: B batch, H W grid, C channels. Source: He et al. 2016.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers


class BatchNorm(nnx.BatchNorm):
    """(B, H, W, C) to the same; PyTorch's momentum and epsilon, statistics in float32."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        super().__init__(
            channels,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=layers.wide(dtype),
            rngs=rngs,
        )

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(x, use_running_average, mask=mask).astype(x.dtype)


def conv(dim: int, out: int, size: int, stride: int, *, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Convolution size x size without bias; padded alike on both sides, as PyTorch does."""
    return nnx.Conv(
        dim,
        out,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=initializers.kernel_init,
        promote_dtype=layers.conv_arrays,
        dtype=dtype,
        rngs=rngs,
    )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, (B, H, W, dim) to (B, H/stride, W/stride, out)."""

    def __init__(self, dim: int, out: int, stride: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.conv1 = conv(dim, out, 3, stride, **common)
        self.norm1 = BatchNorm(out, **common)
        self.conv2 = conv(out, out, 3, 1, **common)
        self.norm2 = BatchNorm(out, **common)
        self.projects = stride > 1 or dim != out
        if self.projects:
            self.shortcut = conv(dim, out, 1, stride, **common)
            self.shortcut_norm = BatchNorm(out, **common)

    def __call__(self, x, training: bool):
        y = jax.nn.relu(self.norm1(self.conv1(x), not training))
        y = self.norm2(self.conv2(y), not training)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), not training)
        return jax.nn.relu(x + y)


class ResNet18(nnx.Module):
    """Images (B, rows, columns, 3) to features (B, rows / stride, columns / stride, 4 width).

    The published network has width 64 and stride 16. Of a finer grid, the last groups keep their
    resolution.
    """

    def __init__(self, width: int, stride: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        if stride not in (4, 8, 16):
            raise UserError(
                f"the ResNet-18 beside SAM's encoder knows patches of 4, 8 or 16 px, not {stride}; "
                "choose one of these as patch size"
            )
        common = dict(dtype=dtype, rngs=rngs)
        self.conv1 = conv(3, width, 7, 2, **common)
        self.norm1 = BatchNorm(width, **common)
        dim = width
        self.groups: nnx.List[nnx.List[BasicBlock]] = nnx.List()
        for out, strides in ((width, 1), (2 * width, 8), (4 * width, 16)):
            step = 2 if 1 < strides <= stride else 1
            blocks = [BasicBlock(dim, out, step, **common), BasicBlock(out, out, 1, **common)]
            self.groups.append(nnx.List(blocks))
            dim = out
        self.dtype = dtype

    def __call__(self, images, training: bool):
        x = jax.nn.relu(self.norm1(self.conv1(images.astype(self.dtype)), not training))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for blocks in self.groups:
            for block in blocks:
                x = block(x, training)
        return x
