"""One small network per motif, with the regions and rejections that the definitions give, derived by hand.

Every network is `Net(stem, block, tail)`: the stem widens 3 channels to 8, the tail narrows 8 to 5, so that
neither can be a region. Blocks hold at least two operators in a branch, so that the longest common path of
what disappears is the block itself, whether or not the join is counted.

A region is written as `Cut(label, dense, exit)`: its label without a trailing "#n", the module paths of its
convolutions, linear layers and attention modules, and whether it ends at the join ("add") or at the
activation behind it ("act").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fxprune.graph.regions import Reason

__all__ = ["MOTIFS", "Cut", "Motif", "Refusal"]

C = 8
BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Cut:
    """An expected region.

    Attributes:
        label: Base label (before any "#"), or None where the definition leaves it open.
        dense: Module paths of the dense operators that disappear.
        exit: "add", or "act" where the entry is a fixed point of the activation behind the join.
    """

    label: str | None
    dense: tuple[str, ...]
    exit: str = "add"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An expected rejection: any one of `reasons`, at a join inside the module `label`."""

    reasons: frozenset[Reason]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Motif:
    """A network and what discovery has to say about it.

    Attributes:
        name: Short name, the test's id.
        build: Makes the network.
        inputs: Makes its example input.
        identity: Expected identity regions, in any order.
        projection: Expected projection regions.
        sequential: Dense operators of the expected sequential regions; None where it is not asserted.
        rejections: Expected rejections when all kinds are asked for.
        front_ends: Front ends that can capture it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor | tuple[Tensor, ...] | dict[str, Tensor]]
    identity: tuple[Cut, ...] = ()
    projection: tuple[Cut, ...] = ()
    sequential: tuple[str, ...] | None = ()
    rejections: tuple[Refusal, ...] = ()
    front_ends: tuple[str, ...] = ("fx", "export")


def refused(*reasons: Reason, label: str = BLOCK) -> Refusal:
    """A `Refusal` for one of several reasons."""
    return Refusal(frozenset(reasons), label)


def image() -> Tensor:
    """An image batch, shape (2, 3, 16, 16)."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    """A token batch, shape (2, 9, 3)."""
    return torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))


def cut(*names: str, label: str | None = BLOCK, exit_: str = "add") -> Cut:
    """A `Cut` of `block` whose dense operators are direct children."""
    return Cut(label, tuple(f"{BLOCK}.{name}" for name in names), exit_)


def conv(inner: int = C, outer: int = C, kernel: int = 3, **options: int) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Stem, block, tail."""

    def __init__(
        self, block: nn.Module, *, stem: nn.Module | None = None, tail: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem = stem if stem is not None else conv(3, C)
        self.block = block
        self.tail = tail if tail is not None else conv(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.block(self.stem(x)))


class TokenNet(Net):
    """The same over tokens, shape (batch, tokens, channels)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, stem=nn.Linear(3, C), tail=nn.Linear(C, 5))


def relu_stem() -> nn.Module:
    """A stem whose output is a fixed point of ReLU."""
    return nn.Sequential(conv(3, C), nn.ReLU())


# --- residual blocks with an identity shortcut ---


class Basic(nn.Module):
    """`act(x + bn2(conv2(act(bn1(conv1(x))))))`, as in ResNet-18."""

    def __init__(self, act: nn.Module | None = None, *, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(C)
        self.act = act if act is not None else nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x
        return self.act(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with narrowing, as in ResNet-50; `groups` as in ResNeXt."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(C, 4, 1), conv(4, 4, groups=groups), conv(4, C, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(C)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(x + self.bn3(self.conv3(out)))


class PreActivation(nn.Module):
    """`x + conv2(relu(bn2(conv1(relu(bn1(x))))))`; with `inplace_entry` the first ReLU overwrites x."""

    def __init__(self, *, inplace_entry: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(C), conv()
        self.bn2, self.conv2 = nn.BatchNorm2d(C), conv()
        self.inplace_entry = inplace_entry

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu_(x) if self.inplace_entry else F.relu(self.bn1(x))
        return x + self.conv2(F.relu(self.bn2(self.conv1(first))))


class InPlace(nn.Module):
    """`x += f(x)` with `relu_` inside and behind: x is changed, but nobody else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x += self.conv2(self.conv1(x).relu_())
        return x.relu_()


class Functional(nn.Module):
    """`F.relu` throughout and `torch.add` as the join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.conv2(F.relu(self.conv1(x))), x))


class Joined(nn.Module):
    """Two convolutions f and a join of x and f(x) given as a function."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.conv2(F.relu(self.conv1(x))))


class LayerScale(nn.Module):
    """`x + gamma * f(x)`: the factor is a parameter, not data, so it is no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.gamma = nn.Parameter(torch.full((C, 1, 1), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv2(F.gelu(self.conv1(x)))


class Regularised(nn.Module):
    """Stochastic depth on the branch; dropout or nn.Identity everywhere else, the identity path included."""

    def __init__(self, between: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.a, self.b, self.c, self.d = between(), between(), between(), between()
        self.depth = StochasticDepth(0.2, "row")

    def forward(self, x: Tensor) -> Tensor:
        branch = self.b(self.conv2(F.relu(self.a(self.conv1(x)))))
        return self.d(self.c(x) + self.depth(branch))


class SqueezeExcitation(nn.Module):
    """A bottleneck-free branch that ends in a channel gate: the gate is a multiplicative join of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.fc1, self.fc2 = conv(C, 2, 1), conv(2, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(out, 1)))))
        return x + out * gate


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, with ReLU6 and no activation behind the join, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * C
        self.expand, self.bn1 = conv(C, wide, 1), nn.BatchNorm2d(wide)
        self.depthwise, self.bn2 = conv(wide, wide, groups=wide), nn.BatchNorm2d(wide)
        self.project, self.bn3 = conv(wide, C, 1), nn.BatchNorm2d(C)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn2(self.depthwise(self.act(self.bn1(self.expand(x))))))
        return x + self.bn3(self.project(out))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then layer norm and two linear layers over channels-last features."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv, self.norm = conv(kernel=7, groups=C), nn.LayerNorm(C)
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.gamma = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.fc2(F.gelu(self.fc1(out)))
        return x + out.permute(0, 3, 1, 2)


