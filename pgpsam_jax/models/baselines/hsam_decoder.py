"""The two mask decoders of H-SAM, and its random numbers in training (Cheng et al. 2024).

Letters: B batch, H W token grid, L = H * W, T tokens, C channels, K classes with background.
Sizes and the order of layers are those of the authors' code.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.sam.mask_decoder import (
    DecoderConfig,
    MaskDecoder,
    Upscaling,
    token_products,
)
from pgpsam_jax.models.sam.two_way_transformer import Attention, TwoWayBlock, TwoWayTransformer

# What the second decoder does with its map of scores, one channel. `released`: the authors' code
# takes a softmax over that channel, which is 1 everywhere, so the image tokens are merely doubled.
# `intended`: evidently meant is a softmax over space, which adds 1 / L to a token on average.
MASK_GATES = ("released", "intended")
CLASS_HEADS = 8
NOISE = 0.2  # of the range of the image embedding, in training
DROPOUT = 0.2


class ImageFirstBlock(TwoWayBlock):
    """Token-to-image, self-attention, MLP, image-to-token: SAM's layers with the first two swapped.

    In the first block the self-attention has no residual. Weights are named as in SAM, whose
    checkpoint the first decoder starts from.
    """

    def __call__(self, tokens, image, token_pe, image_pe, gate=None, keys=None):
        """gate (B, 1, L, T): factors of both cross-attentions; keys (B,): of dropout."""
        q, k = tokens + token_pe, image + image_pe
        by_token = None if gate is None else gate.swapaxes(2, 3)
        update = self.cross_attn_token_to_image(q, k, image, by_token)
        tokens = self.norm2(tokens + drop_out(update, keys, 1 + self.index))
        tokens = self.norm1(self.attend_tokens(tokens, token_pe))
        tokens = self.norm3(tokens + self.mlp(tokens))
        update = self.cross_attn_image_to_token(k, tokens + token_pe, tokens, gate)
        return tokens, self.norm4(image + update)


class ImageFirstTransformer(TwoWayTransformer):
    """Such blocks and SAM's final token-to-image attention."""

    block = ImageFirstBlock


class GatedBlock(ImageFirstBlock):
    """The block of the second decoder: its cross-attentions keep the full width."""

    def __init__(self, dim, heads, mlp_dim, downsample, *, first: bool, dtype, rngs: nnx.Rngs):
        super().__init__(dim, heads, mlp_dim, 1, first=first, dtype=dtype, rngs=rngs)


class GatedTransformer(TwoWayTransformer):
    """Gated blocks and SAM's final token-to-image attention."""

    block = GatedBlock

    def __init__(self, *sizes, dtype, rngs: nnx.Rngs):
        super().__init__(*sizes, dtype=dtype, rngs=rngs)
        for i, layer in enumerate(self.layers):
            layer.index = i


class FirstDecoder(MaskDecoder):
    """SAM's decoder, its layers in another order."""

    two_way = ImageFirstTransformer


