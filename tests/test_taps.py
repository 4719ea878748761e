"""Where features are read, in networks of every shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.discovery.taps import find_tap
from fxprune.errors import GraphError
from tests.strategies import BlockSpec, NetSpec, image_batch


def traced(model: nn.Module, inputs: Tensor | None = None, front_end: str = "fx") -> fx.GraphModule:
    given = image_batch(dtype=torch.float32) if inputs is None else inputs
    return fxprune.trace(model, given, front_end=front_end)


def layers(*behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *behind)


class Pooled(nn.Module):
    """Features reduced by a function of one's own choice."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x).relu()))


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=[-2, -1]),
        lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: nn.functional.avg_pool2d(x, 6).flatten(1),
        lambda x: nn.functional.adaptive_max_pool2d(x, 1).flatten(1),
    ],
    ids=["method", "mean", "adaptive", "avg_pool2d", "max"],
)
def test_the_tap_is_the_last_map_before_global_pooling(
    pool: Callable[[Tensor], Tensor], front_end: str
) -> None:
    gm = traced(Pooled(pool), front_end=front_end)
    (tap,) = find_tap(gm)
    node = next(n for n in gm.graph.nodes if n.name == tap)
    assert node.name.startswith("relu")
    assert tuple(node.meta["tensor_meta"].shape) == (2, 4, 6, 6)


def test_a_pooling_that_leaves_positions_is_no_global_pooling() -> None:
    gm = traced(layers(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5)))
    assert find_tap(gm) == ("_3",)


def test_pooling_in_a_branch_is_not_what_everything_goes_through() -> None:
    net = NetSpec((4,), (), (), ((BlockSpec("squeeze"), BlockSpec("squeeze", behind=False)),)).build()
    assert find_tap(traced(net, image_batch())) == ("stages_0_1_behind",)


def test_without_pooling_the_input_of_the_last_linear_layer() -> None:
    gm = traced(layers(nn.Flatten(), nn.Linear(144, 7), nn.ReLU(), nn.Linear(7, 5), nn.Softmax(1)))
    assert find_tap(gm) == ("_4",)


def test_tokens_averaged_before_the_classifier() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(1))

    assert find_tap(traced(Tokens(), torch.randn(2, 7, 3))) == ("embed",)


def test_without_either_every_floating_output() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            first = self.a(x)
            return {"a": first, "b": self.b(x), "class": first.argmax(1)}

    assert find_tap(traced(Outputs())) == ("a", "b")


def test_no_floating_output_is_an_error() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).argmax(1)

    with pytest.raises(GraphError, match="name a tap"):
        find_tap(traced(Classes()))


def test_the_user_may_name_a_node_or_a_module() -> None:
    gm = traced(NetSpec((4,), (), (), ((BlockSpec("basic"),) * 2,)).build(), image_batch())
    assert find_tap(gm, "stages_0_0_behind") == ("stages_0_0_behind",)
    assert find_tap(gm, "stages.0.0.behind") == ("stages_0_0_behind",)
    with pytest.raises(GraphError, match=r"'layer9' is neither a node nor a module.*head"):
        find_tap(gm, "layer9")


def test_a_module_called_twice_means_its_last_call() -> None:
    conv = nn.Conv2d(3, 3, 1)
    gm = traced(nn.Sequential(conv, nn.ReLU(), conv))
    calls = [n.name for n in gm.graph.nodes if n.op == "call_module" and n.target == "0"]
    assert len(calls) == 2
    assert find_tap(gm, "0") == (calls[1],)