class Resampled(nn.Module):
    """The branch halves the image and restores it by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv(C, C, stride=2)
        self.up = nn.ConvTranspose2d(C, C, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


class Interpolated(nn.Module):
    """The branch halves the image and restores it by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(C, C, stride=2), conv()

    def forward(self, x: Tensor) -> Tensor:
        small = self.conv2(F.relu(self.conv1(x)))
        return x + F.interpolate(small, scale_factor=2.0, mode="nearest")


class SizeArithmetic(nn.Module):
    """Sizes of the entry steer views inside the branch (a channel shuffle)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(groups=2), conv(groups=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        out = self.conv1(x).view(batch, 2, channels // 2, height, width)
        out = out.transpose(1, 2).reshape(batch, channels, height, width)
        return x + self.conv2(out)


class SizeUsedOutside(Net):
    """Sizes of the entry, read before the block, also shape the result behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, _, height, width = x.shape
        x = self.tail(self.block(x))
        return x.reshape(batch, -1, height * width)


class Nested(nn.Module):
    """Residual blocks inside the branch of a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Bottleneck(), PreActivation()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class DoubleAdd(nn.Module):
    """`(x + f(x)) + g(x)`: f alone and both together are regions, g alone is not."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2, self.g1, self.g2 = conv(), conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f2(F.relu(self.f1(x)))) + self.g2(F.relu(self.g1(x)))


class ThreeBranches(nn.Module):
    """Three consecutive residual branches in one forward: three regions and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2, self.b1, self.b2, self.c1, self.c2 = (conv() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a2(F.relu(self.a1(x)))
        x = x + self.b2(F.relu(self.b1(x)))
        return x + self.c2(F.relu(self.c1(x)))


class InRoot(nn.Module):
    """Two consecutive residual branches in the root module: no composite, for the root is not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = conv(3, C), conv(C, 5)
        self.a1, self.a2, self.b1, self.b2 = conv(), conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a2(F.relu(self.a1(x)))
        x = x + self.b2(F.relu(self.b1(x)))
        return self.tail(x)


