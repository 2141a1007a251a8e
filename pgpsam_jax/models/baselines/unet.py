"""U-Net: a segmenter without SAM, trained from random weights on the same slices.

Two 3x3 convolutions with GroupNorm and leaky ReLU per resolution, channels doubling from the image
down, strided convolutions down, 2x2 transposed convolutions up, skip connections.
Letters: B batch, S image side, C channels, K classes with background.
Source: Ronneberger et al. 2015; GroupNorm of Wu and He 2018 in place of batch statistics, strides
and slope of nnU-Net (Isensee et al. 2021).
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers, losses
from pgpsam_jax.models.segmenter import Segmenter, register

DOWNS = 4  # halvings of the image
GROUPS = 8
SLOPE = 0.01


class ConvNorm(nnx.Module):
    """3x3 convolution, GroupNorm and leaky ReLU: (B, H, W, dim) to (B, H/stride, W/stride, out)."""

    def __init__(self, dim: int, out: int, *, stride: int = 1, dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            dim,
            out,
            (3, 3),
            strides=stride,
            padding=1,
            use_bias=False,
            kernel_init=initializers.kernel_init,
            promote_dtype=layers.conv_arrays,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.GroupNorm(
            out, GROUPS, epsilon=1e-5, use_fast_variance=False, dtype=layers.wide(dtype), rngs=rngs
        )

    def __call__(self, x):
        x = self.conv(x)
        return jax.nn.leaky_relu(self.norm(x).astype(x.dtype), SLOPE)


class Stage(nnx.Module):
    """Two `ConvNorm`, the first with the stride."""

    def __init__(self, dim: int, out: int, *, stride: int = 1, dtype, rngs: nnx.Rngs):
        self.first = ConvNorm(dim, out, stride=stride, dtype=dtype, rngs=rngs)
        self.second = ConvNorm(out, out, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x))


@register("unet")
class Unet(Segmenter):
    """Images (B, S, S, 3) to `final` logits (B, S, S, K); trains everything.

    Of `model.unet_width` channels at the image's resolution and 16 times as many at the lowest: 1.9
    M parameters with 16, 7.8 M with 32.
    """

    label = "U-Net"
    loss = staticmethod(losses.final_only)

    @classmethod
    def from_settings(cls, settings, num_classes: int, *, dtype, rngs: nnx.Rngs):
        for field, needed, why in (
            ("base", "", "has no SAM"),
            ("train_encoder", "full", "is trained as a whole"),
            ("remat", "none", "recomputes nothing"),
        ):
            if getattr(settings, field) != needed:
                raise UserError(
                    f"model.{field} is {getattr(settings, field)!r}, but the U-Net {why}; set "
                    f"--config.model.{field}={needed}"
                )
        if settings.unet_width % GROUPS:
            raise UserError(
                f"model.unet_width is {settings.unet_width}; GroupNorm needs a multiple of {GROUPS}"
            )
        return cls(settings.unet_width, num_classes, dtype=dtype, rngs=rngs)

    def __init__(self, width: int, classes: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        widths = [width * 2**i for i in range(DOWNS + 1)]
        self.stem = Stage(3, width, **common)
        self.down = nnx.List(
            Stage(dim, out, stride=2, **common) for dim, out in itertools.pairwise(widths)
        )
        coarser = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nnx.List(layers.Upsample2x(dim, out, **common) for dim, out in coarser)
        self.merge = nnx.List(Stage(2 * out, out, **common) for _, out in coarser)
        self.head = layers.Linear(width, classes, **common)
        self.dtype = dtype

    def describe_attention(self, dtype) -> str:
        return "none"

    def __call__(self, images, keys=None):
        skips = [self.stem(images.astype(self.dtype))]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = skips.pop()
            rows, columns = skip.shape[1:3]  # odd sizes were halved upward
            x = merge(jnp.concatenate([skip, up(x)[:, :rows, :columns]], axis=-1))
        return {"final": self.head(x).astype(layers.wide(x.dtype))}
