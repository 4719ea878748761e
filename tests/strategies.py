"""Random small residual networks, and random operators that an adaptor may stand beside.

A network is described by frozen records, so that hypothesis prints what failed and shrinks it. Every block
can be told to skip itself (`block.skip = True`): that hand-written forward is what dropping is judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.placement.algebra import Layout

__all__ = [
    "KINDS",
    "Block",
    "BlockSpec",
    "NetSpec",
    "OperatorSpec",
    "ResidualNet",
    "block_specs",
    "image_batch",
    "net_specs",
    "operator_specs",
    "skipped",
]

KINDS = ("basic", "bottleneck", "preactivation", "inverted", "squeeze", "depthwise")
SIZE = 8


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One residual block.

    Attributes:
        kind: One of `KINDS`.
        norm: Whether its convolutions are followed (or preceded) by batch norms.
        inplace: Whether its activations, and the join, work in place.
        spacer: "identity" or "dropout" between its parts, or "".
        behind: Whether a ReLU follows the join.
    """

    kind: str
    norm: bool = True
    inplace: bool = False
    spacer: str = ""
    behind: bool = True


@dataclass(frozen=True, slots=True)
class NetSpec:
    """A network: a stem, stages of blocks behind transitions, global pooling and a classifier.

    Attributes:
        channels: Width of each stage, the stem's first.
        strides: Stride into each stage but the first.
        projections: Whether the transition into each stage but the first has a projection shortcut.
        stages: The blocks of each stage.
        seed: Of the weights.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    projections: tuple[bool, ...]
    stages: tuple[tuple[BlockSpec, ...], ...]
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> ResidualNet:
        """The network, in evaluation mode, with statistics that are not the initial ones."""
        torch.manual_seed(self.seed)
        net = ResidualNet(self)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        return net.to(dtype).eval()


def _conv(inner: int, outer: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, stride=stride, padding=kernel // 2, groups=groups)


def _norm(channels: int, wanted: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if wanted else nn.Identity()


class Squeeze(nn.Module):
    """A channel gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = _conv(channels, 2, 1), _conv(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class Block(nn.Module):
    """`act(x + branch(x))`; with `skip` set, what is left of it: `act(x)`."""

    def __init__(self, spec: BlockSpec, channels: int) -> None:
        super().__init__()
        self.spec, self.skip = spec, False
        self.branch = nn.Sequential(*self._parts(channels))
        self.behind = nn.ReLU(inplace=spec.inplace) if spec.behind else nn.Identity()

    def _parts(self, width: int) -> list[nn.Module]:
        spec = self.spec
        act = nn.ReLU6 if spec.kind == "inverted" else nn.ReLU
        spacers = {"identity": nn.Identity, "dropout": lambda: nn.Dropout(0.3)}
        parts: list[nn.Module] = []

        def add(conv: nn.Module, channels: int, *, active: bool = True) -> None:
            parts.extend([conv, _norm(channels, spec.norm)])
            if active:
                parts.append(act(inplace=spec.inplace))
            if spec.spacer:
                parts.append(spacers[spec.spacer]())

        if spec.kind == "preactivation":
            parts.extend([_norm(width, spec.norm), nn.ReLU()])
            add(_conv(width, width), width)
            parts.append(_conv(width, width))
        elif spec.kind == "bottleneck":
            add(_conv(width, 3, 1), 3)
            add(_conv(3, 3), 3)
            add(_conv(3, width, 1), width, active=False)
        elif spec.kind == "inverted":
            add(_conv(width, 2 * width, 1), 2 * width)
            add(_conv(2 * width, 2 * width, groups=2 * width), 2 * width)
            add(_conv(2 * width, width, 1), width, active=False)
        elif spec.kind == "depthwise":
            add(_conv(width, width, groups=width), width)
            add(_conv(width, width, 1), width, active=False)
        else:
            add(_conv(width, width), width)
            add(_conv(width, width), width, active=False)
        return [*parts, Squeeze(width)] if spec.kind == "squeeze" else parts

    def forward(self, x: Tensor) -> Tensor:
        if self.skip:
            return F.relu(x) if self.spec.behind else x
        out = self.branch(x)
        if self.spec.inplace:
            out += x
        else:
            out = x + out
        return self.behind(out)


class Transition(nn.Module):
    """From one width to another, beside a projection shortcut or without one."""

    def __init__(self, inner: int, outer: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.conv, self.bn = _conv(inner, outer, stride=stride), nn.BatchNorm2d(outer)
        self.shortcut = _conv(inner, outer, 1, stride=stride) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))


