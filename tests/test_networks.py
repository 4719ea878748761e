"""Networks as people hand them over: wrapped, pruned, quantised, half made; compressed like any other, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import fxprune
from fxprune.discovery.taps import find_tap
from fxprune.errors import CalibrationError, TraceError
from fxprune.graph.extract import between
from fxprune.options import FitSettings
from fxprune.recovery.training import trainable_parameters
from fxprune.tracing.unwrap import inner
from tests.doubles import brief, count_latency
from tests.tiny import BLOCKS, Tiny, images, tiny


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


def compressed(model: Any, loader: Any = None, **settings: Any) -> Any:
    given = images() if loader is None else loader
    return fxprune.compress(model, given, k=1, recipe=brief(), progress=False, **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(images(3)), other(images(3)))


class Holds(nn.Module):
    """A model whose only part may be wrapped."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


WRAPPERS = [torch.compile, nn.DataParallel, lambda net: nn.DataParallel(torch.compile(net))]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["compile", "DataParallel", "both"])
def test_wrapped_networks_are_compressed_as_what_they_wrap(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = compressed(tiny())
    assert same(compressed(wrap(tiny())), plain)
    network = tiny()
    network.classes = 5
    small = compressed(wrap(Holds(wrap(network))), submodule="part")
    assert small.part.classes == 5
    assert isinstance(small.part, fx.GraphModule)
    assert fxprune.report(small).plan.chosen == fxprune.report(plain).plan.chosen
    within = fxprune.trace(Holds(wrap(tiny())), images(2), front_end="fx")
    assert [r.label for r in fxprune.discover(within).regions] == [f"part.{label}" for label in BLOCKS]


def test_networks_of_data_parallel_processes_are_unwrapped() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = tiny()
        assert inner(nn.parallel.DistributedDataParallel(network)) is network
    finally:
        dist.destroy_process_group()


class Lazy(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.jit.trace(tiny(), images(2)), "TorchScript.*module it was made from"),
        (lambda: torch.jit.script(tiny()), "TorchScript"),
        (lambda: Lazy().eval(), "head.weight has no shape yet.*run the network once"),
    ],
)
def test_what_no_front_end_can_read_is_refused_at_once(make: Callable[[], Any], words: str) -> None:
    def loader() -> Any:
        raise AssertionError("an image was read")
        yield

    for call in (compressed, fxprune.sweep):
        with pytest.raises(TraceError, match=words):
            call(make(), loader())


def test_autocast_is_to_be_left_first() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TraceError, match="leave autocast"):
        compressed(tiny())


def test_weights_that_are_not_finite_are_named_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = tiny()
    network.body[1].conv2.weight.data[0] = torch.nan
    monkeypatch.setattr("fxprune.timing.latency.compare", None)
    with pytest.raises(CalibrationError, match=r"nan or infinite: body\.1\.conv2\.weight; check how"):
        compressed(network)


