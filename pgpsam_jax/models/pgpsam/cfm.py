"""Contextual Feature Modulation, CFM (paper 2.1, Eq 1-2): context gates on an encoder feature.

Letters: B batch, H W token grid, D encoder width, C feature channels. Channels last.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers


class StripConv(nnx.Module):
    """Depthwise convolution of odd length k along one spatial axis, zero padding, same size."""

    def __init__(
        self, channels: int, k: int, axis: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs
    ):
        self.kernel = initializers.kernel_param(rngs, (k, channels), k)
        self.bias = initializers.zeros_param(channels) if use_bias else None
        self.axis, self.dtype = axis, dtype

    def __call__(self, x):
        """(B, H, W, C) to the same shape."""
        kernel = jnp.expand_dims(self.kernel[...].astype(self.dtype), 2 - self.axis)
        x = layers.depthwise(x.astype(self.dtype), kernel)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class SpatialGate(nnx.Module):
    """Eq 1: sigma(conv_kx1(act(LN(conv_1xk(F_s))))), F_s the sum of both axial means."""

    def __init__(
        self, channels: int, k: int, *, activation=jax.nn.relu, use_bias=True, dtype, rngs: nnx.Rngs
    ):
        conv = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.row = StripConv(channels, k, axis=2, **conv)
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.column = StripConv(channels, k, axis=1, **conv)
        self.activation = activation

    def __call__(self, x):
        """(B, H, W, C) to a gate of the same shape in (0, 1)."""
        axial = x.mean(axis=2, keepdims=True) + x.mean(axis=1, keepdims=True)
        return jax.nn.sigmoid(self.column(self.activation(self.norm(self.row(axial)))))


class ChannelGate(nnx.Module):
    """Eq 2: sigma(conv_1x1(act(LN(conv_1x1(F_c))))), F_c the spatial mean."""

    def __init__(
        self, channels: int, *, activation=jax.nn.relu, use_bias=True, dtype, rngs: nnx.Rngs
    ):
        hidden, linear = channels // 2, dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.reduce = layers.Linear(channels, hidden, **linear)
        self.norm = layers.LayerNorm(hidden, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.expand = layers.Linear(hidden, channels, **linear)
        self.activation = activation

    def __call__(self, x):
        """(B, H, W, C) to a gate (B, 1, 1, C) in (0, 1)."""
        pooled = x.mean(axis=(1, 2), keepdims=True)
        return jax.nn.sigmoid(self.expand(self.activation(self.norm(self.reduce(pooled)))))


class ContextualFeatureModulation(nnx.Module):
    """X_i = F + F*g_s + F*g_c + X_{i-1}, F the projected encoder tap; without gates if disabled."""

    def __init__(self, width: int, channels: int, *, k: int, enabled: bool, dtype, rngs: nnx.Rngs):
        self.projection = layers.Linear(width, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = layers.LayerNorm(channels, eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        if enabled:
            self.spatial = SpatialGate(channels, k, dtype=dtype, rngs=rngs)
            self.channel = ChannelGate(channels, dtype=dtype, rngs=rngs)
        self.enabled = enabled

    def scale_start(self, factor: float) -> None:
        """Scales what is added to X_{i-1}, by the learned scale of its LayerNorm."""
        initializers.scale(self.norm.scale, factor)

    def __call__(self, tap, previous):
        """tap (B, H, W, D) and previous (B, H, W, C) to X_i (B, H, W, C)."""
        feature = self.norm(self.projection(tap))
        if self.enabled:
            feature = feature + feature * self.spatial(feature) + feature * self.channel(feature)
        return feature + previous
