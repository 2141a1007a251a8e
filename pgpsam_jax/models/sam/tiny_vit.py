"""TinyViT, the image encoder of MobileSAM and LiteMedSAM: convolutions, then windowed attention.

Letters: B batch, H W token grid of the output, D width, N heads, C = D / N head channels, T tokens.
Channels last. Source: Wu et al. 2022 (TinyViT); Zhang et al. 2023 (MobileSAM), Ma et al. 2024
(LiteMedSAM: a patch embedding of stride 1, so that tokens of the output have 4 pixels).
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers
from pgpsam_jax.models.sam.attention import join_windows, split_windows
from pgpsam_jax.models.sam.image_encoder import Neck, normalize, recomputing, strips
from pgpsam_jax.models.sam.lora import LoraConfig, LoraQKV
from pgpsam_jax.models.sam.tiny_vit_conv import EPS, ConvNorm, MBConv, Merge
from pgpsam_jax.sharding.context import split_batch

STRIDES = {4: 1, 16: 2}  # pixels of an output token -> stride of each embedding convolution


@dataclasses.dataclass(frozen=True)
class TinyVitConfig:
    """Sizes of the encoder; `grid` is image size / patch size in tokens of the output.

    The four stages work on grids of 4, 2, 1 and 1 times `grid`. patch_size: 4 (LiteMedSAM) or 16
    (MobileSAM). colors, remat: as in `EncoderConfig`.
    """

    grid: tuple[int, int]
    patch_size: int
    widths: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    head_counts: tuple[int, ...] = (0, 4, 5, 10)  # the first stage is convolutional
    windows: tuple[int, ...] = (0, 7, 14, 7)
    expansion: int = 4
    out_channels: int = 256
    colors: str = "unit"
    remat: str = "none"
    attention: str = "auto"
    global_blocks: tuple[int, ...] = ()
    scan_blocks: bool = False

    def __post_init__(self):
        if self.patch_size not in STRIDES:
            raise UserError(
                f"model.patch_size is {self.patch_size}; TinyViT has 4 (LiteMedSAM) or 16 "
                "(MobileSAM)"
            )
        if self.attention not in ("auto", "naive"):
            raise UserError(
                f"model.attention {self.attention!r} is not for TinyViT, whose windows are small; "
                "choose auto"
            )
        if self.scan_blocks:
            raise UserError("model.scan_blocks: the stages of TinyViT differ; set it to False")

    @property
    def tap_widths(self) -> tuple[int, ...]:
        """Channels of what taps 0 to 3 return: see `TinyVit`."""
        third, fourth = self.widths[2:]
        return third, third, fourth, fourth

    @property
    def default_taps(self) -> tuple[int, int]:
        return 3, 0

    @property
    def fine_widths(self) -> tuple[int, ...]:
        """Channels of the maps of 2H x 2W and 4H x 4W."""
        return self.widths[1], self.widths[0]

    @property
    def heads(self) -> int:
        """Number of parts into which the heads of every stage divide."""
        return math.gcd(*self.head_counts)

    @property
    def width(self) -> int:
        """Number of parts into which the widths of every stage divide."""
        return math.gcd(*self.widths)

    def make(self, lora: LoraConfig | None, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "TinyVit":
        """Returns the module."""
        return TinyVit(self, lora, dtype=dtype, rngs=rngs)

    def describe_attention(self, dtype) -> str:
        """Returns one line on how attention is computed."""
        return f"einsum for windows {', '.join(f'{w}x{w}' for w in self.windows if w)}"


class Attention(nnx.Module):
    """Pre-norm self-attention in windows with a bias by |dy|, |dx|; qkv may carry LoRA.

    A window that overhangs the map holds tokens of zeros there, which the LayerNorm turns into its
    bias: they have keys and values, all alike, and are attended to.
    """

    def __init__(self, dim: int, heads: int, window: int, lora, *, dtype, rngs: nnx.Rngs):
        self.norm = layers.LayerNorm(dim, eps=EPS, dtype=dtype, rngs=rngs)
        self.qkv = layers.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = layers.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.biases = initializers.zeros_param(heads, window * window)
        if lora is not None:
            self.lora = LoraQKV(dim, lora, dtype=dtype, rngs=rngs)
        self.adapted, self.dtype = lora is not None, dtype
        self.heads, self.window = heads, window

    def project(self, x):
        """Returns q, k and v of normalized tokens (..., D): (..., 3, D)."""
        # The checkpoints have q, k and v of one head side by side.
        qkv = self.qkv(x).reshape(*x.shape[:-1], self.heads, 3, -1).swapaxes(-3, -2)
        qkv = qkv.reshape(*x.shape[:-1], 3, -1)
        return qkv + self.lora(x) if self.adapted else qkv

    def attend(self, qkv, outside):
        """Attention within windows (B, rows, columns, 3, D); outside: (3, D), of overhanging cells.

        Returns (B, rows, columns, D).
        """
        b, *grid, _, d = qkv.shape
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, self.heads, d // self.heads), 2, 0)
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        q, k, v = (each.swapaxes(1, 2) for each in (q, k, v))  # (B, N, T, C)
        inside, beyond = bias_indices(self.window, *grid)
        table = self.biases[...].astype(layers.wide(self.dtype))
        scores = layers.wide_einsum("bntc,bnsc->bnts", q, k) + table[:, inside]
        if beyond.size == 0:
            out = weigh(scores, v)
        else:
            # Cells outside have one key and one value: a single column, whose bias sums theirs.
            _, key, value = outside.reshape(3, self.heads, -1)
            extra = layers.wide_einsum("bntc,nc->bnt", q, key)
            extra = extra + jax.nn.logsumexp(table[:, beyond], axis=-1)
            value = jnp.broadcast_to(value[:, None], (b, self.heads, 1, value.shape[-1]))
            scores = jnp.concatenate([scores, extra[..., None]], -1)
            out = weigh(scores, jnp.concatenate([v, value], 2))
        return out.swapaxes(1, 2).reshape(b, *grid, d)

    def __call__(self, x):
        qkv, (height, width) = self.project(self.norm(x)), x.shape[1:3]
        outside = self.project(self.norm(jnp.zeros_like(x[0, 0, 0])))
        parts = [
            [
                join_windows(
                    self.attend(split_windows(qkv[:, rows, columns], (h, w)), outside),
                    (rows.stop - rows.start, columns.stop - columns.start),
                )
                for columns, w in strips(width, self.window)
            ]
            for rows, h in strips(height, self.window)
        ]
        return self.proj(jnp.concatenate([jnp.concatenate(row, 2) for row in parts], 1))


def weigh(scores, v):
    """softmax(scores) v, divided last: on T*C instead of T*T numbers."""
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bnts,bnsc->bntc", weights.astype(v.dtype), v)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


@functools.cache
def bias_indices(window: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries of the bias table for the tokens of a window that may overhang the map.

    Returns:
      (T, T) for keys of the rows x columns tokens inside, (T, window^2 - T) for those outside.
    """
    y, x = np.divmod(np.arange(window * window), window)
    inside = (y < rows) & (x < columns)
    entry = np.abs(y[:, None] - y) * window + np.abs(x[:, None] - x)
    return entry[inside][:, inside], entry[inside][:, ~inside]


