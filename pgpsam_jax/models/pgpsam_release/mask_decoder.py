"""Mask decoder of preset `release`: SAM's two-way transformer reordered, gated and skipped into.

Letters: B batch, H W token grid, L = H*W, C width, K classes with background, T = 2K tokens.
Source: docs/release_code.md#mask-decoder.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.pgpsam_release.cfm import UpFeature, leaky_relu
from pgpsam_jax.models.sam.mask_decoder import DecoderConfig, class_features, token_products
from pgpsam_jax.models.sam.two_way_transformer import Attention, TwoWayBlock, TwoWayTransformer

CLASS_HEADS = 8
# Before upscaling, the authors' code reads its (L, C) image tokens as a (C, H, W) image without
# transposing, which scrambles channels and places; its trained weights know no other order.
TOKEN_ORDERS = ("released", "transposed")
_TEMPERATURE = 1e4


def sine_positions(grid: tuple[int, int], channels: int):
    """DETR's normalized sine encoding, (H, W, C): y in the first half, x in the second."""
    half = channels // 2
    frequency = _TEMPERATURE ** (2 * (np.arange(half) // 2) / half)
    axes = [2 * np.pi * (np.arange(n) + 1) / (n + 1e-6) for n in grid]
    y, x = (place[:, None] / frequency for place in axes)
    y, x = (
        np.stack([np.sin(a[:, ::2]), np.cos(a[:, 1::2])], axis=-1).reshape(a.shape) for a in (y, x)
    )
    shape = (*grid, half)
    both = np.broadcast_to(y[:, None], shape), np.broadcast_to(x[None], shape)
    return np.concatenate(both, axis=-1)


class CosineAttention(Attention):
    """Queries and keys of unit length over all heads together: scores stay within +-1/sqrt(C/N)."""

    def similar(self, q, k):
        return unit(q), unit(k)


def unit(x):
    """x / max(|x|, 1e-12) over the last axis."""
    norm = jnp.linalg.norm(x.astype(layers.wide(x.dtype)), axis=-1, keepdims=True)
    return (x / jnp.maximum(norm, 1e-12)).astype(x.dtype)


class ReorderedBlock(TwoWayBlock):
    """Token-to-image (cosine, no image positions), self-attention, MLP, image-to-token (gated).

    In the first block the self-attention has no residual: what the tokens just read of the image
    remains only as its input. Weights are named as in SAM and load from it.
    """

    token_to_image = CosineAttention

    def __call__(self, tokens, image, token_pe, image_pe, gate=None):
        update = self.cross_attn_token_to_image(tokens + token_pe, image, image)
        tokens = self.attend_tokens(self.norm1(tokens + update), token_pe)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        q, k = image + image_pe, tokens + token_pe
        image = self.norm4(image + self.cross_attn_image_to_token(q, k, tokens, gate))
        return tokens, image


class ReorderedTransformer(TwoWayTransformer):
    """Reordered blocks and SAM's final token-to-image attention."""

    block = ReorderedBlock


class ClassMaps(nnx.Module):
    """E (B, K, L): self-attention over the K class maps of F_M as tokens of length L."""

    def __init__(self, classes: int, grid: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        length = grid[0] * grid[1]
        if (length // 2) % CLASS_HEADS:
            raise UserError(
                f"preset release attends over class maps of {grid[0]} x {grid[1]} tokens in "
                f"{CLASS_HEADS} heads, so half their number must be divisible by {CLASS_HEADS}; "
                "choose model.image_size and model.patch_size accordingly"
            )
        common = dict(dtype=dtype, rngs=rngs)
        self.norm = layers.LayerNorm(classes, eps=layers.DECODER_EPS, **common)
        self.attention = Attention(length, CLASS_HEADS, 2, **common)

    def __call__(self, class_feature):
        """class_feature F_M (B, H, W, K)."""
        maps = self.norm(class_feature).reshape(class_feature.shape[0], -1, class_feature.shape[-1])
        maps = maps.swapaxes(1, 2)
        return self.attention(maps, maps, maps)


class SkipConnection(nnx.Module):
    """U_s into the upscaled map: up + conv(conv([up ; U_s])), each 1x1 - LN - GELU."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.conv1 = layers.Linear(2 * channels, channels, **common)
        self.norm1 = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.conv2 = layers.Linear(channels, channels, **common)
        self.norm2 = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)

    def __call__(self, up, feature):
        x = jnp.concatenate([up, feature], axis=-1)
        x = jax.nn.gelu(self.norm1(self.conv1(x)))
        return up + jax.nn.gelu(self.norm2(self.conv2(x)))


class MaskDecoder(nnx.Module):
    """K mask tokens and K sparse prompts to logits (B, 4H, 4W, K) and F_M (B, H, W, K), float32."""

    def __init__(
        self,
        config: DecoderConfig,
        classes: int,
        grid: tuple[int, int],
        *,
        token_order: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        if token_order not in TOKEN_ORDERS:
            raise UserError(
                f"model.token_order is {token_order!r}; choose {' or '.join(TOKEN_ORDERS)}"
            )
        c, common = config.width, dict(dtype=dtype, rngs=rngs)
        self.transformer = ReorderedTransformer(
            c, config.depth, config.heads, config.mlp_dim, config.downsample, **common
        )
        self.position = initializers.normal_param(rngs, 1, c)  # of every token
        self.mask_tokens = initializers.normal_param(rngs, classes, c)
        self.class_maps = ClassMaps(classes, grid, **common)
        self.hyper_mlps = layers.ParallelMlp(classes, (c, c, c, c // 8), **common)
        for part in (self.transformer, self.class_maps, self.hyper_mlps):
            draw_as_torch(part, rngs)
        self.upscaling = UpFeature(c, activation=jax.nn.gelu, **common)
        self.skip = SkipConnection(c // 8, **common)
        self.token_order = token_order

    def __call__(self, image, sparse, dense, stage=None):
        """image and dense (B, H, W, C), sparse (B, K, C).

        stage: None in the pre-prompt pass; in a refinement stage (U_s (B, 4H, 4W, C / 8), F_M,
        logits of the pass before on the grid (B, H, W, K), their softmax).
        """
        source = image + dense
        b, h, w, c = source.shape
        source, gate = source.reshape(b, h * w, c), None
        if stage is not None:
            up_feature, class_feature, low, probability = stage
            source = self.add_class_maps(source, class_feature, low.reshape(b, h * w, -1))
            gate = probability.reshape(b, 1, h * w, -1)
            gate = jnp.concatenate([gate, gate], axis=-1)  # mask tokens, then sparse prompts
        own = self.mask_tokens[...].astype(sparse.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(own, (b, *own.shape)), sparse], axis=1)
        position = self.position[...].astype(tokens.dtype)
        pe = jnp.asarray(sine_positions((h, w), c), source.dtype).reshape(1, h * w, c)
        tokens, source = self.transformer(source, pe, tokens, position, gate)
        mask_tokens, image_tokens = tokens[:, : len(own)], source.reshape(b, h, w, c)
        to_upscale = image_tokens
        if self.token_order == "released":
            to_upscale = jnp.moveaxis(source.reshape(b, c, h, w), 1, -1)
        up = jax.nn.gelu(self.upscaling(to_upscale))
        up = up if stage is None else self.skip(up, up_feature)
        logits = token_products(up, self.hyper_mlps(mask_tokens))
        return logits, class_features(mask_tokens, image_tokens)

    def add_class_maps(self, source, class_feature, low):
        """source += LeakyReLU(source^T low) E, per channel a sum of class maps; float32 inside."""
        mixing = layers.wide_einsum("blc,blk->bck", source, low)
        maps = self.class_maps(class_feature)
        update = jnp.einsum("bck,bkl->blc", leaky_relu(mixing), maps.astype(mixing.dtype))
        return source + update.astype(source.dtype)


def draw_as_torch(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Redraw every dense layer of `module` as PyTorch starts it: uniform in +-1/sqrt(in)."""
    for _, layer in nnx.iter_modules(module):
        if not isinstance(layer, layers.Linear | layers.ParallelLinear):
            continue
        bound = np.float32(layer.kernel.shape[-2] ** -0.5)
        for leaf in (layer.kernel, layer.bias):
            if leaf is not None:
                uniform = initializers.sample(rngs, leaf.shape, "uniform")
                leaf.set_value(initializers.array(bound * (2 * uniform - 1)))
