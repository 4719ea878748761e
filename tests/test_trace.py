"""What tracing accepts, what it refuses, and in which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import GraphError, OptionError, TraceError
from tests.strategies import BlockSpec, NetSpec, image_batch

SPEC = NetSpec((4,), (), (), ((BlockSpec("basic", spacer="dropout"), BlockSpec("basic", inplace=True)),))


def has_shapes(gm: fx.GraphModule) -> bool:
    return all("tensor_meta" in node.meta for node in gm.graph.nodes)


class Branches(nn.Module):
    """Control flow on the values of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the statement to name
            return x * 2
        return x


def test_control_flow_is_refused_with_the_statement_and_the_way_out() -> None:
    with pytest.raises(TraceError) as caught:
        fxprune.trace(Branches(), torch.ones(2, 3))
    text = str(caught.value)
    assert text.startswith("Branches cannot be traced")
    assert "test_trace.py" in text
    assert "if x.sum() > 0:  # the statement to name" in text
    assert "torch.fx:" in text
    assert "torch.export:" in text
    assert "submodule=" in text
    assert "torch.fx.wrap" in text
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_each_front_end_alone_speaks_for_itself(front_end: str) -> None:
    with pytest.raises(TraceError) as caught:
        fxprune.trace(Branches(), torch.ones(2, 3), front_end=front_end)  # type: ignore[arg-type]
    assert [name for name in ("fx", "export") if f"torch.{name}:" in str(caught.value)] == [front_end]


def test_what_fx_cannot_capture_export_may() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.stack([part for part in x[0]])[None])  # noqa: C416 (the loop is the point)

    with pytest.raises(TraceError):
        fxprune.trace(Loops(), image_batch(dtype=torch.float32), front_end="fx")
    assert has_shapes(fxprune.trace(Loops(), image_batch(dtype=torch.float32)))


def test_unknown_front_ends_and_things_that_are_no_network() -> None:
    with pytest.raises(OptionError, match="'jit'"):
        fxprune.trace(nn.Identity(), torch.ones(1), front_end="jit")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="got str"):
        fxprune.trace("resnet18", torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="example inputs"):
        fxprune.trace(nn.Linear(3, 4), front_end="export")


@pytest.mark.parametrize("front_end", ["fx", "export"])
@torch.no_grad()
def test_the_graph_is_the_evaluation_mode_and_shares_nothing(front_end: str) -> None:
    net = SPEC.build().train()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    gm = fxprune.trace(net, image_batch(), front_end=front_end)  # type: ignore[arg-type]
    assert net.training
    assert all(module.training for module in net.modules())
    assert not any(module.training for module in gm.modules())
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    mine = {t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()}
    assert mine.isdisjoint(t.data_ptr() for t in (*gm.parameters(), *gm.buffers()))
    net.eval()
    assert torch.allclose(gm(image_batch(3)), net(image_batch(3)), rtol=0, atol=1e-12)  # any batch size
    assert has_shapes(gm)


def test_the_examples_are_not_changed() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(x) + 1

    x = image_batch()
    fxprune.trace(Overwrites(), x)
    assert torch.equal(x, image_batch())


def test_without_examples_there_are_no_shapes_and_discovery_asks_for_them() -> None:
    gm = fxprune.trace(SPEC.build())
    assert not has_shapes(gm)
    with pytest.raises(GraphError, match=r"give example inputs to fxprune\.trace"):
        fxprune.discover(gm)


@pytest.mark.parametrize(
    "inputs", [torch.ones(2, 5, 8, 8), torch.ones(2, 3), image_batch()], ids=["c", "d", "dtype"]
)
def test_inputs_that_the_network_does_not_take(inputs: Tensor) -> None:
    with pytest.raises(GraphError, match=r"does not run on example inputs of shape"):
        fxprune.trace(SPEC.build(torch.float32), inputs)
    gm = fxprune.trace(SPEC.build(torch.float32))
    with pytest.raises(GraphError, match=r"does not run on example inputs of shape"):
        fxprune.trace(gm, inputs)


@torch.no_grad()
def test_graph_modules_come_in_as_they_are() -> None:
    plain = fx.symbolic_trace(SPEC.build())
    nodes = [node.name for node in plain.graph.nodes]
    gm = fxprune.trace(plain, image_batch())
    assert gm is not plain
    assert [node.name for node in gm.graph.nodes] == nodes
    assert not has_shapes(plain)
    assert [r.label for r in fxprune.discover(gm).regions] == ["stages.0.0", "stages.0.1"]
    assert torch.equal(gm(image_batch()), plain(image_batch()))
    assert gm.get_parameter("head.weight").data_ptr() != plain.get_parameter("head.weight").data_ptr()


