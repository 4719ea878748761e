"""A small network for segmentation, whose output is large and far behind its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Segmenter"]


class Segmenter(nn.Module):
    """Two stages of residual blocks whose ends the decoder reads too, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = nn.ModuleList(Block(4) for _ in range(3))
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.narrow = nn.ModuleList(Block(8) for _ in range(2))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.decoder = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.wide:
            x = block(x)
        low = self.down(x)
        for block in self.narrow:
            low = block(low)
        return self.head(self.decoder(torch.cat([x, self.up(low.relu())], 1)).relu())


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()
