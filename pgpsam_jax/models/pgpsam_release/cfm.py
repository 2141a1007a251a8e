"""Feature refinement of preset `release`: channel semantics, context modulation, gated FFN.

Letters: B batch, H W token grid, D encoder width, C feature channels. Channels last.
Source: the authors' code (docs/release_code.md#feature-refinement), not Eq 1-2 of the paper alone.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.pgpsam.cfm import ChannelGate, SpatialGate

GAIN = 1e-3  # what every learned gain of the release starts at
leaky_relu = jax.nn.leaky_relu  # slope 0.01


def gain_param(channels: int) -> nnx.Param:
    return nnx.Param(jnp.full(channels, GAIN, jnp.float32))


class ChannelSemantics(nnx.Module):
    """CSM: x + x * sigma(MLP(GAP x)), the channel gate alone."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.channel = ChannelGate(
            channels, activation=leaky_relu, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x):
        return x + x * self.channel(x)


class GatedFeedForward(nnx.Module):
    """x + W_out(leaky(x1) * x2), (x1, x2) the halves of a depthwise 3x3 of W_in LN(x)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        common, hidden = dict(dtype=dtype, rngs=rngs), 2 * channels
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.project_in = layers.Linear(channels, hidden, **common)
        self.depthwise = layers.DepthwiseConv(hidden, (3, 3), use_bias=False, **common)
        self.project_out = layers.Linear(hidden // 2, channels, **common)

    def __call__(self, x):
        first, second = jnp.split(self.depthwise(self.project_in(self.norm(x))), 2, axis=-1)
        return x + self.project_out(leaky_relu(first) * second)


class UpFeature(nnx.Module):
    """(B, H, W, C) to (B, 4H, 4W, C / 8): U_s for the decoder, and its own map."""

    def __init__(self, channels: int, *, activation, dtype, rngs: nnx.Rngs):
        half, last = channels // 4, channels // 8
        common = dict(dtype=dtype, rngs=rngs)
        self.conv1 = layers.Upsample2x(channels, half, fan_in=4 * half, **common)
        self.conv2 = layers.Upsample2x(half, last, fan_in=4 * last, **common)
        self.activation = activation

    def __call__(self, x):
        return self.conv2(self.activation(self.conv1(x)))


class ContextualFeatureModulation(nnx.Module):
    """X_s = G(F + merge(F + a F g_s, F + b F g_c) + X_{s-1}), with F the projected encoder tap.

    g_s and g_c are the paper's gates (without bias), a and b gains per channel, G the gated FFN.
    `merge` is a convolution with C groups over the 2C concatenated channels: each output mixes two
    neighboring channels of the *same* branch.
    """

    def __init__(self, width: int, channels: int, *, k: int, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        gate = dict(activation=leaky_relu, use_bias=False, **common)
        self.projection = layers.Linear(width, channels, use_bias=False, **common)
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.spatial = SpatialGate(channels, k, **gate)
        self.channel = ChannelGate(channels, **gate)
        self.alpha, self.beta = gain_param(channels), gain_param(channels)
        self.pairs = initializers.kernel_param(rngs, (2, channels), 2)
        self.merge_norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, **common)
        self.merge = layers.Linear(channels, channels, **common)
        self.ffn = GatedFeedForward(channels, **common)
        self.up = UpFeature(channels, activation=leaky_relu, **common)

    def __call__(self, tap, previous):
        """tap (B, H, W, D), previous X (B, H, W, C) to X_s and U_s (B, 4H, 4W, C / 8)."""
        feature = self.norm(self.projection(tap))
        alpha, beta, pairs = (
            p[...].astype(feature.dtype) for p in (self.alpha, self.beta, self.pairs)
        )
        spatial = feature + alpha * (feature * self.spatial(feature))
        channel = feature + beta * (feature * self.channel(feature))
        both = jnp.concatenate([spatial, channel], axis=-1)
        both = both.reshape(*feature.shape, 2) * pairs.T
        merged = self.merge(leaky_relu(self.merge_norm(both.sum(axis=-1))))
        feature = self.ffn(feature + merged + previous)
        return feature, self.up(feature)