class CalledTwice(Net):
    """One block with two call sites, something between them: two regions over the same weights."""

    def __init__(self) -> None:
        super().__init__(PreActivation())
        self.between = nn.Sequential(nn.MaxPool2d(2), conv(C, 2 * C, 1), conv(2 * C, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.block(self.between(self.block(self.stem(x)))))


class SharedConvolution(nn.Module):
    """One convolution twice in a branch: dropped twice in one region; no chain of its own name is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = conv(C, 4, 1), conv(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.wide(F.relu(self.narrow(x)))
        return x + self.wide(F.relu(self.narrow(F.relu(out))))


# --- transformers ---


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention with one linear layer for query, key and value."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(batch, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class PackedAttention(nn.Module):
    """`nn.MultiheadAttention` as self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.mha(x, x, x, need_weights=False)
        return out


class Layer(nn.Module):
    """A transformer layer, `x + f(norm(x))`, or `x + norm(f(x))` as in Swin v2."""

    def __init__(self, attention: nn.Module, *, pre_norm: bool = True) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(C), attention
        self.norm2, self.mlp = nn.LayerNorm(C), Mlp()
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class PostNorm(nn.Module):
    """The original transformer, `norm(x + f(x))`: two regions with a norm between, so no composite."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(C), Attention(), nn.LayerNorm(C), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(nn.Module):
    """`x + attn(norm(x)) + mlp(norm(x))`: the norm feeds both, so only both together can go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(C), Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        return x + self.attn(normal) + self.mlp(normal)


class VisionTransformer(nn.Module):
    """Class token and position embedding are parameters: joining them to data is no candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, C, 4, stride=4), nn.Linear(C, 5)
        self.token = nn.Parameter(torch.zeros(1, 1, C))
        self.position = nn.Parameter(torch.zeros(1, 17, C))
        self.block = Layer(Attention())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.tail(self.block(x)[:, 0])


# --- projection shortcuts ---


class Downsample(nn.Module):
    """A basic block of stride 2 beside a 1x1 convolution and a norm, as in ResNet."""

    def __init__(self, *, average: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(C, 2 * C, stride=2), nn.BatchNorm2d(2 * C)
        self.conv2, self.bn2 = conv(2 * C, 2 * C), nn.BatchNorm2d(2 * C)
        pool = [nn.AvgPool2d(2)] if average else []
        self.shortcut = nn.Sequential(
            *pool, conv(C, 2 * C, 1, stride=1 if average else 2), nn.BatchNorm2d(2 * C)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class OptionA(nn.Module):
    """The shortcut of the CIFAR ResNets: every other pixel, zero channels appended."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(C, 2 * C, stride=2), conv(2 * C, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, C // 2, C // 2))
        return F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)


# --- what cannot be dropped ---


class Concatenated(nn.Module):
    """`cat(x, f(x))` brought back to the width of x."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.merge = conv(C, 4), conv(4, C), conv(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([x, self.conv2(F.relu(self.conv1(x)))], 1))


class DenseBlock(nn.Module):
    """Two dense layers: each concatenates all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.merge = conv(C, 4), conv(C + 4, 4), conv(C + 8, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.conv1(x))], 1)
        x = torch.cat([x, F.relu(self.conv2(x))], 1)
        return self.merge(x)


class SplitHalf(nn.Module):
    """ShuffleNet: one half is carried along, the other transformed, both concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(C // 2, C), conv(C, C // 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([first, self.conv2(F.relu(self.conv1(second)))], 1)


class SplitAdd(nn.Module):
    """One half plus a function of the other: the halves are not the entry."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.widen = conv(C // 2, C), conv(C, C // 2), conv(C // 2, C)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, C // 2, dim=1)
        return self.widen(first + self.conv2(F.relu(self.conv1(second))))


