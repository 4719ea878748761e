"""Which operators can absorb an adaptor, and why the others cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2

import fxprune
from fxprune.graph.regions import AdaptorSite, Side
from fxprune.passes import Adaptor, FoldAdaptors, InsertAdaptors
from fxprune.placement.algebra import Layout
from fxprune.placement.dense import DenseOperator, OperatorIndex
from tests.strategies import image_batch


def images() -> Tensor:
    return image_batch(dtype=torch.float32)


class Leaves(fx.Tracer):
    """Keeps every module that holds parameters of its own as a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return bool(m._parameters) or super().is_leaf_module(m, module_qualified_name)


def operators(model: nn.Module, inputs: Any = None, **options: Any) -> list[DenseOperator]:
    gm = fxprune.trace(model, images() if inputs is None else inputs, **options)
    index = OperatorIndex(gm)
    return [op for node in gm.graph.nodes if (op := index.get(node.name)) is not None]


class Two(nn.Module):
    """A convolution to 4 channels and one that keeps them."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize(
    ("module", "inputs", "layout", "widths", "dim"),
    [
        (nn.Conv1d(3, 5, 3), (2, 3, 9), Layout.CONV, (3, 5), 1),
        (nn.Conv2d(3, 5, 3, bias=False), (2, 3, 9, 9), Layout.CONV, (3, 5), 1),
        (nn.Conv3d(3, 5, 3), (2, 3, 5, 5, 5), Layout.CONV, (3, 5), 1),
        (nn.ConvTranspose2d(3, 5, 2, stride=2), (2, 3, 4, 4), Layout.CONV_TRANSPOSE, (3, 5), 1),
        (nn.Linear(3, 5), (2, 7, 3), Layout.LINEAR, (3, 5), -1),
    ],
    ids=["conv1d", "conv2d", "conv3d", "transposed", "linear"],
)
def test_dense_operators_of_both_front_ends_are_the_same(
    module: nn.Module,
    inputs: tuple[int, ...],
    layout: Layout,
    widths: tuple[int, int],
    dim: int,
    front_end: str,
) -> None:
    (found,) = operators(nn.Sequential(module), torch.randn(*inputs), front_end=front_end)
    assert (found.layout, found.channel_dim, found.refusal, found.groups) == (layout, dim, "", 1)
    assert (found.in_channels, found.out_channels) == widths
    assert found.read == found.write
    assert found.read.endswith("weight")
    assert (found.bias is None) is (module.bias is None)


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_grouped_operators_are_refused_with_their_true_widths(front_end: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3, groups=4))
    first, second = operators(net, torch.randn(2, 4, 8, 8), front_end=front_end)
    assert (first.refusal, first.groups, first.in_channels, first.out_channels) == ("it is grouped", 2, 4, 8)
    assert (second.refusal, second.groups, second.in_channels, second.out_channels) == (
        "it is grouped",
        4,
        8,
        4,
    )


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_a_shared_module_is_refused(front_end: str) -> None:
    class Twice(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.second(self.first(x))))

    plain, *shared = operators(Twice(nn.Conv2d(4, 4, 1)), front_end=front_end)
    assert plain.refusal == ""
    assert len(shared) == 2
    assert all("more than once" in operator.refusal for operator in shared)


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_a_tied_weight_is_refused(front_end: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    found = operators(net, torch.randn(2, 4), front_end=front_end)
    assert len(found) == 2
    assert all("more than once" in operator.refusal for operator in found)


def test_a_weight_tied_to_an_embedding_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    (head,) = operators(Tied(), torch.arange(6)[None])
    assert "more than once" in head.refusal


def test_a_parametrised_weight_is_refused() -> None:
    net = Two(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    plain, normed = operators(net)
    assert plain.refusal == ""
    assert normed.refusal == "its weight is parametrised"


def test_a_weight_normed_in_the_old_way_is_refused() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        conv = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
    net = Two(conv)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            net(images())  # its weight is a tensor with a history, and then one without
        assert operators(net)[1].refusal == "its weight is parametrised"


class Standardised(nn.Module):
    """A convolution whose weight is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True))


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_a_computed_weight_is_refused(front_end: str) -> None:
    _, computed = operators(Two(Standardised()), front_end=front_end)
    assert computed.refusal == "its weight is computed, not stored"
    assert (computed.in_channels, computed.out_channels) == (4, 4)


class Squares(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input * input, self.weight, self.bias)


