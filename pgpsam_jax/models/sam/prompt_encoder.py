"""SAM's prompt encoder: points, boxes and masks to sparse tokens and a dense embedding.

Letters: B prompts, P points, H W token grid, C channels. Coordinates are pixels (x, y).
Source: Kirillov et al. 2023; random Fourier features of Tancik et al. 2020.
"""

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers


class FourierPositions(nnx.Module):
    """Random Fourier position encoding; the Gaussian matrix is a buffer, not a parameter."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.gaussian_matrix = layers.Buffer(
            initializers.array(initializers.sample(rngs, (2, channels // 2)))
        )

    def encode(self, coordinates):
        """(..., 2) coordinates (x, y) in [0, 1] to (..., C), always in float32."""
        # A TPU's default product of 16-bit operands would be off by 0.1 in what follows.
        places = jnp.matmul(2 * coordinates - 1, self.gaussian_matrix[...], precision="highest")
        angles = 2 * jnp.pi * places
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def grid(self, size: tuple[int, int]):
        """Encoding of every cell center of a token grid, (H, W, C)."""
        h, w = size
        y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
        return self.encode(jnp.stack([x, y], axis=-1))


class MaskDownscaling(nnx.Module):
    """(B, 4H, 4W, 1) mask logits to (B, H, W, C)."""

    def __init__(self, channels: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        conv = dict(padding="VALID", kernel_init=initializers.kernel_init, dtype=dtype, rngs=rngs)
        norm = dict(eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.conv1 = nnx.Conv(1, hidden // 4, (2, 2), strides=2, **conv)
        self.norm1 = layers.LayerNorm(hidden // 4, **norm)
        self.conv2 = nnx.Conv(hidden // 4, hidden, (2, 2), strides=2, **conv)
        self.norm2 = layers.LayerNorm(hidden, **norm)
        self.conv3 = nnx.Conv(hidden, channels, (1, 1), **conv)

    def __call__(self, masks):
        x = layers.gelu(self.norm1(self.conv1(masks)))
        return self.conv3(layers.gelu(self.norm2(self.conv2(x))))


class PromptEncoder(nnx.Module):
    """Sparse tokens (B, T, C) and dense embedding (B, H, W, C) of a batch of prompts."""

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        image_size: tuple[int, int],
        *,
        mask_channels: int = 16,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.pe_layer = FourierPositions(channels, rngs=rngs)
        self.point_embeddings = initializers.normal_param(
            rngs, 4, channels
        )  # background, foreground, two box corners
        self.not_a_point_embed = initializers.normal_param(rngs, channels)
        self.no_mask_embed = initializers.normal_param(rngs, channels)
        self.mask_downscaling = MaskDownscaling(channels, mask_channels, dtype=dtype, rngs=rngs)
        self.grid, self.image_size = grid, image_size

    def _encode_pixels(self, pixels):
        height, width = self.image_size
        return self.pe_layer.encode((pixels + 0.5) / jnp.array([width, height], jnp.float32))

    def _points(self, points, labels):
        """(B, P, 2) and (B, P) with 1 foreground, 0 background, -1 padding, to (B, P, C)."""
        label = labels[..., None]
        encoded = jnp.where(label == -1, 0.0, self._encode_pixels(points))
        table = self.point_embeddings[...]
        kind = jnp.where(
            label == -1, self.not_a_point_embed[...], jnp.where(label == 1, table[1], table[0])
        )
        return encoded + kind

    def _boxes(self, boxes):
        """(B, 4) xyxy to the two corner tokens (B, 2, C)."""
        corners = self._encode_pixels(boxes.reshape(-1, 2, 2))
        return corners + self.point_embeddings[...][2:4]

    def __call__(self, *, points=None, labels=None, boxes=None, masks=None, batch: int = 1):
        """Encode any combination of prompts; `batch` is used only when none is given.

        points (B, P, 2) with labels (B, P); boxes (B, 4); masks (B, 4H, 4W, 1) logits.
        """
        given = [x for x in (points, boxes, masks) if x is not None]
        batch = given[0].shape[0] if given else batch
        channels = self.no_mask_embed[...].shape[0]
        tokens = [jnp.zeros((batch, 0, channels))]
        if points is not None:
            if boxes is None:  # SAM pads point-only prompts with one "not a point"
                points = jnp.concatenate([points, jnp.zeros((batch, 1, 2))], axis=1)
                labels = jnp.concatenate([labels, -jnp.ones((batch, 1), labels.dtype)], axis=1)
            tokens.append(self._points(points, labels))
        if boxes is not None:
            tokens.append(self._boxes(boxes))
        if masks is not None:
            dense = self.mask_downscaling(masks)
        else:
            dense = jnp.broadcast_to(self.no_mask_embed[...], (batch, *self.grid, channels))
        return jnp.concatenate(tokens, axis=1), dense
