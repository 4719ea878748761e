"""Compressed networks in the class of the original, for tools that take no graph."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.artifacts.own_class import PassThrough
from fxprune.errors import GraphError, OptionError
from tests.doubles import brief, count_latency
from tests.tiny import Tiny, images, tiny


def compressed(model: nn.Module, *regions: str, **options: object) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        count_latency(patch)
        return fxprune.compress(
            model, images(), regions=list(regions), recipe=brief(), progress=False, latency_batch=2, **options
        )


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(images(3)), other(images(3)), rtol=1e-4, atol=1e-5)


def test_the_copy_is_of_the_models_class_and_computes_what_the_graph_does() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    small = compressed(model, "body.1")
    own = fxprune.in_own_class(model, small)
    assert type(own) is type(model) and not own.training
    assert isinstance(own.body[1], nn.Identity)
    assert_alike(own, small)
    assert not torch.allclose(own(images(2)), model(images(2)))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_were_trained_further_go_over() -> None:
    model = tiny()
    small = compressed(model, "body.1")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.1)
    assert_alike(fxprune.in_own_class(model, small), small)


def test_a_network_in_training_is_left_as_it_is() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Nested(), Nested(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
    ).eval()
    small = compressed(model, "2").train()
    before = copy.deepcopy(small.state_dict())
    own = fxprune.in_own_class(model, small)
    assert small.training and not own.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert_alike(own, small.eval())


def test_a_network_from_a_folder_comes_into_any_model_of_the_class(tmp_path: Path) -> None:
    small = compressed(tiny(), "body.1")
    fxprune.save(small, tmp_path / "small")
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_alike(fxprune.in_own_class(other, fxprune.load(tmp_path / "small")), small)


def test_half_precision_goes_over() -> None:
    model = tiny()
    small = compressed(model, "body.1").bfloat16()
    own = fxprune.in_own_class(model, small)
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Around(nn.Module):
    """Two towers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = tiny(), tiny()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("submodule", ["right", ("left", "right")], ids=["one", "several"])
def test_parts_come_back_into_their_class(submodule: str | tuple[str, ...]) -> None:
    model = Around().eval()
    labels = ["body.1"] if submodule == "right" else ["left.body.0", "right.body.1"]
    small = compressed(model, *labels, submodule=submodule)
    own = fxprune.in_own_class(model, small)
    assert not any(isinstance(module, fx.GraphModule) for module in own.modules())
    assert isinstance(own.right.body[1], nn.Identity)
    assert isinstance(own.left.body[0], nn.Identity) is (submodule != "right")
    assert_alike(own, small)


class Scaled(nn.Module):
    """A residual block that is given more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.conv(x).relu() * scale


class WithScales(nn.Module):
    """Blocks that are called with two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([Scaled(), Scaled(), Scaled()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.mean((2, 3))


def test_a_block_with_several_arguments_gives_back_the_first() -> None:
    model = WithScales().eval()
    small = compressed(model, "blocks.1")
    own = fxprune.in_own_class(model, small)
    assert isinstance(own.blocks[1], PassThrough)
    assert_alike(own, small)


def test_where_nothing_comes_by_position_the_first_by_name_is_passed_on() -> None:
    assert PassThrough()(x=1, y=2) == 1


class Nested(nn.Module):
    """A residual block whose layers lie in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_a_block_goes_with_its_sum() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Nested(), Nested(), nn.Conv2d(4, 4, 3)).eval()
    own = fxprune.in_own_class(model, compressed(model, "2"))
    assert isinstance(own[2], nn.Identity) and isinstance(own[1], Nested)


class Halves(nn.Module):
    """A layer of two residual branches, of which one can be cut alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x).relu()
        return x + self.two(x).relu()


def test_half_a_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Halves(), nn.Conv2d(4, 4, 3)).eval()
    small = compressed(model, "1.two")
    with pytest.raises(
        GraphError, match=r"1\.two is no whole module of Sequential, for 1 goes on with 1\.one"
    ):
        fxprune.in_own_class(model, small)


def test_what_does_not_belong_together_is_refused() -> None:
    model = tiny()
    small = compressed(model, "body.1")
    with pytest.raises(GraphError, match="does not say what was cut"):
        fxprune.in_own_class(model, model)
    with pytest.raises(GraphError, match="not those of this"):
        wide = tiny()
        wide.stem = nn.Conv2d(3, 16, 3)
        fxprune.in_own_class(wide, small)
    with pytest.raises(OptionError, match=r"body\.1"):
        fxprune.in_own_class(nn.Sequential(model), small)
    with pytest.raises(OptionError, match="right"):
        fxprune.in_own_class(model, compressed(Around().eval(), "body.1", submodule="right"))


def test_a_model_that_computes_something_else_is_refused() -> None:
    class Louder(Tiny):
        """The same weights, another forward."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny()
    small = compressed(model, "body.1")
    model.__class__ = Louder
    with pytest.raises(GraphError, match="differs by"):
        fxprune.in_own_class(model, small)