class MaskAttention(nnx.Module):
    """(B, H, W, K) class feature to scores (B, H, W, 1) of where to look.

    Two self-attentions over the class maps, tokens of length L, without residual, and an MLP.
    """

    def __init__(self, classes: int, length: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        norm = dict(eps=layers.DECODER_EPS, **common)
        self.attention1 = Attention(length, CLASS_HEADS, 1, **common)
        self.norm1 = layers.LayerNorm(length, **norm)
        self.attention2 = Attention(length, CLASS_HEADS, 1, **common)
        self.norm2 = layers.LayerNorm(length, **norm)
        self.mlp = layers.MlpBlock(length, hidden, activation=jax.nn.relu, **common)
        self.merge = layers.Linear(classes, 1, **common)

    def __call__(self, class_feature):
        b, h, w, k = class_feature.shape
        maps = class_feature.reshape(b, h * w, k).swapaxes(1, 2)
        maps = self.norm1(self.attention1(maps, maps, maps))
        maps = self.attention2(maps, maps, maps)
        maps = self.norm2(maps + self.mlp(maps))
        return jax.nn.relu(self.merge(maps.swapaxes(1, 2))).reshape(b, h, w, 1)


class SkipUpscaling(nnx.Module):
    """(B, 4H, 4W, C / 4) to (B, 16H, 16W, C / 16)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        norm = dict(eps=layers.ENCODER_EPS, **common)
        self.conv1 = layers.Upsample2x(channels, channels // 2, **common)
        self.norm1 = layers.LayerNorm(channels // 2, **norm)
        self.conv2 = layers.Upsample2x(channels // 2, channels // 4, **common)
        self.norm2 = layers.LayerNorm(channels // 4, **norm)

    def __call__(self, x):
        x = layers.gelu(self.norm1(self.conv1(x)))
        return layers.gelu(self.norm2(self.conv2(x)))


class SecondDecoder(nnx.Module):
    """Image embedding and what the first decoder found to logits (B, 16H, 16W, K), float32.

    What the authors' code also registers and computes nothing with is left out: LayerNorms in the
    cross-attentions, a quality head and, with the released gate, the mask attention.
    """

    def __init__(
        self,
        config: DecoderConfig,
        classes: int,
        grid: tuple[int, int],
        *,
        mask_gate: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        if mask_gate not in MASK_GATES:
            raise UserError(f"model.mask_gate is {mask_gate!r}; choose {' or '.join(MASK_GATES)}")
        length = grid[0] * grid[1]
        if length % CLASS_HEADS:
            raise UserError(
                f"method hsam attends over class maps of {grid[0]} x {grid[1]} tokens in "
                f"{CLASS_HEADS} heads, so their number must be divisible by {CLASS_HEADS}; choose "
                "model.image_size and model.patch_size accordingly"
            )
        d, common = config.width, dict(dtype=dtype, rngs=rngs)
        self.transformer = GatedTransformer(
            d, config.depth, config.heads, config.mlp_dim, config.downsample, **common
        )
        self.mask_tokens = initializers.normal_param(rngs, classes, d)
        self.upscaling = Upscaling(d, **common)
        self.skip = SkipUpscaling(d // 4, **common)
        self.hyper_mlps = layers.ParallelMlp(classes, (*5 * [d], d // 16), **common)
        if mask_gate == "intended":  # last, so that all else starts alike with either gate
            self.mask_attention = MaskAttention(classes, length, config.mlp_dim, **common)
        self.mask_gate = mask_gate

    def enhance(self, source, class_feature):
        """source (B, H, W, C) + source * map (B, H, W, 1) of the class feature (B, H, W, K)."""
        if self.mask_gate == "released":
            return 2 * source
        scores = self.mask_attention(class_feature)
        chance = jax.nn.softmax(scores.astype(layers.wide(scores.dtype)), axis=(1, 2))
        return source + source * chance.astype(source.dtype)

    def __call__(self, source, image_pe, class_feature, probability, up, keys=None):
        """source (B, H, W, C), image_pe (H, W, C); of the first decoder: class feature and class
        probabilities (B, H, W, K), upscaled map (B, 4H, 4W, C / 8). keys (B,): of dropout.
        """
        b, h, w, d = source.shape
        source = self.enhance(source, class_feature).reshape(b, h * w, d)
        tokens = self.mask_tokens[...].astype(source.dtype)
        tokens = jnp.broadcast_to(tokens, (b, *tokens.shape))
        gate = probability.reshape(b, 1, h * w, -1)
        image_pe = image_pe.reshape(1, h * w, d)
        tokens, source = self.transformer(source, image_pe, tokens, None, gate, keys)
        own = self.upscaling(source.reshape(b, h, w, d))
        up = self.skip(jnp.concatenate([own, up], axis=-1))
        return token_products(up, self.hyper_mlps(tokens))


def add_noise(feature, keys):
    """An embedding (B, H, W, C) with normal noise, of a fifth of the batch's range, by keys (B,).

    The range is taken as a number, where the original differentiates it: the derivative of a
    maximum compares it with what it was taken of, and a compiler that computes that anew may find
    no equal, which made it 0 / 0.
    """
    kind = layers.wide(feature.dtype)
    noise = _draw(jax.random.normal, keys, 0, feature.shape[1:], kind)
    spread = NOISE * jax.lax.stop_gradient(feature.max() - feature.min()).astype(kind)
    return feature + (spread * noise).astype(feature.dtype)


def drop_out(x, keys, stream: int):
    """x (B, ...) with a share of its numbers dropped and the others enlarged; without keys, x."""
    if keys is None:
        return x
    kept = _draw(jax.random.uniform, keys, stream, x.shape[1:]) >= DROPOUT
    return jnp.where(kept, x / (1 - DROPOUT), 0)


def _draw(distribution, keys, stream: int, *arguments):
    """Draws (B, ...), every sample's by its own key alone: the same on any number of devices."""
    return jax.vmap(lambda key: distribution(jax.random.fold_in(key, stream), *arguments))(keys)