class Same(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


@pytest.mark.parametrize(("kind", "refused"), [(Squares, True), (Same, False), (nn.Conv2d, False)])
def test_a_subclass_is_accepted_only_where_it_is_the_same_map(kind: type[nn.Conv2d], refused: bool) -> None:
    net = Two(kind(4, 4, 3)).eval()
    gm = fx.GraphModule(net, Leaves().trace(net))
    fxprune.passes.PropagateShapes(images())(gm)
    operator = OperatorIndex(gm).get("second")
    assert operator is not None
    assert bool(operator.refusal) is refused
    if refused:
        assert "Squares does not apply its weight as Conv2d does" in operator.refusal


def test_a_module_with_hooks_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    gm = fxprune.trace(net, images())
    gm.get_submodule("0").register_forward_hook(lambda *args: None)
    operator = OperatorIndex(gm).get("_0")
    assert operator is not None
    assert operator.refusal == "the module has forward hooks"


def test_weights_on_meta_are_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 4, 1))
    (operator,) = operators(net, torch.empty(2, 3, 8, 8, device="meta"))
    assert operator.refusal == "its weight is on the meta device"


@torch.no_grad()
def test_half_precision_folds_to_its_own_precision() -> None:
    net = Two(nn.Conv2d(4, 4, 1)).half()
    gm = fxprune.trace(net, images().half())
    assert OperatorIndex(gm)["second"].refusal == ""
    InsertAdaptors([AdaptorSite("second", Side.PRE, 4, 1)])(gm)
    (adaptor,) = [m for m in gm.modules() if isinstance(m, Adaptor)]
    adaptor.weight.copy_(torch.randn(4, 4))
    assert adaptor.weight.dtype == torch.float16
    wanted = copy.deepcopy(gm).float()(images())
    FoldAdaptors()(gm)
    assert gm.get_parameter("second.weight").dtype == torch.float16
    assert float((gm(images().half()).float() - wanted).abs().max()) < 0.05


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y)[0]


def test_attention_is_one_operator_with_two_weights() -> None:
    class Self(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    (packed,) = operators(Self(), torch.randn(2, 5, 4), front_end="fx")
    assert (packed.read, packed.write) == ("attention.in_proj_weight", "attention.out_proj.weight")
    assert packed.refusal == ""
    assert (packed.data, packed.channel_dim, packed.output) == (("x",) * 3, -1, "getitem")


def test_unpacked_projections_are_refused() -> None:
    both = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    (unpacked,) = operators(Attends(kdim=6, vdim=6), both, front_end="fx")
    assert unpacked.refusal == "its projections are not packed"


def test_attention_whose_packed_weight_is_tied_is_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
            self.b.in_proj_weight = self.a.in_proj_weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x, x, x)[0]
            return self.b(x, x, x)[0]

    found = operators(Pair(), torch.randn(2, 5, 4), front_end="fx")
    assert len(found) == 2
    assert all("more than once" in operator.refusal for operator in found)


@pytest.mark.parametrize("build", [SwinTransformerBlock, SwinTransformerBlockV2])
@pytest.mark.parametrize("side", [Side.PRE, Side.POST])
@torch.no_grad()
def test_windowed_attention_folds_adaptors_on_both_sides(build: Any, side: Side) -> None:
    torch.manual_seed(0)
    block = build(8, 2, [4, 4], [2, 2], norm_layer=nn.LayerNorm).double().eval()
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64)  # 6 is no multiple of 4: the windows are padded
    gm = fxprune.trace(block, x, front_end="fx")
    attention = next(n.name for n in gm.graph.nodes if n.name.startswith("shifted_window_attention"))
    found = OperatorIndex(gm)[attention]
    assert (found.read, found.write, found.bias) == ("attn.qkv.weight", "attn.proj.weight", "attn.proj.bias")
    assert (found.in_channels, found.out_channels, found.refusal) == (8, 8, "")
    before = gm(x)
    InsertAdaptors([AdaptorSite(attention, side, 8, -1)])(gm)
    assert torch.equal(gm(x), before)
    (adaptor,) = [m for m in gm.modules() if isinstance(m, Adaptor)]
    adaptor.weight.copy_(torch.randn(8, 8))
    inserted = gm(x)
    FoldAdaptors()(gm)
    assert not torch.allclose(inserted, before)
    assert float((gm(x) - inserted).abs().max()) < 1e-10
