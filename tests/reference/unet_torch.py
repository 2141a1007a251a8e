"""The U-Net of `models/baselines/unet.py` in plain PyTorch, for images (B, 3, S, S)."""

import torch
from torch import nn


def stage(dim: int, out: int, stride: int = 1) -> nn.Sequential:
    layers = []
    for first, step in ((dim, stride), (out, 1)):
        layers += [nn.Conv2d(first, out, 3, step, 1, bias=False), nn.GroupNorm(8, out)]
        layers.append(nn.LeakyReLU(0.01))
    return nn.Sequential(*layers)


class Unet(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.stem = stage(3, width)
        self.down = nn.ModuleList(stage(width << i, width << (i + 1), 2) for i in range(4))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(width << (i + 1), width << i, 2, 2) for i in (3, 2, 1, 0)
        )
        self.merge = nn.ModuleList(stage(width << (i + 1), width << i) for i in (3, 2, 1, 0))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        kept = [self.stem(x)]
        for down in self.down:
            kept.append(down(kept[-1]))
        x = kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = kept.pop()
            x = merge(torch.cat([skip, up(x)[..., : skip.shape[2], : skip.shape[3]]], 1))
        return self.head(x)