class Keeps(Tiny):
    """Keeps an activation, with its history, in a list."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.stem(x)]
        return super().forward(x)


def with_history(kind: str) -> Tiny:
    torch.manual_seed(0)
    network = (Keeps if kind == "activation" else Tiny)().eval()
    if kind == "activation":
        network(images(2))
    for block in network.body if kind == "pruned" else ():
        prune.l1_unstructured(block.conv1, "weight", 0.3)
    return network


@pytest.mark.parametrize("kind", ["activation", "pruned"])
def test_tensors_with_a_history_are_copied_without_it(kind: str) -> None:
    network = with_history(kind)
    wanted = network(images(3)).detach()
    assert fxprune.report(compressed(network)).plan.chosen
    assert compressed(Holds(network), submodule="part") is not None
    history = network.kept[0] if kind == "activation" else network.body[0].conv1.weight
    assert history.grad_fn is not None  # the caller's own is as it was
    assert torch.equal(network(images(3)), wanted)


def test_calls_from_inference_mode_train_as_any_other() -> None:
    plain = compressed(tiny())
    with torch.inference_mode():
        inside, loader = tiny(), images()
        small = compressed(inside)
        front = fxprune.sweep(nn.DataParallel(tiny()), images(), recipe=brief(), progress=False)
    assert same(small, plain)
    assert same(compressed(inside, loader), plain)
    assert not any(p.is_inference() for p in small.parameters())
    assert front.points


def test_weights_that_a_hook_computes_stay_with_their_hook() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *tiny().body, nn.BatchNorm2d(8))
    nn.utils.spectral_norm(network[0])
    for block in network[2:6]:
        block.conv2 = nn.Sequential(nn.utils.spectral_norm(block.conv2), nn.BatchNorm2d(8))
    assert fxprune.report(compressed(network.eval())).plan.chosen


class Various(Tiny):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0])


def test_inputs_without_a_name_are_compressed() -> None:
    small = compressed(Various().eval())
    assert fxprune.report(small).plan.chosen
    assert small(images(5)).shape == (5, 5)


@pytest.mark.filterwarnings("ignore")
def test_quantised_heads_are_compressed_and_mimicking_can_be_undone() -> None:
    network = torch.ao.quantization.quantize_dynamic(tiny(), {nn.Linear}, dtype=torch.qint8)
    assert fxprune.report(compressed(network)).plan.chosen
    undone = replace(brief(), mimic=FitSettings(iterations=2, learning_rate=50.0))
    small = fxprune.compress(network, images(), k=1, recipe=undone, progress=False)
    assert any("undone" in note for note in fxprune.report(small).notes)


class Tied(Tiny):
    """The convolution in front of the pooling works on the pooled features too."""

    def __init__(self) -> None:
        super().__init__()
        self.tail, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.pool(self.tail(self.body(self.stem(x))))).flatten(1))


def test_a_weight_on_both_sides_of_the_tap_is_not_trained() -> None:
    torch.manual_seed(0)
    network = Tied().eval()
    gm = fxprune.trace(network, images(2))
    part = between(gm, ["x"], find_tap(gm))
    assert find_tap(gm) == ("tail",)
    trained = {id(p) for p in trainable_parameters(part, gm)}
    names = {name for name, p in gm.named_parameters() if id(p) in trained}
    assert "stem.weight" in names
    assert names.isdisjoint({"tail.weight", "tail.bias", "head.weight"})
    assert {id(part.tail.weight)} <= {id(p) for p in trainable_parameters(part)}
    small = compressed(network, tap="tail")
    assert not torch.equal(small.stem.weight, network.stem.weight)
    assert torch.equal(small.tail.bias, network.tail.bias)


def test_regions_keep_their_labels_in_a_module_that_holds_a_result() -> None:
    small = compressed(tiny())
    labels = [region.label for region in fxprune.discover(fxprune.trace(small, images(2))).regions]
    assert len(labels) == 3
    outer = fxprune.trace(nn.Sequential(small), images(2))
    assert [region.label for region in fxprune.discover(outer).regions] == [f"0.{n}" for n in labels]
    assert len(fxprune.discover(outer, ignore=f"0.{labels[0]}").regions) == 2


class Scaled(Tiny):
    """A number and a list among the inputs, read in front of the blocks and behind them."""

    def forward(self, x: Tensor, scale: float, extra: list[Tensor]) -> Tensor:  # type: ignore[override]  # asks for more
        return super().forward(x * scale) * scale + extra[0].mean()


@pytest.mark.parametrize("junctions", [False, True])
def test_numbers_and_lists_among_the_inputs_reach_both_networks(junctions: bool) -> None:
    recipe = brief("practise")
    recipe = replace(recipe, mimic=replace(recipe.mimic, junctions=junctions, changed_only=junctions))
    loader = [(part, 2.0, [torch.ones(4, 2)]) for part in images().split(4)]
    small = fxprune.compress(
        Scaled().eval(), loader, k=1, recipe=recipe, input_fn=lambda batch: batch, progress=False
    )
    assert fxprune.report(small).mimicking
    assert small(images(4), 2.0, [torch.ones(4, 2)]).shape == (4, 5)
