"""SAM's image encoder: a ViT with windowed and global blocks, decomposed rel-pos, and a neck.

Letters: B batch, H W token grid, D width, N heads, C = D / N head dim. Channels last.
Source: Kirillov et al. 2023 (Segment Anything), Li et al. 2022 (ViTDet).
"""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.sam import attention
from pgpsam_jax.models.sam.lora import LoraConfig, LoraQKV
from pgpsam_jax.sharding import context
from pgpsam_jax.sharding.matmul import split_matmul

# What the backward pass recomputes instead of storing it, from the fastest to the smallest.
REMAT = {
    "none": "nothing",
    "attention": "scores and weights of the unfused attention",
    "dots": "all but the outputs of the linear layers",
    "blocks": "whole blocks: kept are their inputs",
}

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder, and how it is computed; `grid` is image size / patch size in tokens.

    colors: one of `weights.COLORS`, to which it brings images in [0, 1]. attention: a name of
    `attention.NAMES`; remat: one of `REMAT`. scan_blocks compiles the group of blocks that repeats
    once instead of all blocks, for a copy of their weights.
    """

    grid: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window_size: int = 14
    out_channels: int = 256
    colors: str = "unit"
    attention: str = "auto"
    remat: str = "none"
    scan_blocks: bool = False
    fine_widths: ClassVar[tuple[int, ...]] = ()  # of maps finer than the token grid: none

    def __post_init__(self):
        if self.attention not in attention.NAMES:
            raise UserError(
                f"model.attention {self.attention!r} unknown; choose one of "
                f"{', '.join(attention.NAMES)}"
            )
        if self.remat not in REMAT:
            raise UserError(f"model.remat {self.remat!r} unknown; choose one of {', '.join(REMAT)}")
        period = self.period
        repeats = tuple(range(period - 1, self.depth, period)) == tuple(self.global_blocks)
        if self.scan_blocks and (not repeats or self.depth % period):
            raise UserError(
                f"model.scan_blocks needs blocks that repeat, not {self.depth} with global ones at "
                f"{self.global_blocks}; set it to False"
            )

    @property
    def tap_widths(self) -> tuple[int, ...]:
        """Channels of what each tap returns: the output of each block."""
        return (self.width,) * self.depth

    @property
    def default_taps(self) -> tuple[int, int]:
        """The paper's: the last and the first block with global attention."""
        return self.global_blocks[-1], self.global_blocks[0]

    def make(self, lora: LoraConfig | None, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "ImageEncoder":
        """Returns the module."""
        return ImageEncoder(self, lora, dtype=dtype, rngs=rngs)

    def describe_attention(self, dtype) -> str:
        """Returns one line on the kernels of window and global blocks.

        Raises:
            UserError: they cannot be computed here.
        """
        channels = self.width // self.heads
        found: dict[str, list[str]] = {}
        sides = [self.grid] if self.global_blocks else []
        if len(self.global_blocks) < self.depth:
            rows, columns = (
                [size for _, size in strips(length, self.window_size)] for length in self.grid
            )
            sides += itertools.product(rows, columns)
        for i, (h, w) in enumerate(sides):
            window = i > 0 or not self.global_blocks
            overhangs = window and min(h, w) < self.window_size
            depth = channels + h + w + overhangs
            name = attention.choose(self.attention, h * w, depth, dtype)
            found.setdefault(name, []).append(f"{'windows' if window else 'global'} {h}x{w}")
        return "; ".join(f"{name} for {', '.join(places)}" for name, places in found.items())

    @property
    def period(self) -> int:
        """Blocks in the group that repeats: up to the first global one."""
        return self.global_blocks[0] + 1 if self.global_blocks else 1


class Attention(nnx.Module):
    """Multi-head self-attention over the whole token grid or over windows; qkv may carry LoRA."""

    def __init__(self, config: EncoderConfig, window: int, lora, *, dtype, rngs: nnx.Rngs):
        dim, head_dim = config.width, config.width // config.heads
        self.qkv = layers.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = layers.Linear(dim, dim, split=0, dtype=dtype, rngs=rngs)
        rows, columns = (window, window) if window else config.grid
        self.rel_pos_h = initializers.zeros_param(2 * rows - 1, head_dim)
        self.rel_pos_w = initializers.zeros_param(2 * columns - 1, head_dim)
        if lora is not None:
            self.lora = LoraQKV(dim, lora, dtype=dtype, rngs=rngs)
        self.adapted = lora is not None
        self.heads, self.window, self.dtype = config.heads, window, dtype
        self.backend, self.recompute = config.attention, config.remat == "attention"

    def project(self, x):
        """qkv of (B, H, W, D) with LoRA: (B, H, W, 3, D), heads in parts where devices share them.

        The bias is added last: before LoRA, bfloat16 logits end up further from float32's.
        """
        kernel, bias = (p[...].astype(self.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        # q, k and v apart, so that a part of each is that of whole heads.
        qkv = split_matmul(x, kernel.reshape(len(kernel), 3, -1), 2, 0)
        qkv = qkv + self.lora(x) if self.adapted else qkv
        return qkv + bias.reshape(3, -1)

    def attend(self, qkv):
        """Attention within windows (B, rows, columns, 3, D), which may overhang: (B, ..., D)."""
        b, h, w, _, d = qkv.shape
        qkv = qkv.reshape(b, -1, 3, self.heads, d // self.heads)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # each (B, N, T, C)
        # A token outside the image is zero: its projection is the bias, LoRA or not.
        bias = self.qkv.bias[...].astype(self.dtype).reshape(3, self.heads, -1)
        rel_h, rel_w = (p[...].astype(self.dtype) for p in (self.rel_pos_h, self.rel_pos_w))
        out = attention.attention(
            self.backend, q, k, v, rel_h, rel_w, (h, w), bias[1:], recompute=self.recompute
        )
        return out.swapaxes(1, 2).reshape(b, h, w, d)

    def __call__(self, x):
        x = x.astype(self.dtype)
        qkv, grid = self.project(x), x.shape[1:3]
        if not self.window:
            return self.proj(self.attend(qkv))
        # Whole windows, and those that overhang right, below and in the corner, by themselves.
        parts = [
            [
                attention.join_windows(
                    self.attend(attention.split_windows(qkv[:, rows, columns], (height, width))),
                    (rows.stop - rows.start, columns.stop - columns.start),
                )
                for columns, width in strips(grid[1], self.window)
            ]
            for rows, height in strips(grid[0], self.window)
        ]
        return self.proj(jnp.concatenate([jnp.concatenate(row, 2) for row in parts], 1))


def strips(length: int, window: int) -> list[tuple[slice, int]]:
    """A side's whole windows, and the rest of it: (where, tokens of one window within)."""
    whole = length - length % window
    found = [(slice(0, whole), window), (slice(whole, length), length - whole)]
    return [(place, size) for place, size in found if place.stop > place.start]


class Block(nnx.Module):
    """Pre-norm transformer block; `window` 0 means global attention."""

    def __init__(self, config: EncoderConfig, window: int, lora, *, dtype, rngs: nnx.Rngs):
        norm = dict(eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.norm1 = layers.LayerNorm(config.width, **norm)
        self.attn = Attention(config, window, lora, dtype=dtype, rngs=rngs)
        self.norm2 = layers.LayerNorm(config.width, **norm)
        self.mlp = layers.MlpBlock(
            config.width,
            4 * config.width,
            activation=layers.gelu,
            split=True,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Neck(nnx.Module):
    """1x1 and 3x3 convolution, each with a channel LayerNorm: D to the decoder's width."""

    def __init__(self, dim: int, out: int, *, dtype, rngs: nnx.Rngs):
        conv = dict(use_bias=False, kernel_init=initializers.kernel_init, dtype=dtype, rngs=rngs)
        conv["promote_dtype"] = layers.conv_arrays
        norm = dict(eps=layers.ENCODER_EPS, dtype=dtype, rngs=rngs)
        self.conv1 = nnx.Conv(dim, out, (1, 1), **conv)
        self.norm1 = layers.LayerNorm(out, **norm)
        self.conv2 = nnx.Conv(out, out, (3, 3), padding="SAME", **conv)
        self.norm2 = layers.LayerNorm(out, **norm)

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
        self.pos_embed = nnx.Param(initializers.array(0.02 * initializers.sample(rngs, shape)))
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
        if self.config.colors == "normalized":
            images = normalize(255 * images)
        x = self.patch_embed(images)
        x = context.split_batch(x + context.gather_weight(self.pos_embed[...].astype(x.dtype)))
        run = recomputing(self.config.remat)
        if self.config.scan_blocks:
            x, outputs = self.scan(run, x, taps)
            return self.neck(x), outputs
        outputs = []
        for block in self.blocks:
            x = run(block, x)
            outputs.append(x)
        return self.neck(x), [outputs[i] for i in taps]

    def pyramid(self, images, taps: tuple[int, ...] = ()):
        """Returns the same, and the maps of `fine_widths`: none."""
        return *self(images, taps), []

    def scan(self, run, x, taps: tuple[int, ...]):
        """The blocks as a loop over the group that repeats: (last output, [outputs of taps])."""
        period = self.config.period
        graphs, states = zip(*map(nnx.split, self.blocks), strict=True)
        stacked = [jax.tree.map(lambda *p: jnp.stack(p), *states[j::period]) for j in range(period)]
        kept = {tap % period for tap in taps}

        def group(x, states):
            outputs = {}
            for j, state in enumerate(states):
                x = run(nnx.merge(graphs[j], state), x)
                if j in kept:
                    outputs[j] = x
            return x, outputs

        x, outputs = jax.lax.scan(group, x, stacked)
        return x, [outputs[tap % period][tap // period] for tap in taps]


def normalize(images):
    """Colors from 0 to 255, (..., 3), as SAM's encoder was trained on them."""
    return (images - np.array(PIXEL_MEAN, images.dtype)) / np.array(PIXEL_STD, images.dtype)


def recomputing(remat: str):
    """run(block, x) by the policy of that name; new at every call, so that no trace is reused."""

    def run(block, x):
        return block(x)

    if remat == "blocks":
        return jax.checkpoint(run)
    if remat == "dots":
        return jax.checkpoint(run, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return run
