"""Several parts of a model compressed as one network."""

from __future__ import annotations

import copy
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import CalibrationError, GraphError, OptionError
from fxprune.plan import Plan
from fxprune.reports.compression import CompressionReport
from fxprune.submodules.capture import capture_inputs
from tests.doubles import brief, count_latency
from tests.tiny import images


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn(self.conv1(x)).relu())


class Eye(nn.Module):
    """Two feature maps in an OrderedDict, one of them asked for by name."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*map(Block, (2, 5)))
        self.scale = scale

    def forward(self, x: Tensor, *, more: Tensor | None = None) -> dict[str, Tensor]:
        x = self.stem(x if more is None else x + more)
        return OrderedDict(early=x, late=self.blocks(x) * self.scale)


class Mind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.tail = nn.Sequential(*map(Block, (3, 6))), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.blocks(x).relu())


class Animal(nn.Module):
    """Two eyes side by side, which feed a mind; untraceable as a whole, for it branches on values."""

    def __init__(self, scale: float = 1000.0) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"left": Eye(scale), "right": Eye(1.0)})
        self.mind, self.mouth = Mind(), nn.Linear(2, 3)
        self.flag = nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.head["left"](x), self.head["right"](x, more=x.flip(3))
        assert list(left) == ["early", "late"]
        seen = left["late"] / 1000 + right["late"]
        x.mul_(0)  # what the eyes were given has to be noted before
        thought = self.mind(seen)
        return self.mouth(thought.mean((2, 3))) if float(thought.detach().sum()) < 1e9 else thought


EYES = ("head.left", "head.right")
ALL = (*EYES, "mind")


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


def animal(seed: int = 0) -> Animal:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Animal().eval()


def compressed(model: nn.Module, paths: Any = ALL, count: int = 8, **settings: Any) -> nn.Module:
    given = {"k": 3, "recipe": brief(), "progress": False} | settings
    return fxprune.compress(model, [images(count)], submodule=paths, **given)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The animal compressed, and the folder of it."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        count_latency(patch)
        return compressed(animal(), out=folder, onnx=True), folder


def test_the_model_stays_as_it_was() -> None:
    model, before = animal(), animal().state_dict()
    compressed(model, ("mind", "head.left"), k=None, regions=["mind.blocks.0"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_regions_of_all_parts_stand_in_one_selection(done: tuple[nn.Module, Path]) -> None:
    small = done[0]
    report = fxprune.report(small)
    assert isinstance(small, Animal)
    labels = [score.region.label for score in report.plan.scores]
    eyes = [f"{eye}.blocks.{i}" for eye in EYES for i in range(2)]
    assert labels == [*eyes, "mind.blocks.0", "mind.blocks.1"]
    assert len(report.plan.chosen) == 3
    for path in ALL:
        part = small.get_submodule(path)
        assert isinstance(part, fx.GraphModule)
        gone = {label for label in report.plan.chosen if label.startswith(path)}
        left = {f"{path}.{name}" for name, _ in part.named_modules()}
        wanted = {f"{path}.blocks.{i}" for i in range(2)} - gone
        assert {name for name in left if name.count(".") == path.count(".") + 2} == wanted
    assert small(images(5)).shape == (5, 3)


def values(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.values())


def seen(
    model: Animal, count: int = 8
) -> dict[str, tuple[tuple[Tensor, ...], dict[str, Tensor], list[Tensor]]]:
    """What each part is really given in a run of the model, and what it returns."""
    found = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = copy.deepcopy((args, kwargs))
            found[path] = (*given, [value.clone() for value in values(output)])

        return hook

    hooks = [model.get_submodule(p).register_forward_hook(note(p), with_kwargs=True) for p in ALL]
    with torch.no_grad():
        model(images(count))
    for hook in hooks:
        hook.remove()
    return found


def test_every_part_gets_what_the_original_gives_it() -> None:
    model = animal()
    taken, real = capture_inputs(model, ALL, [images(8)]), seen(model)
    left, right, mind = taken.images.inputs.calls
    assert torch.equal(left.args[0], real["head.left"][0][0])
    assert torch.equal(right.kwargs["x"], real["head.right"][0][0])
    assert torch.equal(right.kwargs["more"], real["head.right"][1]["more"])
    assert torch.equal(mind.args[0], real["mind"][0][0])
    # of a loader of more batches than asked for, rows stay together
    fewer = capture_inputs(model, ALL, [images(4), images(4, seed=1)], limit=5).images.inputs
    assert [call.batch_size for call in fewer.calls] == [5, 5, 5]
    left, right, _ = fewer.calls
    assert torch.equal(left.args[0].flip(3), right.kwargs["more"])


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_a_bare_cut_is_the_model_without_these_blocks(front_end: str) -> None:
    model, named = animal(), ["head.left.blocks.1", "head.right.blocks.0", "mind.blocks.1"]
    recipe = brief("practise", mimic=0)
    small = compressed(model, k=None, regions=named, recipe=recipe, front_end=front_end)
    assert fxprune.report(small).plan.chosen == tuple(named)
    for path in named:
        model.set_submodule(path, nn.Identity())
    with torch.no_grad():
        assert torch.allclose(small(images(3)), model(images(3)), atol=1e-4)
    left, right = small.get_submodule("head.left"), small.get_submodule("head.right")
    found = (left(images(2)), right(more=images(2), x=images(2)))
    assert [type(one) for one in found] == [OrderedDict, OrderedDict]


def test_losses_are_means_over_the_parts_of_relative_errors() -> None:
    model = animal()
    real = seen(model)
    report = fxprune.report(compressed(model, criterion="l2"))
    assert {len(real[path][2]) for path in EYES} == {2}
    for score in report.plan.scores:
        path, block = score.region.label.rsplit(".blocks.")
        bare = copy.deepcopy(model)
        bare.set_submodule(score.region.label, nn.Identity())
        args, kwargs, wanted = real[path]
        with torch.no_grad():
            got = values(bare.get_submodule(path)(*args, **kwargs))
        errors = [(g - w).square().mean() / w.var(correction=0) for g, w in zip(got, wanted, strict=True)]
        assert score.recovery_loss == pytest.approx(float(sum(errors) / len(errors) / 3), rel=1e-3), block


def test_latency_is_that_of_the_whole_model_in_every_score() -> None:
    model = animal()
    size = sum(p.numel() for p in model.parameters())
    parts = sum(p.numel() for path in ALL for p in model.get_submodule(path).parameters())
    report = fxprune.report(compressed(model))
    timed = [score.latency for score in report.plan.scores]
    assert len(timed) == 6
    for score, latency in zip(report.plan.scores, timed, strict=True):
        assert latency is not None and latency.before.median_s == pytest.approx(1e-6 * (1 + size))
        block = sum(p.numel() for p in model.get_submodule(score.region.label).parameters())
        assert latency.saved_s == pytest.approx(1e-6 * block)
    assert report.part_latency is not None
    assert report.part_latency.before.median_s == pytest.approx(1e-6 * (1 + parts))
    assert "latency of head.left and head.right and mind alone" in str(report)
    assert CompressionReport.from_json(report.to_json()).verdict == report.verdict
    target = fxprune.report(compressed(model, k=None, target_speedup=1.2))
    assert target.latency.after.median_s <= target.latency.before.median_s / 1.2


def test_one_path_in_a_list_is_that_path(tmp_path: Path) -> None:
    for given, folder in (("mind", "one"), (["mind"], "other")):
        small = compressed(animal(), given, k=1, out=tmp_path / folder)
        assert fxprune.report(small).settings["submodule"] == "mind"
    for name in ("recipe.json", "plan.json"):
        one, other = ((tmp_path / folder / name).read_text() for folder in ("one", "other"))
        assert one.split('"files"')[0] == other.split('"files"')[0] and '"format": 1' in one


def test_the_same_seed_gives_the_same_plan_and_weights(done: tuple[nn.Module, Path]) -> None:
    one, other = done[0], compressed(animal())
    assert fxprune.report(one).plan == fxprune.report(other).plan
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@torch.no_grad()
def test_a_folder_makes_the_whole_model_again(done: tuple[nn.Module, Path]) -> None:
    small, folder = done
    assert '"format": 2' in (folder / "recipe.json").read_text()
    assert {"original.onnx", "model.onnx", "report.html"} <= {path.name for path in folder.iterdir()}
    again = fxprune.load(folder, animal(seed=1))
    parts = tuple(f"{path}." for path in ALL)
    again.load_state_dict({k: v for k, v in animal().state_dict().items() if not k.startswith(parts)}, False)
    assert isinstance(again, Animal) and torch.allclose(again(images(3)), small(images(3)), atol=1e-4)
    assert fxprune.report(again).plan.chosen == fxprune.report(small).plan.chosen
    joined = fxprune.load(folder)
    calls = capture_inputs(animal(), ALL, [images(3)]).images.inputs
    for path, call, found in zip(ALL, calls.calls, joined(*calls.args), strict=True):
        expected = small.get_submodule(path)(*call.args, **call.kwargs)
        for one, other in zip(values(found), values(expected), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_where_it_stopped(
    done: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **settings: object) -> None:
        raise AssertionError("what was finished is computed again")

    monkeypatch.setattr("fxprune.scoring.cached.CachedScorer.fit", stop)
    shutil.copytree(done[1] / "scores", tmp_path / "scores")
    resumed = compressed(animal(), out=tmp_path)
    assert fxprune.report(resumed).plan == fxprune.report(done[0]).plan


def test_a_plan_of_several_parts_travels(done: tuple[nn.Module, Path]) -> None:
    plan, chosen = Plan.read(done[1] / "plan.json"), fxprune.report(done[0]).plan.chosen
    assert tuple(cut.label for cut in plan.cuts) == chosen
    other = compressed(animal(1), k=None, plan=done[1] / "plan.json", recipe=brief("practise", mimic=0))
    assert fxprune.report(other).plan.chosen == chosen
    with pytest.raises(OptionError, match="no region is called that"):
        compressed(animal(), "mind", k=None, plan=plan)


@torch.no_grad()
def test_a_model_is_saved_by_its_parts(done: tuple[nn.Module, Path], tmp_path: Path) -> None:
    small = copy.deepcopy(done[0])
    for parameter in small.get_submodule("mind").parameters():
        parameter += 0.1
    fxprune.save(small, tmp_path)
    again = fxprune.load(tmp_path, animal())
    assert torch.allclose(again(images(3)), small(images(3)), atol=1e-4)
    assert fxprune.report(again).plan == fxprune.report(small).plan
    fxprune.save(again, tmp_path)
    fxprune.save(fxprune.load(tmp_path), tmp_path / "joined")
    third = fxprune.load(tmp_path / "joined", animal)
    assert torch.allclose(third(images(3)), small(images(3)), atol=1e-4)
    fxprune.export_onnx(small.get_submodule("mind"), tmp_path / "mind.onnx")


def test_parts_that_are_not_together_are_not_saved(done: tuple[nn.Module, Path], tmp_path: Path) -> None:
    small = copy.deepcopy(done[0])
    with pytest.raises(GraphError, match="compressed together, and this is mind alone: give the whole model"):
        fxprune.save(small.get_submodule("mind"), tmp_path)
    small.set_submodule("mouth", copy.deepcopy(small.get_submodule("mind")))
    with pytest.raises(GraphError, match="mouth is no longer there, or was compressed by another call"):
        fxprune.save(small, tmp_path)
    small.set_submodule("mind", nn.Identity())
    with pytest.raises(GraphError, match="mind is no longer there"):
        fxprune.save(small, tmp_path)
    with pytest.raises(
        OptionError, match=r"submodule 'head\.left' of the model was compressed, and this Mind has"
    ):
        fxprune.load(done[1], Mind())


def test_sweep_takes_several_parts() -> None:
    report = fxprune.sweep(animal(), [images(8)], submodule=EYES, recipe=brief(), progress=False)
    assert len(report.points) == 4 and report.settings["submodule"] == EYES


class Twice(nn.Module):
    """Stacks two frames for one part, and lends another to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mind = Eye(1.0), Mind()
        self.alias, self.other = self.mind, Mind()
        self.other.tail = self.mind.tail

    def forward(self, x: Tensor) -> Tensor:
        return self.mind(self.encoder(torch.cat([x, x]))["late"][: len(x)])


