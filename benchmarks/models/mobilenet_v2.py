"""MobileNetV2 (Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"), as deployed.

Batch norm is folded into the biases already, and stride-2 convolutions pad on the right and below only,
as TensorFlow does for even sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.blocks import surviving

__all__ = ["ConvLayer", "InvertedResidual", "MobileNetV2"]

STEM, HEAD, CLASSES = 32, 1280, 1001
# Table 2 of the paper: expansion, channels, repeats, stride of the first.
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvLayer(nn.Module):
    """A convolution with bias, followed by ReLU6 unless it is a projection.

    Args:
        inputs: Channels that enter.
        outputs: Channels that leave.
        kernel: 1 or 3.
        stride: 1 or 2.
        groups: 1, or `inputs` for a depthwise convolution.
        activation: Whether ReLU6 follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups)
        self.pads = stride == 2
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`."""
        if self.pads:
            x = functional.pad(x, (0, 1, 0, 1))
        x = self.conv(x)
        return functional.relu6(x) if self.activation else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut where the shape is kept.

    Args:
        inputs: Channels that enter.
        outputs: Channels that leave.
        stride: Of the depthwise convolution.
        expansion: Width of the depthwise convolution over `inputs`; at 1 there is no expansion layer.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [ConvLayer(inputs, width)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            ConvLayer(width, width, kernel=3, stride=stride, groups=width),
            ConvLayer(width, outputs, activation=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 for 224x224 images and 1001 classes, of which 0 is the background.

    Args:
        without: Labels of blocks to leave out, such as `features.4`; the others keep their names.

    Raises:
        OptionError: If `without` names a block that is absent or changes its input's shape.
    """

    def __init__(self, *, without: Iterable[str] = ()) -> None:
        super().__init__()
        blocks = _blocks()
        residual = [label for label, block in blocks.items() if block.residual]
        kept = surviving(tuple(blocks), residual, without)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["0"] = ConvLayer(3, STEM, kernel=3, stride=2)
        layers.update((label.removeprefix("features."), blocks[label]) for label in kept)
        layers[str(len(blocks) + 1)] = ConvLayer(SETTINGS[-1][1], HEAD)
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, 3, 224, 224]` in [-1, 1] to logits `[N, 1001]`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))  # type: ignore[no-any-return]


def _blocks() -> dict[str, InvertedResidual]:
    """Builds the 17 inverted residuals by label; number 0 is the stem."""
    blocks: dict[str, InvertedResidual] = {}
    inputs = STEM
    for expansion, channels, repeats, first_stride in SETTINGS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            blocks[f"features.{len(blocks) + 1}"] = InvertedResidual(inputs, channels, stride, expansion)
            inputs = channels
    return blocks