class ResidualNet(nn.Module):
    """What a `NetSpec` describes; input `[batch, 3, 8, 8]`, output `[batch, 5]`."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, spec.channels[0]), nn.BatchNorm2d(spec.channels[0]), nn.ReLU())
        self.stages = nn.ModuleList()
        inner = spec.channels[0]
        for i, (outer, blocks) in enumerate(zip(spec.channels, spec.stages, strict=True)):
            stage = nn.Sequential()
            if i:
                stride, projection = spec.strides[i - 1], spec.projections[i - 1]
                stage.append(Transition(inner, outer, stride, projection=projection))
            for block in blocks:
                stage.append(Block(block, outer))
            self.stages.append(stage)
            inner = outer
        self.head = nn.Linear(inner, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def blocks(self) -> dict[str, Block]:
        """Residual blocks with an identity shortcut, by module path."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Block)}


@contextmanager
def skipped(net: ResidualNet, *paths: str) -> Iterator[ResidualNet]:
    """The network with some blocks skipped by their own forward."""
    blocks = [net.blocks()[path] for path in paths]
    for block in blocks:
        block.skip = True
    try:
        yield net
    finally:
        for block in blocks:
            block.skip = False


def image_batch(count: int = 2, *, dtype: torch.dtype = torch.float64, size: int = SIZE) -> Tensor:
    """Images `[count, 3, size, size]`, always the same ones."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype)


def block_specs() -> st.SearchStrategy[BlockSpec]:
    """Blocks of every kind."""
    return st.builds(
        BlockSpec,
        kind=st.sampled_from(KINDS),
        norm=st.booleans(),
        inplace=st.booleans(),
        spacer=st.sampled_from(("", "identity", "dropout")),
        behind=st.booleans(),
    )


@st.composite
def net_specs(draw: st.DrawFn) -> NetSpec:
    """Networks of one to three stages with one to three blocks each."""
    count = draw(st.integers(1, 3))
    return NetSpec(
        channels=tuple(draw(st.integers(4, 8)) for _ in range(count)),
        strides=tuple(draw(st.integers(1, 2)) for _ in range(count - 1)),
        projections=tuple(draw(st.booleans()) for _ in range(count - 1)),
        stages=tuple(tuple(draw(st.lists(block_specs(), min_size=1, max_size=3))) for _ in range(count)),
        seed=draw(st.integers(0, 99)),
    )


@dataclass(frozen=True, slots=True)
class OperatorSpec:
    """A convolution of one to three dimensions, its transpose, or a linear layer.

    Attributes:
        layout: Which of the three.
        dims: Spatial dimensions.
        inner: Input channels.
        outer: Output channels.
        kernel: Kernel size in every dimension.
        stride: Its stride.
        dilation: Its dilation.
        groups: Divides both widths.
        padding_mode: As in torch; `zeros` for a transposed convolution.
        bias: Whether there is one.
    """

    layout: Layout
    dims: int = 2
    inner: int = 4
    outer: int = 6
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The operator."""
        torch.manual_seed(0)
        if self.layout is Layout.LINEAR:
            return nn.Linear(self.inner, self.outer, bias=self.bias).to(dtype)
        plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        kinds = plain if self.layout is Layout.CONV else transposed
        module: nn.Module = kinds[self.dims - 1](
            self.inner,
            self.outer,
            self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            padding=self.dilation * (self.kernel // 2),
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
        )
        return module.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Data for it: channels last for a linear layer, else `[2, inner, 7, ...]`."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, 5, self.inner) if self.layout is Layout.LINEAR else (2, self.inner, *[7] * self.dims)
        return torch.randn(*shape, generator=generator, dtype=dtype)


@st.composite
def operator_specs(draw: st.DrawFn, *, grouped: bool = False) -> OperatorSpec:
    """Operators of every layout; with `grouped`, convolutions of two groups."""
    layout = draw(st.sampled_from([Layout.CONV, Layout.CONV_TRANSPOSE] if grouped else list(Layout)))
    modes = ("zeros", "reflect", "replicate", "circular") if layout is Layout.CONV else ("zeros",)
    return OperatorSpec(
        layout=layout,
        dims=draw(st.integers(1, 3)),
        inner=2 * draw(st.integers(1, 3)),
        outer=2 * draw(st.integers(1, 3)),
        kernel=draw(st.sampled_from((1, 3, 5))),
        stride=draw(st.integers(1, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=2 if grouped else 1,
        padding_mode=draw(st.sampled_from(modes)),
        bias=draw(st.booleans()),
    )