class Listing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mind(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 2, 1, 1)[:, :4]
        return self.second([x, self.first(x)])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Mind()

    def forward(self, given: list[Tensor]) -> Tensor:
        return self.conv(given[0]) + given[1]


@pytest.mark.parametrize(
    ("model", "settings", "error", "words"),
    [
        (Animal, {"paths": ("head.left", "head")}, OptionError, "'head.left', which lies in 'head'"),
        (Animal, {"paths": ("mind", "mind")}, OptionError, "'mind', which lies in 'mind' or is the same"),
        (Twice, {"paths": ("mind", "alias")}, OptionError, "'mind', which lies in 'alias' or is the same"),
        (Twice, {"paths": ("mind", "other")}, OptionError, "'mind' and 'other', which share weights"),
        (Animal, {"paths": ("mind", "hand")}, OptionError, "no submodule 'hand'"),
        (Animal, {"paths": ()}, OptionError, r"submodule is \(\); it must be paths of parts"),
        (Animal, {"paths": EYES, "tap": "relu"}, OptionError, "tap names one value, and several parts"),
        (
            Animal,
            {"paths": EYES, "labels": [(images(2), torch.zeros(2))]},
            OptionError,
            "labels and evaluate",
        ),
        (Animal, {"paths": ("mind", "flagged")}, GraphError, "'flagged', a Linear, is never called"),
        (
            Twice,
            {"paths": ("encoder", "mind")},
            CalibrationError,
            "submodules 'encoder' and 'mind': in batch 0 they are given 16 and 8 rows",
        ),
        (
            Listing,
            {"paths": ("first", "second"), "front_end": "fx"},
            GraphError,
            "'second' takes a list as its given",
        ),
    ],
)
def test_what_cannot_be_done_together_is_said(
    model: type[nn.Module], settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    torch.manual_seed(0)
    made = model().eval()
    made.flagged = nn.Linear(1, 1)  # type: ignore[assignment]  # nn.Module takes any
    with pytest.raises(error, match=words):
        compressed(made, **settings)


def test_a_part_that_takes_a_list_can_be_exported() -> None:
    torch.manual_seed(0)
    model = Listing().eval()
    small = compressed(model, ("first", "second"), k=1, front_end="export", recipe=brief(mimic=0))
    (label,) = fxprune.report(small).plan.chosen
    assert label.startswith(("first.", "second.conv."))
    assert small(images(2)).shape == (2, 2, 16, 16)
