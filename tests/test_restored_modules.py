"""Batch norms and dropout that front ends write as functions are modules again, and the very ones that were there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.recovery.training import fixed_norms


def stirred(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, its batch norms with statistics and weights that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


class Norms(nn.Module):
    """Batch norms of all kinds: one called twice, one without weights, one averaging over all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
        self.twice = nn.BatchNorm2d(4, momentum=None)
        self.bare = nn.BatchNorm2d(4, affine=False)
        self.volume, self.vector, self.line = nn.BatchNorm3d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)).relu())
        x = self.volume(self.bare(x)[:, :, None])[:, :, 0]
        return self.line(x.flatten(2)).mean(2) + self.vector(x.mean((2, 3)))


def picture() -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def program_of(network: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(network, (picture(),), dynamic_shapes=({0: torch.export.Dim.AUTO},))


def exported(network: nn.Module) -> fx.GraphModule:
    return fxprune.trace(network, picture(), front_end="export")


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda network: network,
    "program": program_of,
    "decomposed": lambda network: program_of(network).run_decompositions(),
    "graph module": lambda network: program_of(network).module(),
    "without shapes": lambda network: program_of(network).module(),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_batch_norms_of_exported_graphs_are_the_modules_that_they_were(way: str) -> None:
    net = stirred(Norms())
    inputs = None if way == "without shapes" else picture()
    gm = fxprune.trace(WAYS[way](net), inputs, front_end="export" if way == "module" else "auto")
    assert not [n for n in gm.graph.nodes if "batch_norm" in str(n.target)]
    assert gm.state_dict().keys() == net.state_dict().keys()
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mine = gm.get_submodule(name)
            assert type(mine) is type(module)
            assert repr(mine) == repr(module)
            assert all(torch.equal(t, module.state_dict()[key]) for key, t in mine.state_dict().items())
    assert torch.equal(gm(picture()), net(picture()))
    calls = [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and n.target != "_guards_fn"]
    assert calls == ["stem.1", "twice", "twice", "bare", "volume", "line", "vector"]
    gm.train()(picture())
    net.train()(picture())
    assert int(gm.get_submodule("twice").num_batches_tracked) == 2
    assert all(torch.allclose(t, net.state_dict()[key]) for key, t in gm.state_dict().items())


class Named(nn.Module):
    """Statistics under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance)


class Written(nn.BatchNorm2d):
    """A batch norm whose forward torch.fx looks into."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Doubled(Written):
    """Computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, 2 * self.weight, self.bias)


class Joined(Written):
    """Holds the weight of a convolution too."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.kernel = nn.Parameter(torch.ones(features, features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.kernel))


class Flat(Written):
    """The last dimension is one of features."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., None, None])


LEFT_ALONE = {
    "without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "other names": Named,
    "computed weight": lambda: Doubled(3),
    "other tensors beside": lambda: Joined(3),
    "six dimensions": lambda: Flat(3),
}


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("kind", LEFT_ALONE)
@torch.no_grad()
def test_batch_norms_that_would_not_be_what_was_there_are_left_alone(kind: str, front_end: Any) -> None:
    net = stirred(nn.Sequential(nn.Conv2d(3, 3, 1), LEFT_ALONE[kind]()))
    gm = fxprune.trace(net, picture(), front_end=front_end)
    assert torch.equal(gm(picture()), net(picture()))
    functions = [n.name for n in gm.graph.nodes if n.op == "call_function" and "batch_norm" in str(n.target)]
    if kind == "without statistics":
        assert fixed_norms(gm) == []  # it normalises by the batch whatever the mode
        assert len(functions) == (front_end == "export")
    else:
        assert fixed_norms(gm) == functions != []


@torch.no_grad()
def test_the_same_statistics_with_other_weights_are_no_other_call_of_the_module() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.norm(x), self.norm.running_mean, self.norm.running_var)

    net = stirred(Both())
    for front_end in ("fx", "export"):
        gm = fxprune.trace(net, picture(), front_end=front_end)
        assert [n.op for n in gm.graph.nodes if "norm" in str(n.target)] == [
            "call_module", "get_attr", "get_attr", "call_function"
        ] or gm.graph.find_nodes(op="call_module", target="norm")  # fmt: skip
        assert len(fixed_norms(gm)) == 1
        assert torch.equal(gm(picture()), net(picture()))


@torch.no_grad()
def test_a_forward_of_ones_own_that_calls_the_function_is_the_module_under_fx_too() -> None:
    net = stirred(nn.Sequential(nn.Conv2d(3, 3, 1), Written(3)))
    gm = fxprune.trace(net, picture(), front_end="fx")
    assert type(gm.get_submodule("1")) is nn.BatchNorm2d
    assert gm.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(gm(picture()), net(picture()))
    plain = fxprune.trace(net, front_end="fx")  # nothing tells how many dimensions the input has
    assert len(fixed_norms(plain)) == 1
    assert torch.equal(plain(picture()), net(picture()))


class Activated(nn.BatchNorm2d):
    """A batch norm with an activation that has weights inside."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.PReLU(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@torch.no_grad()
def test_what_lies_inside_a_batch_norm_stays() -> None:
    net = stirred(nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)))
    gm = exported(net)
    assert type(gm.get_submodule("1")) is nn.BatchNorm2d
    assert gm.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(gm(picture()), net(picture()))


