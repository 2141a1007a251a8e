"""Prompt generator of preset `release`: dense prompts by a deformable block, sparse by an adapter.

Letters: B batch, H W token grid, L = H*W, C channels, K classes with background, Q inter
prototypes. Source: docs/release_code.md#prompt-generator.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.pgpsam import ppg
from pgpsam_jax.models.pgpsam_release.cfm import gain_param
from pgpsam_jax.models.pgpsam_release.deformable_conv import DeformableConv
from pgpsam_jax.sharding.context import gather_weight

BRANCHES = 8


class PrototypeTokens(nnx.Module):
    """LN(W2 gelu(W1 [P ; P P_other^T])): prototypes joined with their affinities."""

    def __init__(self, channels: int, others: int, *, dtype, rngs: nnx.Rngs):
        linear = dict(init=initializers.xavier_uniform, dtype=dtype, rngs=rngs)
        self.join = layers.Linear(channels + others, channels, **linear)
        self.project = layers.Linear(channels, channels, **linear)
        self.norm = layers.LayerNorm(channels, eps=layers.DECODER_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, own, others):
        """own (B, P, C), others (B, R, C) to (B, P, C)."""
        joined = self.join(jnp.concatenate([own, ppg.affinity(own, others)], axis=-1))
        return self.norm(self.project(jax.nn.gelu(joined)))


class DeformableBlock(nnx.Module):
    """Deformable large-kernel attention: a gate of two deformable convolutions, LN, a conv MLP."""

    def __init__(self, channels: int, *, dcn: str, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.project_in = layers.Linear(channels, channels, **common)
        self.near = DeformableConv(channels, 1, kind=dcn, **common)
        self.far = DeformableConv(channels, 3, kind=dcn, **common)
        self.gate = layers.Linear(channels, channels, **common)
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.expand = layers.Linear(channels, channels, **common)
        self.depthwise = layers.DepthwiseConv(channels, (3, 3), **common)
        self.project_out = layers.Linear(channels, channels, **common)

    def __call__(self, x):
        inner = jax.nn.gelu(self.project_in(x))
        x = self.norm(x + inner * self.gate(self.far(self.near(inner))))
        return x + self.project_out(jax.nn.gelu(self.depthwise(self.expand(x))))


class DensePath(nnx.Module):
    """Dense prompt D (B, H, W, C): the image attends to the inter prototypes' tokens."""

    def __init__(self, channels: int, classes: int, *, dcn: str, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.tokens = PrototypeTokens(channels, classes, **common)
        self.deform = DeformableBlock(channels, dcn=dcn, **common)
        self.gain = gain_param(channels)
        self.mlp = layers.MlpBlock(channels, channels // 2, activation=jax.nn.gelu, **common)

    def __call__(self, feature, intra, inter, probability):
        if probability is not None:  # modulated by the prototype of each pixel's class
            own = jnp.einsum("bhwk,bkc->bhwc", probability, intra).astype(feature.dtype)
            feature = feature + feature * own
        feature = self.deform(feature)
        image = feature.reshape(feature.shape[0], -1, feature.shape[-1])
        dense = ppg.dense_attention(image, self.tokens(inter, intra))
        dense = dense + self.gain[...].astype(image.dtype) * image
        return self.mlp(dense).reshape(feature.shape)


class Branches(nnx.Module):
    """Dense layers side by side, (B, K, C) to their outputs one after another."""

    def __init__(self, channels: int, out: int, *, dtype, rngs: nnx.Rngs):
        kernels = [initializers.xavier_uniform(rngs, (channels, out)) for _ in range(BRANCHES)]
        self.kernel = nnx.Param(jnp.stack(kernels))
        self.bias = initializers.zeros_param(BRANCHES, out)
        self.dtype = dtype

    def __call__(self, x):
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        out = jnp.einsum("bkc,mco->bkmo", x.astype(self.dtype), gather_weight(kernel)) + bias
        return out.reshape(*x.shape[:2], -1)


class PrototypeAdapter(nnx.Module):
    """Eight branches C -> C/4 side by side, then a ReLU MLP back to C."""

    def __init__(self, channels: int, inter: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.tokens = PrototypeTokens(channels, inter, **common)
        self.branches = Branches(channels, channels // 4, **common)
        sizes = (BRANCHES * (channels // 4), channels, channels, channels)
        self.mlp = layers.ReluMlp(sizes, **common)

    def __call__(self, intra, inter):
        return self.mlp(jax.nn.gelu(self.branches(self.tokens(intra, inter))))


class SparsePath(nnx.Module):
    """Sparse prompts S (B, K, C): each class's adapted prototype attends to the image."""

    def __init__(self, channels: int, inter: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.conv = nnx.Conv(
            channels,
            channels,
            (3, 3),
            kernel_dilation=2,
            kernel_init=initializers.kernel_init,
            promote_dtype=layers.conv_arrays,
            **common,
        )
        self.adapter = PrototypeAdapter(channels, inter, **common)
        self.gain = gain_param(channels)
        self.mlp = layers.MlpBlock(
            channels,
            channels // 2,
            activation=jax.nn.gelu,
            init=initializers.xavier_uniform,
            **common,
        )

    def __call__(self, feature, intra, inter, probability):
        feature = self.conv(feature)
        image = feature.reshape(feature.shape[0], -1, feature.shape[-1])
        tokens = self.adapter(intra, inter)
        gate = None
        if probability is not None:
            gate = probability.reshape(*image.shape[:2], -1).swapaxes(1, 2)
        sparse = ppg.sparse_attention(tokens, image, gate)
        return self.mlp(sparse + self.gain[...].astype(tokens.dtype) * tokens)


class PromptGenerator(nnx.Module):
    """Sparse (B, K, C) and dense (B, H, W, C) prompts from a feature and the prototypes."""

    def __init__(self, channels: int, classes: int, inter: int, *, dcn: str, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.dense = DensePath(channels, classes, dcn=dcn, **common)
        self.sparse = SparsePath(channels, inter, **common)

    def __call__(self, feature, intra, inter, probability=None):
        """feature (B, H, W, C), intra (B, K, C), inter (B, Q, C), probability (B, H, W, K) or None
        in the pre-prompt pass, where no mask exists yet."""
        inputs = feature, intra, inter, probability
        return self.sparse(*inputs), self.dense(*inputs)
