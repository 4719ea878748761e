"""What rewritings leave behind: no weights that nobody reads, no clones that nobody needs, nothing that is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import GraphError
from fxprune.graph.regions import Region
from fxprune.passes import DropRegions, PropagateShapes, StoreWeights
from tests.tiny import images, tiny


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_weights_of_a_dropped_region_leave_the_network(front_end: str) -> None:
    gm = fxprune.trace(tiny(), (images(2),), front_end=front_end)  # type: ignore[arg-type]
    region = fxprune.discover(gm).regions[1]
    before = {name for name, _ in gm.named_parameters()}
    DropRegions([region])(gm)
    after = {name for name, _ in gm.named_parameters()}
    assert before - after == {name for name in before if name.startswith("body.1.")}
    assert before - after and not after - before


class Begins(nn.Module):
    """A block right behind the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(x + self.conv(x))


def test_no_clone_comes_where_nothing_is_changed_in_place() -> None:
    gm = fxprune.trace(Begins().eval(), (images(2),))
    DropRegions(fxprune.discover(gm).regions)(gm)
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_region_of_another_graph_is_refused_by_its_first_few_nodes() -> None:
    region = fxprune.discover(fxprune.trace(tiny(), (images(2),))).regions[1]
    with pytest.raises(GraphError) as caught:
        DropRegions([region])(fxprune.trace(nn.Conv2d(3, 3, 1), (images(2),)))
    assert len(caught.value.nodes) == 5
    assert f"does not hold ({', '.join(caught.value.nodes[:4])}); discover" in str(caught.value)


class Viewed(nn.Module):
    """What leaves the block is changed in place through a view, while what enters it is read once more."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.stem, self.conv, self.view = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), view
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = a + self.conv(a)
        seen = b.flatten(1) if self.view == "layout" else self.same(b)
        seen.mul_(2.0)
        return b + a


@pytest.mark.parametrize("view", ["layout", "identity"])
@torch.no_grad()
def test_what_is_changed_through_a_view_is_a_clone(view: str) -> None:
    network = Viewed(view).eval()
    gm = torch.fx.symbolic_trace(network)
    names = {node.name for node in gm.graph.nodes}
    assert {"stem", "conv", "add"} <= names
    region = fxprune.discover(fxprune.trace(Begins().eval(), (images(2),))).regions[0]
    cut = Region(
        "stem", "add", "stem", ("conv", "add"), region.kind, "conv", ("conv",), (2, 3, 16, 16), region.dtype
    )
    DropRegions([cut])(gm)
    entered = network.stem(images(2))
    torch.testing.assert_close(gm(images(2)), 2 * entered + entered)


class Reads(nn.Module):
    """A weight that is computed with on the way to another convolution, and that a module of its own may hold too."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.conv, self.called = nn.Conv2d(3, 3, 1), called

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight * 2.0)
        return self.conv(y) if self.called else y


@pytest.mark.parametrize("called", [False, True])
@torch.no_grad()
def test_a_weight_goes_once_nothing_reads_or_calls_it(called: bool) -> None:
    gm = fxprune.trace(Reads(called).eval(), (images(2),))
    wanted = gm(images(2))
    assert StoreWeights()(gm).modified
    torch.testing.assert_close(gm(images(2)), wanted)
    assert ("conv.weight" in dict(gm.named_parameters())) == called


def test_noting_shapes_changes_no_graph() -> None:
    gm = fxprune.trace(tiny(), (images(2),))
    assert not PropagateShapes(images(3))(gm).modified
    assert next(iter(gm.graph.nodes)).meta["tensor_meta"].shape[0] == 3
