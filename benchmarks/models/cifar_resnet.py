"""The CIFAR ResNets (He et al. 2016, section 4.2), with parameter-free shortcuts (option A)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.blocks import surviving
from fxprune.errors import OptionError

__all__ = ["BasicBlock", "CifarResNet", "resnet", "resnet20", "resnet56"]

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a parameter-free shortcut, joined by an add and a ReLU.

    Args:
        inputs: Channels that enter.
        outputs: Channels that leave, at least as many.
        stride: Of the first convolution and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, outputs, H/stride, W/stride]`."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every second row and column, and zero channels, half before and half after."""
        if self.missing == 0 and self.stride == 1:
            return x
        before = self.missing // 2
        return functional.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before)
        )


class CifarResNet(nn.Module):
    """A ResNet of depth `6n + 2` for 32x32 images and 10 classes.

    Args:
        n: Blocks in each of the three stages.
        without: Labels of blocks to leave out, such as `layer1.1`; the others keep their names.

    Raises:
        OptionError: If `without` names a block that is absent or changes its input's shape.
    """

    def __init__(self, n: int, *, without: Iterable[str] = ()) -> None:
        super().__init__()
        labels = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(n)]
        kept = surviving(labels, [x for x in labels if x not in ("layer2.0", "layer3.0")], without)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage("layer1", kept, WIDTHS[0], WIDTHS[0])
        self.layer2 = _stage("layer2", kept, WIDTHS[0], WIDTHS[1])
        self.layer3 = _stage("layer3", kept, WIDTHS[1], WIDTHS[2])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(WIDTHS[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, 3, 32, 32]` to logits `[N, 10]`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def _stage(name: str, kept: Iterable[str], inputs: int, outputs: int) -> nn.Sequential:
    """Builds the kept blocks of one stage under their own numbers; only block 0 changes the shape."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for label in kept:
        stage, index = label.split(".")
        if stage == name:
            first = index == "0" and inputs != outputs
            blocks[index] = BasicBlock(inputs if first else outputs, outputs, 2 if first else 1)
    return nn.Sequential(blocks)


def resnet(depth: int, *, without: Iterable[str] = ()) -> CifarResNet:
    """Builds the network of the given depth, for instance 20, 56 or 1202.

    Raises:
        OptionError: If `depth` is not `6n + 2` with `n` of at least 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise OptionError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
    return CifarResNet((depth - 2) // 6, without=without)


def resnet20(*, without: Iterable[str] = ()) -> CifarResNet:
    """Builds ResNet-20: 0.27 M parameters."""
    return resnet(20, without=without)


def resnet56(*, without: Iterable[str] = ()) -> CifarResNet:
    """Builds ResNet-56: 0.85 M parameters."""
    return resnet(56, without=without)
