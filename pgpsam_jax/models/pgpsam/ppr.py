"""Progressive Prototype Refinement, PPR (paper 2.2, Eq 3-5): updates prototypes from features.

Letters: B batch, H W token grid, L = H*W, C channels, K classes with background, Q = alpha*K
inter-class prototypes, k of them per class, n = K*(k+1) prototype tokens.
Softmaxes run over space, which is the consistent reading of the equations, in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import layers

COSINE_EPS = 1e-8


class Refined(NamedTuple):
    """Prototypes of a pass, and how a stage of PPR refined them (None without PPR).

    intra (B, K, C), inter (B, Q, C); picks (B, K, k): the inter prototypes each class took;
    class_weights W_c and query_weights W_q (B, n, L), each summing to one over space. Token
    c * (k + 1) is class c's own, the k after it are its picks.
    """

    intra: jax.Array
    inter: jax.Array
    picks: jax.Array | None = None
    class_weights: jax.Array | None = None
    query_weights: jax.Array | None = None


def select_inter(intra, inter, k: int):
    """Returns indices (B, K, k) of the k inter prototypes closest (cosine) to each intra prototype.

    In float32 for 16-bit prototypes, too: rounded cosines would be equal and picked by their order.
    """
    intra, inter = (x.astype(layers.wide(x.dtype)) for x in (intra, inter))
    unit_intra, unit_inter = (
        x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + COSINE_EPS) for x in (intra, inter)
    )
    similarity = jnp.einsum("bkc,bqc->bkq", unit_intra, unit_inter)
    return jax.lax.top_k(jax.lax.stop_gradient(similarity), k)[1]


def gather_tokens(intra, inter, indices):
    """P^ = [intra; its k inter] per class, (B, n, C) with n = K(k+1), class-major."""
    b, classes, k = indices.shape
    chosen = jnp.take_along_axis(inter, indices.reshape(b, -1, 1), axis=1)
    chosen = chosen.reshape(b, classes, k, -1)
    return jnp.concatenate([intra[:, :, None], chosen], axis=2).reshape(b, classes * (k + 1), -1)


def scatter_tokens(intra, inter, indices, tokens, intra_gain=1.0, inter_gain=1.0):
    """Adds refined tokens (B, n, C): intra directly, inter at its indices (repeats add up).

    The gains, scalars or (C,), scale what is added.
    """
    b, classes, k = indices.shape
    tokens = tokens.reshape(b, classes, k + 1, -1)
    rows = jnp.arange(b)[:, None]
    update = (inter_gain * tokens[:, :, 1:].reshape(b, classes * k, -1)).astype(inter.dtype)
    return intra + intra_gain * tokens[:, :, 0], inter.at[rows, indices.reshape(b, -1)].add(update)


def query_attention(tokens, fused):
    """Eq 5, first line: W_q = softmax over space of P^ F^T / sqrt(C), (B, n, L)."""
    scores = layers.wide_einsum("bnc,blc->bnl", tokens, fused)
    return jax.nn.softmax(scores * fused.shape[-1] ** -0.5, axis=-1)


def attend_tokens(alpha, beta, class_weights, query_weights, fused):
    """Eq 5, second line: P^' = (alpha W_c + beta W_q) F^, (B, n, C)."""
    weights = alpha * class_weights + beta * query_weights
    return jnp.einsum("bnl,blc->bnc", weights.astype(fused.dtype), fused)


class ClassAttention(nnx.Module):
    """Eq 3-4: W_c = softmax over space of conv_1->n(F_I'' outer F_M''), (B, n, L).

    expand_std: initial SD of the convolution's kernel. The default is small, so that W_c starts
    as a mean over the image and not as one pixel (F_M is a sum over C). Without a bias: it is
    constant over the space the softmax runs over.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        tokens: int,
        grid,
        *,
        expand_std: float | None = None,
        expand_bias: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        h, w = grid
        linear = dict(dtype=dtype, rngs=rngs)
        self.image_conv = layers.Linear(channels, 1, **linear)
        self.class_conv = layers.Linear(classes, 1, **linear)
        self.image_fc = layers.Linear(h * w, h, **linear)
        self.class_fc = layers.Linear(h * w, w, **linear)
        self.expand = layers.Linear(1, tokens, use_bias=expand_bias, **linear)
        std = (h * w) ** -0.5 if expand_std is None else expand_std
        self.expand.kernel.set_value(self.expand.kernel[...] * std)

    def vectors(self, feature, class_feature):
        """Eq 3: F_I'' (B, H) from F_I (B, H, W, C) and F_M'' (B, W) from F_M (B, H, W, K)."""
        b = feature.shape[0]
        image = self.image_fc(self.image_conv(feature).reshape(b, -1))
        return image, self.class_fc(self.class_conv(class_feature).reshape(b, -1))

    def scores(self, feature, class_feature):
        """Eq 4 before its softmax, (B, n, L) float32."""
        image, klass = self.vectors(feature, class_feature)
        outer = image[:, :, None] * klass[:, None, :]
        scores = self.expand(outer.reshape(outer.shape[0], -1, 1))
        return scores.astype(layers.wide(scores.dtype)).swapaxes(1, 2)

    def __call__(self, feature, class_feature):
        return jax.nn.softmax(self.scores(feature, class_feature), axis=-1)


class PrototypeRefinement(nnx.Module):
    """One stage of PPR: intra (B, K, C) and inter (B, Q, C) prototypes to refined ones.

    mix_start: initial alpha and beta of Eq 5. norm: LayerNorm on P^ and F^ of Eq 5, which the
    paper does not print and its release has: without, the products of Eq 5 make W_q one-hot.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        k: int,
        grid,
        *,
        mix_start: float = 0.5,
        norm: bool = True,
        dtype,
        rngs: nnx.Rngs,
    ):
        tokens = classes * (k + 1)
        self.class_attention = ClassAttention(
            channels, classes, tokens, grid, dtype=dtype, rngs=rngs
        )
        self.fuse = layers.Linear(channels + classes, channels, dtype=dtype, rngs=rngs)
        if norm:
            self.token_norm, self.fused_norm = (
                layers.LayerNorm(channels, eps=layers.DECODER_EPS, dtype=dtype, rngs=rngs)
                for _ in range(2)
            )
        self.alpha = nnx.Param(jnp.array(mix_start, jnp.float32))
        self.beta = nnx.Param(jnp.array(mix_start, jnp.float32))
        self.k, self.mix_start, self.norm = k, mix_start, norm

    @property
    def mixing(self):
        """(alpha, beta) of Eq 5."""
        return self.alpha[...], self.beta[...]

    def __call__(self, feature, class_feature, intra, inter) -> Refined:
        """feature F_I (B, H, W, C), class_feature F_M (B, H, W, K), prototypes to refine."""
        b, h, w, c = feature.shape
        class_feature = class_feature.astype(feature.dtype)
        fused = self.fuse(jnp.concatenate([feature, class_feature], axis=-1))
        fused = fused.reshape(b, h * w, c)
        picks = select_inter(intra, inter, self.k)
        tokens = gather_tokens(intra, inter, picks)
        if self.norm:
            tokens, fused = self.token_norm(tokens), self.fused_norm(fused)
        class_weights = self.class_attention(feature, class_feature)
        query_weights = query_attention(tokens, fused)
        tokens = attend_tokens(self.alpha[...], self.beta[...], class_weights, query_weights, fused)
        intra, inter = scatter_tokens(intra, inter, picks, tokens)
        return Refined(intra, inter, picks, class_weights, query_weights)
