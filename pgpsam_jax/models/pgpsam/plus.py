"""PGP-SAM, preset `plus`: preset `paper`, whose masks are drawn from finer maps of the image too.

SAM's decoder sees nothing finer than the token grid, which it upscales by 4. Here a map of the
resolution refines each of the two upscaling steps: the encoder's own or, of an encoder that has
none, convolutions of the image. Ours (docs/plus.md); decoders of later SAMs take such maps too:
HQ-SAM (Ke et al. 2023), SAM 2 (Ravi et al. 2024).
Letters: B batch, H W token grid, C channels, K classes with background, S image side.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.pgpsam.model import Pass, PgpSam, PgpSamConfig
from pgpsam_jax.models.segmenter import register

UPSCALING = 4  # of SAM's decoder


def conv3x3(channels: int, out: int, *, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels,
        out,
        (3, 3),
        kernel_init=initializers.kernel_init,
        promote_dtype=layers.conv_arrays,
        dtype=dtype,
        rngs=rngs,
    )


class ImageStem(nnx.Module):
    """Images (B, S, S, 3) to maps (B, 2H, 2W, C / 4) and (B, 4H, 4W, C / 8)."""

    def __init__(self, patch_size: int, widths: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        if patch_size % UPSCALING:
            raise UserError(
                f"model.patch_size is {patch_size}, but preset plus needs a multiple of {UPSCALING}"
            )
        (half, full), common = widths, dict(dtype=dtype, rngs=rngs)
        self.embed = layers.PatchEmbed(patch_size // UPSCALING, 3, full, **common)
        self.conv = conv3x3(full, full, **common)
        self.norm1, self.norm2 = (
            layers.LayerNorm(full, eps=layers.ENCODER_EPS, **common) for _ in range(2)
        )
        self.shrink = layers.PatchEmbed(2, full, half, **common)

    def __call__(self, images):
        x = layers.gelu(self.norm1(self.embed(images)))
        x = layers.gelu(self.norm2(self.conv(x)))
        return [self.shrink(x), x]


class Refinement(nnx.Module):
    """up + W_out(GELU(LN(conv_3x3([up ; W_in fine])))), all of one resolution."""

    def __init__(self, width: int, channels: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.project_in = layers.Linear(width, channels, **common)
        self.conv = conv3x3(2 * channels, channels, **common)
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.project_out = layers.Linear(channels, channels, **common)

    def __call__(self, fine, up):
        """fine (B, h, w, width) and up (B, h, w, C) to the shape of up."""
        x = self.conv(jnp.concatenate([up, self.project_in(fine)], axis=-1))
        return up + self.project_out(layers.gelu(self.norm(x)))


@register("pgpsam", "plus")
class PlusPgpSam(PgpSam):
    """Images (B, S, S, 3) in [0, 1] to `bootstrap` and `final` logits (B, 4H, 4W, K)."""

    label = "PGP-SAM, plus"

    def __init__(self, config: PgpSamConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        encoder, c = config.sam.encoder, config.sam.decoder.width
        channels, common = (c // 4, c // 8), dict(dtype=dtype, rngs=rngs)
        widths = encoder.fine_widths or channels
        own = bool(encoder.fine_widths)
        self.stem = None if own else ImageStem(encoder.patch_size, channels, **common)
        self.refine = nnx.List(
            Refinement(*sizes, **common) for sizes in zip(widths, channels, strict=True)
        )
        if config.start_scale is not None:
            for each in self.refine:
                initializers.scale(each.project_out.kernel, config.start_scale)

    def encode(self, images):
        """Returns the neck's feature, the tapped tokens, and the encoder's fine maps or images."""
        feature, taps, fine = self.image_encoder.pyramid(images, self.config.stage_taps)
        return feature, taps, fine or [images]

    def decode_passes(self, encoded, **masks) -> list[Pass]:
        feature, taps, fine = encoded
        fine = fine if self.stem is None else self.stem(*fine)
        pairs = zip(self.refine, fine, strict=True)
        refine = [functools.partial(each, maps) for each, maps in pairs]
        return super().decode_passes((feature, taps), refine=refine, **masks)