@pytest.mark.parametrize("unlifted", [False, True])
@torch.no_grad()
def test_exported_programs_come_in(unlifted: bool) -> None:
    net = SPEC.build()
    program: Any = torch.export.export(
        net, (image_batch(),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}
    )
    given = program.module() if unlifted else program
    gm = fxprune.trace(given, image_batch())
    assert has_shapes(gm)
    assert [r.label for r in fxprune.discover(gm).regions] == ["stages.0.0", "stages.0.1"]
    assert torch.allclose(gm(image_batch(3)), net(image_batch(3)), rtol=0, atol=1e-12)
    mine = {t.data_ptr() for t in net.parameters()}
    assert mine.isdisjoint(t.data_ptr() for t in gm.parameters())


class Several(nn.Module):
    """Two inputs, an optional third, a structured output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        out = self.first(left) - self.second(right)
        if scale is not None:
            out = out * scale
        return {"sum": out, "parts": (left.mean(), right.mean())}


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("style", ["positional", "keywords", "keywords in another order"])
@torch.no_grad()
def test_several_inputs_by_position_or_name(style: str, count: int, front_end: str) -> None:
    torch.manual_seed(0)
    net = Several().double().eval()
    left, right, scale = image_batch(), 2 * image_batch() + 1, torch.full((2, 1, 1, 1), 3.0).double()
    named = dict(list({"left": left, "right": right, "scale": scale}.items())[:count])
    if style.endswith("order"):
        named = dict(reversed(list(named.items())))
    inputs = tuple(named.values()) if style == "positional" else named
    gm = fxprune.trace(net, inputs, front_end=front_end)  # type: ignore[arg-type]
    wanted = net(**named)
    found = gm(*inputs) if isinstance(inputs, tuple) else gm(**named)
    assert torch.equal(found["sum"], wanted["sum"])
    assert len(found["parts"]) == 2
    assert has_shapes(gm)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [({"left": image_batch()}, "right"), ({"left": image_batch(), "up": image_batch()}, "up|right")],
)
def test_missing_and_unknown_inputs_are_named(inputs: dict[str, Tensor], words: str) -> None:
    gm = fxprune.trace(Several().double())
    with pytest.raises(GraphError, match=words):
        fxprune.trace(gm, inputs)


def test_an_in_place_addition_that_the_graph_would_lose_is_caught() -> None:
    class Loses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            kept = x
            x += 1.0
            return x * kept

    with pytest.raises(TraceError, match=r"write `x = x \+ y`"):
        fxprune.trace(Loses(), image_batch(dtype=torch.float32), front_end="fx")


@pytest.mark.parametrize("front_end", ["fx", "export", "auto"])
@torch.no_grad()
def test_in_place_operators_become_edges(front_end: str) -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.act(x)
            x.mul_(2.0)
            return x + 1

    torch.manual_seed(0)
    net = Overwrites().double().eval()
    gm = fxprune.trace(net, image_batch(), front_end=front_end)  # type: ignore[arg-type]
    assert torch.equal(gm(image_batch()), net(image_batch()))
    fxprune.passes.Canonicalize()(gm)
    assert torch.equal(gm(image_batch()), net(image_batch()))
    (last,) = gm.graph.output_node().all_input_nodes
    assert "mul" in last.all_input_nodes[0].name


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


def test_random_networks_are_told_from_those_that_cannot_be_traced() -> None:
    with pytest.raises(TraceError, match=r"two runs of Dropping itself differ.*it is random"):
        fxprune.trace(Dropping(), image_batch())


class Chooses(nn.Module):
    """Another function for large batches."""

    def __init__(self, most: int = 3) -> None:
        super().__init__()
        self.most, self.conv = most, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[0] <= self.most else 2 * self.conv(x)


class Fixed(Chooses):
    """Takes two images and no more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.stack([x[0], x[1]]) + x).view(2, -1)


@pytest.mark.parametrize(("count", "most"), [(1, 3), (2, 3), (2, 40)])
def test_a_trace_for_some_batch_sizes_is_refused_when_the_network_takes_others(count: int, most: int) -> None:
    with pytest.raises(TraceError, match="branches on the batch size"):
        fxprune.trace(Chooses(most).double(), image_batch(count))