class Block(nnx.Module):
    """Attention beside a shortcut, a depthwise convolution, and an MLP beside a shortcut."""

    def __init__(self, dim: int, heads: int, window: int, ratio: int, lora, *, dtype, rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, heads, window, lora, **common)
        self.local = ConvNorm((3, 3, dim), **common)
        self.norm = layers.LayerNorm(dim, eps=EPS, **common)
        self.mlp = layers.MlpBlock(dim, ratio * dim, activation=layers.gelu, **common)

    def __call__(self, x):
        x = self.local(x + self.attn(x))
        return x + self.mlp(self.norm(x))


class TinyVit(nnx.Module):
    """Images (B, rows, columns, 3) to the neck's (B, H, W, out), and taps (B, H, W, D).

    Tap 0 is the input of the third stage, 1 the output of its blocks, 2 what is made of it for the
    fourth stage, 3 the output of the fourth.
    """

    def __init__(self, config: TinyVitConfig, lora: LoraConfig | None, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        lora = lora if lora is not None and lora.rank and lora.targets else None
        stride, first = STRIDES[config.patch_size], config.widths[0]
        size = (3, 3) if stride == 2 else ()
        self.patch_embed = nnx.List(
            ConvNorm((*size, dim, out), stride, **common)
            for dim, out in ((3, first // 2), (first // 2, first))
        )
        sizes = zip(config.widths, config.depths, config.head_counts, config.windows, strict=True)
        self.stages: nnx.List[nnx.List[Any]] = nnx.List(
            nnx.List(
                Block(dim, heads, window, config.expansion, lora, **common)
                if heads
                else MBConv(dim, config.expansion * dim, **common)
                for _ in range(depth)
            )
            for dim, depth, heads, window in sizes
        )
        self.merges: nnx.List[Merge] = nnx.List(
            Merge(dim, out, stride, **common)
            for (dim, out), stride in zip(itertools.pairwise(config.widths), (2, 2, 1), strict=True)
        )
        self.neck = Neck(config.widths[-1], config.out_channels, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(self, images, taps: tuple[int, ...] = ()):
        """Returns (embedding, [tap i for i in taps])."""
        return self.pyramid(images, taps)[:2]

    def pyramid(self, images, taps: tuple[int, ...] = ()):
        """Returns the same, and the outputs of the second and first stage (`fine_widths`)."""
        if self.config.colors == "normalized":
            images = normalize(255 * images)
        run = recomputing(self.config.remat)
        x = split_batch(self.patch_embed[1](layers.gelu(self.patch_embed[0](images))))
        outputs: list[jax.Array] = []
        fine: list[jax.Array] = []
        for i, blocks in enumerate(self.stages):
            for block in blocks:
                x = run(block, x)
            (outputs if i >= 2 else fine).append(x)
            if i < len(self.merges):
                x = run(self.merges[i], x)
                if i >= 1:
                    outputs.append(x)
        return self.neck(x), [outputs[tap] for tap in taps], fine[::-1]
