"""Prototype refinement of preset `release`: one gated softmax, mask prototypes, feed-forward.

Letters: B batch, H W token grid, L = H*W, C channels, K classes with background, Q inter
prototypes, k of them per class, n = K*(k+1) tokens, N heads.
Source: docs/release_code.md#prototype-refinement.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.pgpsam import ppr
from pgpsam_jax.models.pgpsam.ppr import Refined
from pgpsam_jax.models.pgpsam_release.cfm import GAIN, gain_param

HEADS = 8


class FusedMap(nnx.Module):
    """F^: image and class feature joined by two 1x1 convolutions, LN and a depthwise 3x3."""

    def __init__(self, channels: int, classes: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.join = layers.Linear(channels + classes, channels, **common)
        self.project = layers.Linear(channels, channels, **common)
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.depthwise = layers.DepthwiseConv(channels, (3, 3), **common)

    def __call__(self, feature, class_feature):
        """(B, H, W, C) and (B, H, W, K) to tokens (B, L, C)."""
        x = jnp.concatenate([feature, class_feature.astype(feature.dtype)], axis=-1)
        x = self.depthwise(self.norm(self.project(jax.nn.gelu(self.join(x)))))
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ClassQueryAttention(nnx.Module):
    """softmax over space of (alpha * class + beta * P * q k^T) / sqrt(C / N), times v.

    alpha and beta weigh positions; the class scores (Eq 3-4 before their softmax) are shared by
    the heads; P is the probability of the token's class.
    """

    def __init__(self, channels: int, classes: int, k: int, grid, *, dtype, rngs: nnx.Rngs):
        common, tokens = dict(dtype=dtype, rngs=rngs), classes * (k + 1)
        linear = dict(init=initializers.xavier_uniform, **common)
        self.alpha, self.beta = (
            nnx.Param(jnp.full(grid[0] * grid[1], GAIN, jnp.float32)) for _ in range(2)
        )
        self.class_attention = ppr.ClassAttention(
            channels, classes, tokens, grid, expand_std=1.0, expand_bias=True, **common
        )
        self.fuse = FusedMap(channels, classes, **common)
        self.q_norm = layers.LayerNorm(channels, eps=layers.DECODER_EPS, **common)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            layers.Linear(channels, channels, **linear) for _ in range(4)
        )

    def __call__(self, tokens, feature, class_feature, probability):
        """tokens (B, n, C), probability (B, H, W, K) to updates (B, n, C), weights (B, N, n, L)."""
        fused = self.fuse(feature, class_feature)
        q, k, v = (
            x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
            for x in (self.q_proj(self.q_norm(tokens)), self.k_proj(fused), self.v_proj(fused))
        )
        query = layers.wide_einsum("bnqc,bnlc->bnql", q, k)
        own = probability.reshape(probability.shape[0], -1, probability.shape[-1]).swapaxes(1, 2)
        gate = jnp.repeat(own, tokens.shape[1] // own.shape[1], axis=1)  # (B, n, L)
        klass = self.class_attention.scores(feature, class_feature)
        alpha, beta = self.alpha[...], self.beta[...]
        scores = alpha * klass[:, None] + beta * (query * gate[:, None])
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
        out = jnp.einsum("bnql,bnlc->bqnc", weights.astype(v.dtype), v)
        return self.out_proj(out.reshape(tokens.shape)), weights


class FeedForward(nnx.Module):
    """Pre-norm MLP of width 4C with a residual."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.norm = layers.LayerNorm(channels, eps=layers.DECODER_EPS, **common)
        self.mlp = layers.MlpBlock(
            channels,
            4 * channels,
            activation=jax.nn.gelu,
            init=initializers.xavier_uniform,
            **common,
        )

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class PrototypeRefinement(nnx.Module):
    """One stage: prototypes refined by attention, mixed with mask prototypes, fed forward."""

    def __init__(
        self, channels: int, classes: int, inter: int, k: int, grid, *, dtype, rngs: nnx.Rngs
    ):
        common = dict(dtype=dtype, rngs=rngs)
        linear = dict(init=initializers.xavier_uniform, **common)
        self.inter_gain, self.intra_gain = gain_param(channels), gain_param(channels)
        self.inter_proj = layers.Linear(channels, channels, **linear)
        self.intra_proj = layers.Linear(channels, channels, **linear)
        self.attention = ClassQueryAttention(channels, classes, k, grid, **common)
        self.inter_mix = layers.Linear(inter + classes, inter, **linear)  # along tokens
        self.intra_mix = layers.Linear(channels + classes, channels, **linear)  # along channels
        self.inter_ffn, self.intra_ffn = (FeedForward(channels, **common) for _ in range(2))
        self.k, self.mix_start = k, GAIN

    @property
    def mixing(self):
        """(alpha, beta), each (L,): weights of the class and the query scores."""
        return self.attention.alpha[...], self.attention.beta[...]

    def __call__(self, feature, class_feature, probability, intra, inter) -> Refined:
        """feature (B, H, W, C), class_feature and probability (B, H, W, K); prototypes with their
        embeddings added. `query_weights` of the result are those of its one softmax, head mean.
        """
        inter, intra = self.inter_proj(inter), self.intra_proj(intra)
        picks = ppr.select_inter(intra, inter, self.k)
        tokens = ppr.gather_tokens(intra, inter, picks)
        update, weights = self.attention(tokens, feature, class_feature, probability)
        intra, inter = ppr.scatter_tokens(
            intra, inter, picks, update, self.intra_gain[...], self.inter_gain[...]
        )
        inter = jnp.concatenate([inter, space_sums(probability, feature)], axis=1)
        inter = self.inter_mix(inter.swapaxes(1, 2)).swapaxes(1, 2)
        intra = jnp.concatenate([intra, space_sums(probability, class_feature)], axis=-1)
        intra = self.intra_mix(intra)
        return Refined(
            self.intra_ffn(intra), self.inter_ffn(inter), picks, None, weights.mean(axis=1)
        )


def space_sums(probability, x):
    """Mask prototypes: sums over space of P_k x, (B, H, W, K) x (B, H, W, C) to (B, K, C) float32.

    Not divided by the mass of P, so up to L times as large as a mean.
    """
    return layers.wide_einsum("bhwk,bhwc->bkc", probability, x)