class Drops(nn.Module):
    """Dropout of all kinds, as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "plain": nn.Dropout(0.01),
                "over": nn.Dropout(0.02, inplace=True),
                "maps": nn.Dropout2d(0.03),
                "alpha": nn.AlphaDropout(0.04),
                "features": nn.FeatureAlphaDropout(0.05),
                "lines": nn.Dropout1d(0.06),
                "volumes": nn.Dropout3d(0.07),
            }
        )
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for name, part in self.parts.items():
            if name == "lines":
                x = part(x.flatten(2)).view_as(x)
            elif name == "volumes":
                x = part(x[:, :, None])[:, :, 0]
            else:
                x = part(x)
        x = F.dropout(x, 0.08, training=self.training) + F.dropout(x, 0.08, training=self.training)
        return F.dropout2d(x, 0.09, training=self.training)


@pytest.mark.parametrize("front_end", ["fx", "export"])
@torch.no_grad()
def test_dropout_is_a_module_that_train_and_eval_reach(front_end: Any) -> None:
    net = Drops().eval()
    gm = fxprune.trace(net, picture(), front_end=front_end)
    assert not [n for n in gm.graph.nodes if n.op == "call_function" and "dropout" in str(n.target)]
    for name, part in net.parts.items():
        mine = gm.get_submodule(f"parts.{name}")
        assert type(mine) is type(part)
        assert mine.p == part.p
    functions = {name: module for name, module in gm.named_children() if name.startswith("dropout")}
    assert {name: (type(m), m.p) for name, m in functions.items()} == {
        "dropout": (nn.Dropout, 0.08),
        "dropout1": (nn.Dropout2d, 0.09),
    }
    assert torch.equal(gm(picture()), net(picture()))
    torch.manual_seed(0)
    gm.train()
    assert not torch.equal(gm(picture()), gm(picture()))
    gm.eval()
    assert torch.equal(gm(picture()), net(picture()))


def test_dropout_that_is_always_on_stays_a_function() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.05, training=True)

    gm = fxprune.trace(fx.symbolic_trace(Always()), picture())
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_function", "output"]


def test_what_a_program_exported_in_training_mode_computes_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.05)).train()
    gm = fxprune.trace(program_of(net), picture())
    assert {"batch_norm", "dropout"} <= {n.name for n in gm.graph.nodes if n.op == "call_function"}


def test_frozen_weights_stay_frozen_and_the_result_trains() -> None:
    convolutions = (nn.Conv2d(width, 4, 1, bias=False) for width in (3, 4))
    net = stirred(nn.Sequential(*(part for conv in convolutions for part in (conv, nn.BatchNorm2d(4)))))
    net[1].requires_grad_(False)
    gm = exported(net)
    trained = {name for name, p in gm.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in net.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    gm.train()(picture()).relu().square().mean().backward()
    torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], 0.1).step()
    changed = {name for name, tensor in gm.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == trained | {f"{place}.{name}" for place in (1, 3) for name in statistics}
