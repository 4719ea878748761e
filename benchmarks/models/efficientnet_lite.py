"""EfficientNet-Lite0 (Tan and Le 2019, in TensorFlow's `lite` variant: ReLU6, no squeeze-and-excitation)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.blocks import surviving

__all__ = ["EfficientNetLite0"]

STEM, HEAD, CLASSES = 32, 1280, 1000
# Repeats, kernel, stride of the first, expansion, channels.
SETTINGS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """A convolution and its batch norm; with stride 2 it is padded as TensorFlow does, the smaller half before.

    Args:
        inputs: Channels that enter.
        outputs: Channels that leave.
        kernel: 1, 3 or 5.
        stride: 1 or 2.
        groups: 1, or `inputs` for a depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        before = (kernel - 2) // 2
        self.pads = (before, kernel - 2 - before) * 2 if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`."""
        if self.pads is not None:
            x = functional.pad(x, self.pads)
        return self.bn(self.conv(x))  # type: ignore[no-any-return]  # torch leaves calls untyped


class Block(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = ConvNorm(inputs, width) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`."""
        out = x if self.expand is None else functional.relu6(self.expand(x))
        out = self.project(functional.relu6(self.depthwise(out)))
        return x + out if self.residual else out  # type: ignore[no-any-return]  # torch leaves calls untyped


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for 224x224 images and 1000 classes.

    Args:
        without: Labels of blocks to leave out, such as `blocks.4`; the others keep their names.

    Raises:
        OptionError: If `without` names a block that is absent or changes its input's shape.
    """

    def __init__(self, *, without: Iterable[str] = ()) -> None:
        super().__init__()
        blocks: dict[str, Block] = {}
        inputs = STEM
        for repeats, kernel, first_stride, expansion, channels in SETTINGS:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks[f"blocks.{len(blocks)}"] = Block(inputs, channels, kernel, stride, expansion)
                inputs = channels
        kept = surviving(tuple(blocks), [label for label, block in blocks.items() if block.residual], without)
        self.stem = ConvNorm(3, STEM, 3, 2)
        self.blocks = nn.Sequential(
            OrderedDict((label.removeprefix("blocks."), blocks[label]) for label in kept)
        )
        self.head = ConvNorm(inputs, HEAD)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, 3, 224, 224]` to logits `[N, 1000]`."""
        x = functional.relu6(self.head(self.blocks(functional.relu6(self.stem(x)))))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]  # torch leaves calls untyped