def test_a_network_that_fixes_its_own_batch_size_is_traced_with_it() -> None:
    gm = fxprune.trace(Fixed().double(), image_batch(), front_end="export")  # its own restriction
    assert has_shapes(gm)


class Keeps(nn.Module):
    """Keeps a grid once it is made, as detectors keep their anchors."""

    grid: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.ones_like(x[:1])
        return self.conv(x) + self.grid


@torch.no_grad()
def test_what_a_forward_keeps_while_it_is_traced_does_not_reach_the_check() -> None:
    net = Keeps().double()
    gm = fxprune.trace(net, image_batch())
    assert net.grid is None
    assert torch.equal(gm(image_batch(5)), net(image_batch(5)))


class Gathers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.conv(inputs[0]) * self.conv(inputs[1])
        return out.view(out.shape[0], -1)


@torch.no_grad()
def test_inputs_without_a_name_each_become_one_of_the_graph() -> None:
    torch.manual_seed(0)
    net = Gathers().double().eval()
    with pytest.raises(TraceError, match=r"forward reads \*inputs"):
        fxprune.trace(net, (image_batch(), image_batch()), front_end="fx")
    both = image_batch(5), image_batch(5) + 1
    for count in (1, 2):
        gm = fxprune.trace(net, (image_batch(count), image_batch(count)))
        assert len(gm.graph.find_nodes(op="placeholder")) == 2
        assert torch.allclose(gm(*both), net(*both), rtol=0, atol=1e-12)


@dataclass
class Scores:
    logits: Tensor


class Returns(Chooses):
    def forward(self, x: Tensor) -> Scores:
        return Scores(self.conv(x))


def test_dataclasses_that_torch_does_not_look_into_are_refused_with_the_way_out() -> None:
    with pytest.raises(TraceError, match=r"torch\.export\.register_dataclass\(Scores\)"):
        fxprune.trace(Returns().double(), image_batch())


@fx.wrap  # a leaf to the tracer, as some of torchvision's functions are
def shift(x: Tensor, by: Tensor) -> Tensor:
    x[:, 1:] += by[:, 1:]
    return x


class Shifts(nn.Module):
    """A residual branch whose end is changed by a function whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.tail = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.branch(x)
        shift(inner, x)
        return self.tail(x + inner)


@torch.no_grad()
def test_a_leaf_function_that_works_in_place_becomes_an_edge() -> None:
    net = Shifts().double().eval()
    gm = fxprune.trace(net, image_batch(), front_end="fx")
    fxprune.passes.Canonicalize()(gm)
    assert torch.equal(gm(image_batch()), net(image_batch()))
    (region,) = fxprune.discover(gm).regions
    fxprune.passes.DropRegions([region])(gm)
    assert [node.name for node in gm.graph.nodes] == ["x", "stem", "tail", "output"]
    assert torch.equal(gm(image_batch()), net.tail(net.stem(image_batch())))


@torch.no_grad()
def test_a_leaf_function_stays_where_nothing_is_known_of_what_it_changes() -> None:
    net = Shifts().double().eval()
    gm = fxprune.trace(net, front_end="fx")  # without inputs nothing runs
    fxprune.passes.Canonicalize()(gm)
    assert torch.equal(gm(image_batch()), net(image_batch()))


def test_weights_on_meta_still_trace() -> None:
    with torch.device("meta"):
        net = SPEC.build(torch.float32)
    gm = fxprune.trace(net, torch.empty(2, 3, 8, 8, device="meta"))
    assert len(fxprune.discover(gm).regions) == 2


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise RuntimeError("locked")

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TraceError, match=r"Locked cannot be copied \(locked\)"):
        fxprune.trace(Locked(), torch.ones(1))


def test_a_graph_that_was_broken_by_hand_is_refused() -> None:
    gm = fxprune.trace(SPEC.build(), image_batch())
    first, second = gm.graph.find_nodes(op="call_module")[:2]
    first.replace_input_with(first.all_input_nodes[0], second)
    with pytest.raises(GraphError, match="does not lint"):
        fxprune.discover(gm)
    with pytest.raises(OptionError, match="kinds is"):
        fxprune.discover(gm, kinds=("residual",))
    with pytest.raises(OptionError, match="kinds is"):
        fxprune.discover(gm, kinds=())
