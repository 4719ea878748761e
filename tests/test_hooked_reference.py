"""The reference for cutting, itself judged by forward passes written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from benchmarks.judges.hooked_reference import Bypass, Call, NoBypass, find_bypass, run_bypassed
from fxprune.graph.regions import Kind, Region
from tests.motifs import Basic, Downsample, Joined, LayerScale, Net, conv, relu_stem


def traced(model: nn.Module) -> tuple[nn.Module, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, fx.symbolic_trace(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)


def region(
    gm: fx.GraphModule, entry: str, exit_: str, bypass: str | None = None, label: str = "block"
) -> Region:
    """A record written by hand, as discovery would."""
    names = [n.name for n in gm.graph.nodes]
    body = tuple(names[names.index(entry) + 1 : names.index(exit_) + 1])
    modules = tuple(str(n.target) for n in gm.graph.nodes if n.name in body and n.op == "call_module")
    kind = Kind.IDENTITY if bypass is None else Kind.PROJECTION
    return Region(entry, exit_, bypass or entry, body, kind, label, modules, (2, 8, 8, 8), "torch.float64")


def names(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes]


def test_a_block_is_skipped_by_returning_its_input() -> None:
    model, gm, x = traced(Net(Basic(), stem=relu_stem()))
    cut = region(gm, "stem_1", "block_act_1")
    bypass = find_bypass(model, gm, cut, x)
    assert isinstance(bypass, Bypass)
    assert bypass.source is not None
    assert torch.equal(run_bypassed(model, bypass, x), model.tail(model.stem(x)))
    assert not model.block._forward_hooks


def test_a_projection_block_keeps_its_shortcut() -> None:
    model, gm, x = traced(Net(Downsample(), stem=relu_stem(), tail=conv(16, 5)))
    add = next(n.name for n in gm.graph.nodes if "add" in n.name)
    cut = region(gm, "stem_1", add, bypass="block_shortcut_1")
    bypass = find_bypass(model, gm, cut, x)
    assert isinstance(bypass, Bypass)
    expected = model.tail(F.relu(model.block.shortcut(model.stem(x))))
    assert torch.equal(run_bypassed(model, bypass, x), expected)


def test_a_branch_behind_a_functional_factor_is_zeroed() -> None:
    model, gm, x = traced(Net(LayerScale()))
    add = next(n.name for n in gm.graph.nodes if "add" in n.name)
    bypass = find_bypass(model, gm, region(gm, "stem", add), x)
    assert isinstance(bypass, Bypass)
    assert torch.equal(run_bypassed(model, bypass, x), model.tail(model.stem(x)))


def test_an_identity_that_only_passes_the_exit_on_is_no_place_to_splice() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer, self.mlp = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.keep = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mixer(x)
            return self.keep(x) + self.mlp(x)  # the second branch reads the exit beside the identity

    model, gm, x = traced(Net(Layer()))
    first = next(n.name for n in gm.graph.nodes if "add" in n.name)
    bypass = find_bypass(model, gm, region(gm, "stem", first), x)
    assert isinstance(bypass, Bypass)
    stem = model.stem(x)
    assert torch.equal(run_bypassed(model, bypass, x), model.tail(stem + model.block.mlp(stem)))


def test_a_block_inside_one_forward_is_zeroed_where_no_module_returns_the_exit() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second, self.tail = conv(3, 8), conv(), conv(), conv(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.first(x)
            x = x + self.second(x)
            return self.tail(F.gelu(x))

    model, gm, x = traced(Layer())
    bypass = find_bypass(model, gm, region(gm, "add", "add_1", label="second"), x)
    assert bypass == Bypass(Call("second", 0))
    hidden = model.stem(x)
    expected = model.tail(F.gelu(hidden + model.first(hidden)))
    assert torch.equal(run_bypassed(model, bypass, x), expected)


def test_only_the_right_call_of_a_shared_module_is_skipped() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.tail = conv(3, 8), Joined(lambda x, f: x + f), conv(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.block(self.block(self.stem(x)).sigmoid()))

    model, gm, x = traced(Twice())
    bypass = find_bypass(model, gm, region(gm, "sigmoid", "add_1"), x)
    assert isinstance(bypass, Bypass)
    expected = model.tail(model.block(model.stem(x)).sigmoid())
    assert torch.equal(run_bypassed(model, bypass, x), expected)


def test_a_functional_branch_is_refused_with_a_reason() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.weight = conv(3, 8), nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return (x + F.conv2d(x, self.weight)).sigmoid()

    model, gm, x = traced(Bare())
    found = find_bypass(model, gm, region(gm, "stem", "add", label=""), x)
    assert isinstance(found, NoBypass)
    assert "no module" in found.reason


def test_a_call_that_never_happens_is_an_error() -> None:
    model, _, x = traced(Net(Basic()))
    with pytest.raises(RuntimeError, match="was not called"):
        run_bypassed(model, Bypass(Call("block", 7)), x)


def test_inputs_are_left_alone() -> None:
    model, gm, x = traced(Net(Basic(inplace=True), stem=relu_stem()))
    before = x.clone()
    found = find_bypass(model, gm, replace(region(gm, "stem_1", "block_act_1"), label="block#1"), x)
    assert isinstance(found, Bypass)
    run_bypassed(model, found, x)
    assert torch.equal(x, before)
