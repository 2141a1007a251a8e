"""SAM's mask decoder: mask tokens, two-way transformer, upscaling and hypernetworks.

Letters: B batch, H W grid, T prompt tokens, M mask tokens, D width. Channels last.
Source: Kirillov et al. 2023, appendix A.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.sam.two_way_transformer import TwoWayTransformer


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; the defaults are SAM's."""

    width: int = 256
    depth: int = 2
    heads: int = 8
    mlp_dim: int = 2048
    downsample: int = 2


class Upscaling(nnx.Module):
    """(B, H, W, D) to (B, 4H, 4W, D / 8)."""

    def __init__(self, dim: int, *, dtype, rngs: nnx.Rngs):
        self.conv1 = layers.Upsample2x(dim, dim // 4, dtype=dtype, rngs=rngs)
        self.norm = layers.LayerNorm(dim // 4, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.conv2 = layers.Upsample2x(dim // 4, dim // 8, dtype=dtype, rngs=rngs)

    def __call__(self, x, refine=(lambda up: up, lambda up: up)):
        """refine: functions of the maps of 2H x 2W and 4H x 4W, before norm and activation."""
        x = self.norm(refine[0](self.conv1(x)))
        return layers.gelu(refine[1](self.conv2(layers.gelu(x))))


class MaskDecoder(nnx.Module):
    """One mask per mask token; with `iou_head` also SAM's quality token and head."""

    two_way = TwoWayTransformer

    def __init__(self, config: DecoderConfig, masks: int, *, iou_head: bool, dtype, rngs: nnx.Rngs):
        d = config.width
        self.transformer = self.two_way(
            d, config.depth, config.heads, config.mlp_dim, config.downsample, dtype=dtype, rngs=rngs
        )
        self.mask_tokens = initializers.normal_param(rngs, masks, d)
        self.upscaling = Upscaling(d, dtype=dtype, rngs=rngs)
        self.hyper_mlps = layers.ParallelMlp(masks, (d, d, d, d // 8), dtype=dtype, rngs=rngs)
        if iou_head:
            self.iou_token = initializers.normal_param(rngs, 1, d)
            self.iou_head = layers.ReluMlp((d, d, d, masks), dtype=dtype, rngs=rngs)
        self.quality = iou_head

    def run(self, image, image_pe, sparse, dense):
        """Transformer only: mask tokens (B, M, D), image tokens (B, H, W, D), IoU token or None.

        image (B or 1, H, W, D), image_pe (H, W, D), sparse (B, T, D), dense (B, H, W, D).
        """
        b, h, w, d = dense.shape
        quality = [self.iou_token[...]] if self.quality else []
        own = jnp.concatenate([*quality, self.mask_tokens[...]])
        tokens = jnp.concatenate([jnp.broadcast_to(own, (b, *own.shape)), sparse], axis=1)
        source = (image + dense).reshape(b, h * w, d)
        tokens, source = self.transformer(source, image_pe.reshape(1, h * w, d), tokens)
        first, masks = int(self.quality), self.mask_tokens[...].shape[0]
        iou = tokens[:, 0] if self.quality else None
        return tokens[:, first : first + masks], source.reshape(b, h, w, d), iou

    def masks(self, mask_tokens, image_tokens, **upscaling):
        """Logits (B, 4H, 4W, M), float32: hypernetwork weights applied to the upscaled image.

        upscaling: options of `Upscaling`.
        """
        up = self.upscaling(image_tokens, **upscaling)
        weights = self.hyper_mlps(mask_tokens)
        return token_products(up, weights)

    def __call__(self, image, image_pe, sparse, dense, *, multimask: bool):
        """SAM's own call: logits (B, 4H, 4W, 3 or 1) and IoU predictions (B, 3 or 1).

        Token 0 is the single mask, tokens 1.. are the three masks of an ambiguous prompt.
        """
        mask_tokens, image_tokens, iou_token = self.run(image, image_pe, sparse, dense)
        logits = self.masks(mask_tokens, image_tokens)
        iou = self.iou_head(iou_token).astype(jnp.float32)
        keep = slice(1, None) if multimask else slice(0, 1)
        return logits[..., keep], iou[:, keep]


def class_features(mask_tokens, image_tokens):
    """F_M = mask-token outputs . image tokens, (B, H, W, K) float32: the paper's class feature."""
    return token_products(image_tokens, mask_tokens)


def token_products(image, tokens):
    """Inner products (B, H, W, D) x (B, M, D) to (B, H, W, M), float32, over one spatial axis."""
    b, h, w, d = image.shape
    image = image.reshape(b, h * w, d)
    products = layers.wide_einsum("bld,bmd->blm", image, tokens)
    return products.reshape(b, h, w, -1)


def upsample_logits(logits, size: tuple[int, int]):
    """(B, h, w, K) logits to (B, *size, K), bilinear in float32."""
    return layers.resize_bilinear(logits.astype(layers.wide(logits.dtype)), size)
