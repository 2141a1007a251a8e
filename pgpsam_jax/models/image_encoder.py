"""SAM's image encoder: a ViT with windowed and global blocks, decomposed rel-pos, and a neck.

Letters: B batch, H W token grid, D width, N heads, C = D / N head dim. Channels last.
Source: Kirillov et al. 2023 (Segment Anything), Li et al. 2022 (ViTDet).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import attention, initial, layers
from pgpsam_jax.models.lora import LoraConfig, LoraQKV


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder. `grid` is the token grid, image size / patch size."""

    grid: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window_size: int = 14
    out_channels: int = 256
    attention: str = "folded"
    remat: bool = False


class Attention(nnx.Module):
    """Multi-head self-attention over the whole grid or over windows; qkv may carry LoRA."""

    def __init__(self, config: EncoderConfig, window: int, lora, *, dtype, rngs: nnx.Rngs):
        dim, head_dim = config.width, config.width // config.heads
        self.qkv = layers.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = layers.Linear(dim, dim, dtype=dtype, rngs=rngs)
        rows, columns = (window, window) if window else config.grid
        self.rel_pos_h = initial.zeros_param(2 * rows - 1, head_dim)
        self.rel_pos_w = initial.zeros_param(2 * columns - 1, head_dim)
        if lora is not None:
            self.lora = LoraQKV(dim, lora, dtype=dtype, rngs=rngs)
        self.adapted = lora is not None
        self.heads, self.window, self.dtype = config.heads, window, dtype
        self.backend = config.attention

    def project(self, x):
        """qkv without its bias: padding tokens are zero here and become the bias afterwards."""
        qkv = layers.matmul(x, self.qkv.kernel[...].astype(self.dtype))
        return qkv + self.lora(x) if self.adapted else qkv

    def __call__(self, x):
        x = x.astype(self.dtype)
        _, h, w, d = x.shape
        qkv = self.project(x)  # on the unpadded grid: a padded token's projection is known
        size = self.window
        padded = (-(-h // size) * size, -(-w // size) * size) if size else (h, w)
        if size:
            qkv = jnp.pad(qkv, ((0, 0), (0, padded[0] - h), (0, padded[1] - w), (0, 0)))
            qkv = attention.split_windows(qkv, size)
        qkv = qkv + self.qkv.bias[...].astype(self.dtype)
        grid = qkv.shape[1:3]
        qkv = qkv.reshape(qkv.shape[0], -1, 3, self.heads, d // self.heads)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # each (B, N, T, C)
        rel_h, rel_w = (p[...].astype(self.dtype) for p in (self.rel_pos_h, self.rel_pos_w))
        out = attention.BACKENDS[self.backend](q, k, v, rel_h, rel_w, grid)
        out = out.swapaxes(1, 2).reshape(-1, *grid, d)
        if size:
            out = attention.join_windows(out, padded)[:, :h, :w]
        return self.proj(out)


class Block(nnx.Module):
    """Pre-norm transformer block; `window` 0 means global attention."""

    def __init__(self, config: EncoderConfig, window: int, lora, *, dtype, rngs: nnx.Rngs):
        norm = dict(eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.norm1 = layers.layer_norm(config.width, **norm)
        self.attn = Attention(config, window, lora, dtype=dtype, rngs=rngs)
        self.norm2 = layers.layer_norm(config.width, **norm)
        self.mlp = layers.MlpBlock(
            config.width, 4 * config.width, activation=layers.gelu, dtype=dtype, rngs=rngs
        )

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Neck(nnx.Module):
    """1x1 and 3x3 convolution, each with a channel LayerNorm: D to the decoder's width."""

    def __init__(self, dim: int, out: int, *, dtype, rngs: nnx.Rngs):
        conv = dict(use_bias=False, kernel_init=initial.kernel_init, dtype=dtype, rngs=rngs)
        norm = dict(eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.conv1 = nnx.Conv(dim, out, (1, 1), **conv)
        self.norm1 = layers.layer_norm(out, **norm)
        self.conv2 = nnx.Conv(out, out, (3, 3), padding="SAME", **conv)
        self.norm2 = layers.layer_norm(out, **norm)

    def __call__(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class ImageEncoder(nnx.Module):
    """Images (B, rows, columns, 3) to the neck's (B, H, W, out), and block outputs (B, H, W, D)."""

    def __init__(
        self, config: EncoderConfig, lora: LoraConfig | None, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.patch_embed = layers.PatchEmbed(
            config.patch_size, 3, config.width, dtype=dtype, rngs=rngs
        )
        shape = (1, *config.grid, config.width)
        self.pos_embed = nnx.Param(jnp.asarray(0.02 * initial.draw(rngs, shape)))
        lora = lora if lora is not None and lora.rank and lora.targets else None
        self.blocks = nnx.List(
            Block(
                config,
                0 if i in config.global_blocks else config.window_size,
                lora,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(config.depth)
        )
        self.neck = Neck(config.width, config.out_channels, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(self, images, taps: tuple[int, ...] = ()):
        """Return (embedding, [output of block i for i in taps])."""
        x = self.patch_embed(images)
        x = x + self.pos_embed[...].astype(x.dtype)
        run = jax.checkpoint(Block.__call__) if self.config.remat else Block.__call__
        outputs = []
        for block in self.blocks:
            x = run(block, x)
            outputs.append(x)
        return self.neck(x), [outputs[i] for i in taps]
