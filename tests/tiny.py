"""A network of four residual blocks that runs in a millisecond, and images for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BLOCKS", "Tiny", "images", "tiny"]

BLOCKS = ("body.0", "body.1", "body.2", "body.3")


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Tiny(nn.Module):
    """Images `[N, 3, 16, 16]` to scores `[N, 5]`; the blocks differ in width, so that each saves something else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(_Block(width) for width in (4, 8, 12, 16)))
        self.tail = nn.Conv2d(8, 6, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of five classes."""
        return self.head(self.pool(self.tail(self.body(self.stem(x)))).flatten(1))


def tiny(seed: int = 0) -> Tiny:
    """The network with the weights of a seed, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny().eval()


def images(count: int = 12, seed: int = 0) -> Tensor:
    """Random images `[count, 3, 16, 16]`."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
