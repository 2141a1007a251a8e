"""Contextual Feature Modulation (paper 2.1, Eq 1-2): context gates on an encoder feature.

Letters: B batch, H W token grid, D encoder width, C feature channels. Channels last.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import layers


class StripConv(nnx.Module):
    """Depthwise convolution of odd length k along one spatial axis, zero padding, same size."""

    def __init__(self, channels: int, k: int, axis: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = layers.kernel_param(rngs, (k, channels), k)
        self.bias = layers.zeros_param(channels)
        self.axis, self.dtype = axis, dtype

    def __call__(self, x):
        """(B, H, W, C) to the same shape; a sum of k shifts, which every backend runs fast."""
        kernel = self.kernel[...].astype(self.dtype)
        k, size = kernel.shape[0], x.shape[self.axis]
        pad = [(0, 0)] * 4
        pad[self.axis] = (k // 2, k // 2)
        x = jnp.pad(x.astype(self.dtype), pad)
        shifts = (jax.lax.slice_in_dim(x, i, i + size, axis=self.axis) for i in range(k))
        terms = (kernel[i] * shift for i, shift in enumerate(shifts))
        return sum(terms) + self.bias[...].astype(self.dtype)


class SpatialGate(nnx.Module):
    """Eq 1: sigma(conv_kx1(ReLU(LN(conv_1xk(F_s))))), F_s the sum of both axial means."""

    def __init__(self, channels: int, k: int, *, dtype, rngs: nnx.Rngs):
        self.row = StripConv(channels, k, axis=2, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(channels, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.column = StripConv(channels, k, axis=1, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        """(B, H, W, C) to a gate of the same shape in (0, 1)."""
        axial = x.mean(axis=2, keepdims=True) + x.mean(axis=1, keepdims=True)
        return jax.nn.sigmoid(self.column(jax.nn.relu(self.norm(self.row(axial)))))


class ChannelGate(nnx.Module):
    """Eq 2: sigma(conv_1x1(ReLU(LN(conv_1x1(F_c))))), F_c the spatial mean."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        hidden = channels // 2
        self.reduce = layers.Linear(channels, hidden, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(hidden, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.expand = layers.Linear(hidden, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        """(B, H, W, C) to a gate (B, 1, 1, C) in (0, 1)."""
        pooled = x.mean(axis=(1, 2), keepdims=True)
        return jax.nn.sigmoid(self.expand(jax.nn.relu(self.norm(self.reduce(pooled)))))


class ContextualFeatureModulation(nnx.Module):
    """X_i = F + F*g_s + F*g_c + X_{i-1}, F the projected encoder tap; without gates if disabled."""

    def __init__(self, width: int, channels: int, *, k: int, enabled: bool, dtype, rngs: nnx.Rngs):
        self.projection = layers.Linear(width, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(channels, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        if enabled:
            self.spatial = SpatialGate(channels, k, dtype=dtype, rngs=rngs)
            self.channel = ChannelGate(channels, dtype=dtype, rngs=rngs)
        self.enabled = enabled

    def __call__(self, tap, previous):
        """tap (B, H, W, D) and previous (B, H, W, C) to X_i (B, H, W, C)."""
        feature = self.norm(self.projection(tap))
        if self.enabled:
            feature = feature + feature * self.spatial(feature) + feature * self.channel(feature)
        return feature + previous
