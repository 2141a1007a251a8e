"""Prototype-based Prompt Generator, PPG (paper 2.3, Eq 6-7): dense and sparse prompts.

Letters: B batch, H W token grid, L = H*W, C channels, K classes with background, Q inter
prototypes. Softmaxes in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers


def affinity(prototypes, others):
    """P_query: inner products of two prototype sets, (B, Q, C) x (B, K, C) to (B, Q, K)."""
    return jnp.einsum("bqc,bkc->bqk", prototypes, others)


def dense_attention(feature, prototypes):
    """Inside Eq 6: softmax over the Q prototypes of F_I P^T / sqrt(C), times P^; (B, L, C)."""
    scores = layers.wide_einsum("blc,bqc->blq", feature, prototypes)
    weights = jax.nn.softmax(scores * feature.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("blq,bqc->blc", weights.astype(feature.dtype), prototypes)


def sparse_attention(prototypes, feature, gate=None):
    """Inside Eq 7: softmax over space of P^ F_I^T / sqrt(C), times F_I; (B, K, C).

    gate (B, K, L): factors of the weights after the softmax, which then sum to less than one.
    """
    scores = layers.wide_einsum("bkc,blc->bkl", prototypes, feature)
    weights = jax.nn.softmax(scores * feature.shape[-1] ** -0.5, axis=-1)
    weights = weights if gate is None else weights * gate
    return jnp.einsum("bkl,blc->bkc", weights.astype(feature.dtype), feature)


class PromptPath(nnx.Module):
    """Part of both paths: an FC that joins prototypes and affinities, and the MLP."""

    def __init__(self, channels: int, others: int, *, dtype, rngs: nnx.Rngs):
        self.join = layers.Linear(channels + others, channels, dtype=dtype, rngs=rngs)
        # Not in the paper, but in its release: without it the affinities, sums over C products,
        # make the softmaxes of Eq 6 and 7 one-hot from the second pass on, and training stalls.
        self.norm = layers.LayerNorm(channels, eps=layers.DECODER_EPS, dtype=dtype, rngs=rngs)
        self.mlp = layers.MlpBlock(
            channels, channels // 2, activation=layers.gelu, dtype=dtype, rngs=rngs
        )

    def prototypes(self, own, others):
        """P^ = LN(FC([P; P P_other^T])), (B, number of own, C)."""
        return self.norm(self.join(jnp.concatenate([own, affinity(own, others)], axis=-1)))


class PromptGenerator(nnx.Module):
    """Eq 6 and 7: dense prompt D (B, H, W, C) and one sparse prompt per class, S (B, K, C)."""

    def __init__(self, channels: int, classes: int, inter: int, *, dtype, rngs: nnx.Rngs):
        self.dense = PromptPath(channels, classes, dtype=dtype, rngs=rngs)
        self.sparse = PromptPath(channels, inter, dtype=dtype, rngs=rngs)

    def scale_start(self, factor: float) -> None:
        """Makes the first dense prompts their last bias, and scales the first sparse ones."""
        initializers.scale(self.dense.mlp.lin2.kernel, 0)
        initializers.scale(self.sparse.mlp.lin2.kernel, factor)

    def __call__(self, feature, intra, inter):
        """feature F_I (B, H, W, C), intra (B, K, C), inter (B, Q, C); returns (sparse, dense)."""
        tokens = feature.reshape(feature.shape[0], -1, feature.shape[-1])
        dense = dense_attention(tokens, self.dense.prototypes(inter, intra))
        sparse = sparse_attention(self.sparse.prototypes(intra, inter), tokens)
        return self.sparse.mlp(sparse), self.dense.mlp(dense).reshape(feature.shape)