class LeakyBranch(nn.Module):
    """A value inside the branch leaves the block beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = F.relu(self.conv1(x))
        return x + self.conv2(inside), inside


class LeakyNet(Net):
    """Uses both values of `LeakyBranch`."""

    def __init__(self) -> None:
        super().__init__(LeakyBranch())
        self.aside = conv(C, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, inside = self.block(self.stem(x))
        return self.tail(out), self.aside(inside)


class LateUse(Net):
    """A U-Net skip: the entry of the block is read again much later, by a concatenation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, tail=conv(2 * C, 5))
        self.deep = nn.Sequential(conv(C, 2 * C), nn.ReLU(), conv(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        return self.tail(torch.cat([skip, self.deep(self.block(skip))], 1))


class SeveralInputs(nn.Module):
    """Two inputs meet in an add, for which the network has no common entry."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.block, self.tail = conv(3, C), conv(3, C), PreActivation(), conv(C, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.tail(self.block(self.left(a) + self.right(b)))


class CrossFed(nn.Module):
    """A second input enters the branch beside the entry, as memory enters a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other, self.tail = conv(3, C), conv(3, C), conv(C, 5)
        self.mix, self.out = conv(2 * C, 4), conv(4, C)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = self.stem(a)
        return self.tail(x + self.out(F.relu(self.mix(torch.cat([x, self.other(b)], 1)))))


class SeveralOutputs(Net):
    """A dict of the block's entry and exit."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        out = self.block(x)
        return {"low": x, "out": self.tail(out), "high": out}


class Pyramid(nn.Module):
    """A feature pyramid: the coarse level is an output of its own, so the branch that made it cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down1, self.down2 = conv(3, C), conv(C, 4, stride=2), conv(4, 2 * C)
        self.lateral1, self.lateral2 = conv(C, 5, 1), conv(2 * C, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(x)
        coarse = self.lateral2(self.down2(F.relu(self.down1(fine))))
        return self.lateral1(fine) + F.interpolate(coarse, scale_factor=2.0), coarse


class BroadcastAdd(nn.Module):
    """`x + g` where g has been pooled to one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(C, 4, 1), conv(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.adaptive_avg_pool2d(x, 1))))


class Doubled(nn.Module):
    """`x + x`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Gated(nn.Module):
    """A gated linear unit: neither half is an identity path from the entry, so no join is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.project = conv(C, 4 * C), conv(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.widen(x).chunk(2, dim=1)
        return x + self.project(value * torch.sigmoid(gate))


class Wider(nn.Module):
    """The branch computes in double precision, so the sum does too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.narrow = conv().double(), conv().double(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow((x + self.conv2(F.relu(self.conv1(x.to(torch.float64))))).to(torch.float32))


class SumOfBranches(nn.Module):
    """`f(x) + g(x)` where neither is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2, self.g1, self.g2 = conv(C, 4), conv(4, C), conv(C, 4), conv(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.f2(F.relu(self.f1(x))) + self.g2(F.relu(self.g1(x)))


# --- chains without a shortcut ---


def vgg_chain() -> nn.Module:
    """Convolutions of one width around a pooling, a classifier with one square layer."""
    return nn.Sequential(
        *(conv(3, C), nn.BatchNorm2d(C), nn.ReLU(inplace=True)),
        *(conv(), nn.BatchNorm2d(C), nn.ReLU(inplace=True)),
        *(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(C, 2 * C), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * C, 2 * C), nn.ReLU(), nn.Dropout()),
        nn.Linear(2 * C, 5),
    )


IDENTITY = (cut("conv1", "conv2"),)
TWO_CONVS = ("block.conv1", "block.conv2")
# The shortcut begins at the first convolution's input and so passes around it; only the second is a chain.
SECOND = ("block.conv2",)
ATTN = ("block.attn.qkv", "block.attn.proj")
MLP = ("block.mlp.fc1", "block.mlp.fc2")


def layer_cuts(attention: tuple[str, ...]) -> tuple[Cut, ...]:
    """The two branches of a transformer layer, named after their operators, and the layer."""
    branch = f"{BLOCK}.attn" if len(attention) > 1 else attention[0]
    return (Cut(branch, attention), Cut(f"{BLOCK}.mlp", MLP), Cut(BLOCK, (*attention, *MLP)))


MOTIFS: tuple[Motif, ...] = (
    Motif(
        "basic_after_relu",
        lambda: Net(Basic(), stem=relu_stem()),
        image,
        (cut("conv1", "conv2", exit_="act"),),
        sequential=SECOND,
    ),
    Motif(
        "basic_inplace_relu",
        lambda: Net(Basic(inplace=True), stem=relu_stem()),
        image,
        (cut("conv1", "conv2", exit_="act"),),
        sequential=SECOND,
    ),
    # A maximum of values that ReLU fixes is fixed by ReLU.
    Motif(
        "basic_after_maxpool",
        lambda: Net(Basic(), stem=nn.Sequential(conv(3, C), nn.ReLU(), nn.MaxPool2d(2))),
        image,
        (cut("conv1", "conv2", exit_="act"),),
        sequential=SECOND,
    ),
    # The stem's values may be negative, so the ReLU behind the join has to stay.
    Motif("basic_after_conv", lambda: Net(Basic()), image, IDENTITY, sequential=SECOND),
    Motif(
        "relu6_after_relu6",
        lambda: Net(Basic(nn.ReLU6()), stem=nn.Sequential(conv(3, C), nn.ReLU6())),
        image,
        (cut("conv1", "conv2", exit_="act"),),
        sequential=SECOND,
    ),
    # ReLU leaves values above 6, which ReLU6 would clip.
    Motif(
        "relu6_after_relu",
        lambda: Net(Basic(nn.ReLU6()), stem=relu_stem()),
        image,
        IDENTITY,
        sequential=SECOND,
    ),
    # GELU moves its own output again.
    Motif(
        "gelu_after_gelu",
        lambda: Net(Basic(nn.GELU()), stem=nn.Sequential(conv(3, C), nn.GELU())),
        image,
        IDENTITY,
        sequential=SECOND,
    ),
    Motif(
        "bottleneck",
        lambda: Net(Bottleneck()),
        image,
        (cut("conv1", "conv2", "conv3"),),
        sequential=("block.conv2",),
    ),
    Motif(
        "grouped_bottleneck",
        lambda: Net(Bottleneck(groups=2)),
        image,
        (cut("conv1", "conv2", "conv3"),),
        sequential=("block.conv2",),
    ),
    Motif("pre_activation", lambda: Net(PreActivation()), image, IDENTITY, sequential=TWO_CONVS),
    Motif("in_place_join", lambda: Net(InPlace()), image, IDENTITY, sequential=SECOND),
    Motif("functional", lambda: Net(Functional()), image, IDENTITY, sequential=SECOND),
    Motif("layer_scale", lambda: Net(LayerScale()), image, IDENTITY, sequential=SECOND),
    Motif(
        "dropout_inserted",
        lambda: Net(Regularised(lambda: nn.Dropout(0.1))),
        image,
        IDENTITY,
        sequential=SECOND,
    ),
    Motif("identity_inserted", lambda: Net(Regularised(nn.Identity)), image, IDENTITY, sequential=SECOND),
    Motif(
        "squeeze_excitation",
        lambda: Net(SqueezeExcitation()),
        image,
        (cut("conv1", "conv2", "fc1", "fc2"),),
        sequential=SECOND,
        rejections=(refused(Reason.MULTIPLICATIVE),),
    ),
    Motif(
        "inverted_residual",
        lambda: Net(InvertedResidual()),
        image,
        (cut("expand", "depthwise", "project"),),
        sequential=("block.depthwise",),
    ),
    Motif(
        "convnext",
        lambda: Net(ConvNeXtBlock()),
        image,
        (cut("dwconv", "fc1", "fc2"),),
    ),
    Motif("transposed_convolution", lambda: Net(Resampled()), image, (cut("down", "up"),)),
    Motif("interpolated", lambda: Net(Interpolated()), image, IDENTITY, sequential=("block.conv2",)),
    Motif("size_arithmetic", lambda: Net(SizeArithmetic()), image, IDENTITY, sequential=SECOND),
    Motif(
        "size_used_outside", lambda: SizeUsedOutside(PreActivation()), image, IDENTITY, sequential=TWO_CONVS
    ),
    # Half a branch is still an addend: the join itself adds x unscaled.
    Motif("half_branch", lambda: Net(Joined(lambda x, f: x + 0.5 * f)), image, IDENTITY, sequential=SECOND),
    Motif(
        "add_with_unit_alpha",
        lambda: Net(Joined(lambda x, f: torch.add(x, f, alpha=1))),
        image,
        IDENTITY,
        sequential=SECOND,
    ),
    Motif(
        "nested",
        lambda: Net(Nested()),
        image,
        (
            Cut("block.first", ("block.first.conv1", "block.first.conv2", "block.first.conv3")),
            Cut("block.second", ("block.second.conv1", "block.second.conv2")),
            Cut(
                BLOCK,
                (
                    "block.first.conv1",
                    "block.first.conv2",
                    "block.first.conv3",
                    "block.second.conv1",
                    "block.second.conv2",
                ),
            ),
        ),
        sequential=("block.first.conv2", "block.second.conv1", "block.second.conv2"),
    ),
    Motif(
        "double_add",
        lambda: Net(DoubleAdd()),
        image,
        (cut("f1", "f2"), cut("f1", "f2", "g1", "g2")),
        sequential=("block.f2", "block.g2"),
    ),
    Motif(
        "three_branches",
        lambda: Net(ThreeBranches()),
        image,
        (cut("a1", "a2"), cut("b1", "b2"), cut("c1", "c2"), cut("a1", "a2", "b1", "b2", "c1", "c2")),
        sequential=("block.a2", "block.b2", "block.c2"),
    ),
    Motif(
        "residuals_in_root",
        InRoot,
        image,
        (Cut(None, ("a1", "a2")), Cut(None, ("b1", "b2"))),
        sequential=("a2", "b2"),
    ),
    Motif("shared_module", CalledTwice, image, (*IDENTITY, *IDENTITY), sequential=None),
    Motif("shared_convolution", lambda: Net(SharedConvolution()), image, (cut("narrow", "wide"),)),
    # fx keeps nn.MultiheadAttention whole, export shows its output projection; so chains are not asserted.
    Motif(
        "transformer_packed",
        lambda: TokenNet(Layer(PackedAttention())),
        tokens,
        layer_cuts(("block.attn.mha",)),
        sequential=None,
    ),
    Motif(
        "transformer_unpacked",
        lambda: TokenNet(Layer(Attention())),
        tokens,
        layer_cuts(ATTN),
        sequential=("block.attn.proj",),
    ),
    Motif(
        "transformer_residual_post_norm",
        lambda: TokenNet(Layer(Attention(), pre_norm=False)),
        tokens,
        layer_cuts(ATTN),
        sequential=("block.attn.proj",),
    ),
    Motif(
        "transformer_post_norm",
        lambda: TokenNet(PostNorm()),
        tokens,
        (Cut(None, ATTN), Cut(None, MLP)),
        sequential=("block.attn.proj",),
    ),
    Motif(
        "parallel_branches",
        lambda: TokenNet(Parallel()),
        tokens,
        (Cut(BLOCK, (*ATTN, *MLP)),),
        sequential=("block.attn.proj",),
        rejections=(refused(Reason.USED_OUTSIDE),),
    ),
    Motif("class_token", VisionTransformer, image, layer_cuts(ATTN), sequential=("block.attn.proj",)),
    Motif(
        "projection",
        lambda: Net(Downsample(), stem=relu_stem(), tail=conv(2 * C, 5)),
        image,
        projection=IDENTITY,
        sequential=("block.conv2",),
    ),
    Motif(
        "projection_average",
        lambda: Net(Downsample(average=True), tail=conv(2 * C, 5)),
        image,
        projection=IDENTITY,
        sequential=("block.conv2",),
    ),
    Motif(
        "option_a",
        lambda: Net(OptionA(), tail=conv(2 * C, 5)),
        image,
        projection=IDENTITY,
        sequential=("block.conv2",),
    ),
    Motif("concatenation", lambda: Net(Concatenated()), image, rejections=(refused(Reason.CONCATENATION),)),
    Motif(
        "dense_block",
        lambda: Net(DenseBlock()),
        image,
        rejections=(refused(Reason.CONCATENATION), refused(Reason.CONCATENATION)),
    ),
    Motif(
        "split_concatenation", lambda: Net(SplitHalf()), image, rejections=(refused(Reason.CONCATENATION),)
    ),
    Motif(
        "split_add",
        lambda: Net(SplitAdd()),
        image,
        projection=IDENTITY,  # taking half the channels is a linear shortcut, and it stays
    ),
    Motif(
        "used_inside_and_outside",
        LeakyNet,
        image,
        sequential=None,
        rejections=(refused(Reason.USED_OUTSIDE),),
    ),
    Motif(
        "late_use",
        lambda: LateUse(PreActivation()),
        image,
        IDENTITY,
        sequential=TWO_CONVS,
        rejections=(refused(Reason.CONCATENATION, label=""),),
    ),
    # `+=` overwrites the value that the skip reads later: without the block it would hold something else.
    # Every reader reads the overwritten value, so the skip reads the exit: a region. Symbolic tracing alone gets
    # `x += y` wrong, which trace notices.
    Motif(
        "late_use_of_overwritten_entry",
        lambda: LateUse(InPlace()),
        image,
        IDENTITY,
        sequential=None,
        rejections=(refused(Reason.CONCATENATION, label=""),),
        front_ends=("auto", "export"),
    ),
    # The ReLU overwrites x before the join reads it, so the join adds relu(x): the ReLU is the entry.
    Motif(
        "in_place_entry",
        lambda: Net(PreActivation(inplace_entry=True)),
        image,
        IDENTITY,
        sequential=None,
    ),
    Motif(
        "several_inputs",
        SeveralInputs,
        lambda: (image(), image().flip(0)),
        IDENTITY,
        sequential=TWO_CONVS,
        rejections=(refused(Reason.NO_COMMON_ENTRY, label=""),),
    ),
    Motif(
        "dict_inputs",
        SeveralInputs,
        lambda: {"a": image(), "b": image().flip(0)},
        IDENTITY,
        sequential=TWO_CONVS,
        rejections=(refused(Reason.NO_COMMON_ENTRY, label=""),),
    ),
    # Neither the concatenation nor the sum of two inputs has an entry that leads to both operands.
    Motif(
        "fed_from_outside",
        CrossFed,
        lambda: (image(), image().flip(0)),
        rejections=(
            refused(Reason.FED_FROM_OUTSIDE, Reason.NO_COMMON_ENTRY, label=""),
            refused(Reason.CONCATENATION, Reason.NO_COMMON_ENTRY, label=""),
        ),
    ),
    Motif("several_outputs", lambda: SeveralOutputs(PreActivation()), image, IDENTITY, sequential=TWO_CONVS),
    Motif(
        "pyramid",
        Pyramid,
        image,
        rejections=(refused(Reason.USED_OUTSIDE, Reason.NO_IDENTITY_PATH, label=""),),
    ),
    Motif("broadcast_add", lambda: Net(BroadcastAdd()), image, rejections=(refused(Reason.BROADCAST),)),
    Motif("doubled", lambda: Net(Doubled()), image, rejections=(refused(Reason.NO_OPERATOR),)),
    Motif("gated", lambda: Net(Gated()), image, (cut("widen", "project"),)),
    Motif("wider_type", lambda: Net(Wider()), image, sequential=None, rejections=(refused(Reason.DTYPE),)),
    Motif(
        "sum_of_branches", lambda: Net(SumOfBranches()), image, rejections=(refused(Reason.NO_IDENTITY_PATH),)
    ),
    # The sign and the factor belong to the branch: x itself passes unscaled.
    Motif(
        "difference",
        lambda: Net(Joined(lambda x, f: x - f)),
        image,
        (cut("conv1", "conv2", exit_="act"),),
        sequential=SECOND,
    ),
    Motif(
        "scaled_branch",
        lambda: Net(Joined(lambda x, f: torch.add(x, f, alpha=2))),
        image,
        IDENTITY,
        sequential=SECOND,
    ),
    Motif(
        "scaled_entry",
        lambda: Net(Joined(lambda x, f: torch.add(f, x, alpha=2))),
        image,
        sequential=SECOND,
        rejections=(refused(Reason.SCALED),),
    ),
    Motif(
        "subtracted_entry",
        lambda: Net(Joined(lambda x, f: f - x)),
        image,
        sequential=SECOND,
        rejections=(refused(Reason.SCALED),),
    ),
    Motif(
        "scaled_shortcut",
        lambda: Net(Joined(lambda x, f: 0.5 * x + f)),
        image,
        sequential=SECOND,
        rejections=(refused(Reason.NO_IDENTITY_PATH),),
    ),
    Motif(
        "gate",
        lambda: Net(Joined(lambda x, f: x * torch.sigmoid(f))),
        image,
        sequential=SECOND,
        rejections=(refused(Reason.MULTIPLICATIVE),),
    ),
    Motif("chain", vgg_chain, image, sequential=("3", "6", "13")),
)
