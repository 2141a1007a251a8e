"""TinyViT of LiteMedSAM and MobileSAM in PyTorch, with the operations and names of the originals.

Batch norms stay at their running statistics, as in our encoder. Letters: B batch, H W map, T tokens
of a window, D width. Sizes come as the dictionary of a `TinyVitConfig`.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class BatchNorm(nn.Module):
    """Batch norm of (B, D, H, W) at its running statistics."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm."""

    def __init__(self, dim: int, out: int, size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(dim, out, size, stride, size // 2, groups=groups, bias=False)
        self.bn = BatchNorm(out)

    def forward(self, x):
        return self.bn(self.c(x))


class Bottleneck(nn.Module):
    """1x1, depthwise 3x3 and 1x1; with a shortcut (MBConv) or without (between stages)."""

    def __init__(self, dim: int, hidden: int, out: int, stride: int, shortcut: bool):
        super().__init__()
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride, hidden)
        self.conv3 = ConvNorm(hidden, out)
        self.shortcut = shortcut

    def forward(self, x):
        hidden = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(hidden + x) if self.shortcut else hidden


class Attention(nn.Module):
    """Attention of windows (B, T, D), which it normalizes, padding and all."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.proj, self.heads = nn.Linear(dim, dim), heads
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        # On the CPU even where parameters are but shapes.
        cells = torch.arange(window * window, device="cpu")
        y, x = cells // window, cells % window
        entry = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("entry", entry, persistent=False)

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.qkv(self.norm(x)).view(b, t, self.heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = (scores + self.attention_biases[:, self.entry]).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two linear layers after a LayerNorm."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    """Windowed attention, depthwise convolution and MLP of (B, H, W, D)."""

    def __init__(self, dim: int, heads: int, window: int, expansion: int):
        super().__init__()
        self.attn, self.window = Attention(dim, heads, window), window
        self.local_conv = ConvNorm(dim, dim, 3, 1, dim)
        self.mlp = Mlp(dim, expansion * dim)

    def forward(self, x):
        (b, h, w, d), n = x.shape, self.window
        windows = F.pad(x, (0, 0, 0, -w % n, 0, -h % n))
        rows, columns = windows.shape[1] // n, windows.shape[2] // n
        windows = windows.view(b, rows, n, columns, n, d).transpose(2, 3).reshape(-1, n * n, d)
        out = self.attn(windows).view(b, rows, columns, n, n, d).transpose(2, 3)
        x = x + out.reshape(b, rows * n, columns * n, d)[:, :h, :w]
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)


class Stage(nn.Module):
    """Blocks, and what leads to the next stage."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, D, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class TinyVit(nn.Module):
    """Images (B, 3, rows, columns) to the neck's output (B, out, H, W)."""

    def __init__(self, sizes: dict):
        super().__init__()
        widths, out, expansion = sizes["widths"], sizes["out_channels"], sizes["expansion"]
        size, stride = {4: (1, 1), 16: (3, 2)}[sizes["patch_size"]]
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(
            ConvNorm(3, widths[0] // 2, size, stride),
            nn.GELU(),
            ConvNorm(widths[0] // 2, widths[0], size, stride),
        )
        merges = [
            Bottleneck(dim, wider, wider, stride, shortcut=False)
            for (dim, wider), stride in zip(itertools.pairwise(widths), (2, 2, 1), strict=True)
        ]
        stages = zip(
            widths, sizes["depths"], sizes["head_counts"], sizes["windows"], (*merges, None),
            strict=True,
        )  # fmt: skip
        self.layers = nn.ModuleList(
            Stage(
                [
                    Block(dim, heads, window, expansion)
                    if heads
                    else Bottleneck(dim, expansion * dim, dim, 1, shortcut=True)
                    for _ in range(depth)
                ],
                merge,
            )
            for dim, depth, heads, window, merge in stages
        )
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], out, 1, bias=False),
            ChannelNorm(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            ChannelNorm(out),
        )

    def forward(self, images):
        return self.maps(images)[0]

    def maps(self, images):
        """Returns the output, and the four maps on its grid as (B, D, H, W)."""
        x, found = self.patch_embed.seq(images), []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                if i == 0:
                    x = block(x)
                else:
                    x = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            found += [x] if i >= 2 else []
            if stage.downsample is not None:
                x = stage.downsample(x)
                found += [x] if i >= 1 else []
        return self.neck(x), found
