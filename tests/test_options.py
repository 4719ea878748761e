"""What was asked for: its bounds, where it comes from, and the law that a folder never answers another question."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import OptionError
from fxprune.measurements import LatencyComparison
from fxprune.options import CompressSettings, Options, Settings
from fxprune.plan import Plan, PlannedCut
from fxprune.selection.planner import Planner
from tests.doubles import brief, comparison
from tests.tiny import images, tiny


def brighter(batch: Tensor) -> Tensor:
    return batch * 1.5


PLAN = Plan((PlannedCut("body.2", "identity", (8, 16, 16), ()),), ("identity",), None)

# what a run asks for that differs in one field alone from `BASE`
BASE: dict[str, Any] = {
    "k": 2,
    "recipe": brief(adaptor=2, mimic=1),
    "latency_batch": 2,
    "threads": 1,
    "images": 12,
}
OTHER: dict[str, dict[str, Any]] = {
    "k": {"k": 1},
    "target_speedup": {"k": None, "target_speedup": 1.2},
    "target_latency_ms": {"k": None, "target_latency_ms": 25.0},
    "regions": {"k": None, "regions": ("body.0", "body.3")},
    "plan": {"k": None, "plan": PLAN},
    "min_agreement": {"min_agreement": 0.0},
    "recipe": {"recipe": brief("practise", adaptor=2, mimic=1)},
    "criterion": {"criterion": "l2"},
    "cost": {"cost": "parameters"},
    "selection": {"selection": "independent"},
    "backend": {"backend": "onnxruntime-cpu"},
    "device": {"device": "cpu"},
    "kinds": {"kinds": ("identity", "sequential")},
    "ignore": {"ignore": "body.3"},
    "tap": {"tap": "add_3"},
    "submodule": {"submodule": "body"},
    "front_end": {"front_end": "export"},
    "input_fn": {"input_fn": brighter},
    "images": {"images": 5},
    "labels": {"labels": [(images(4), torch.tensor([0, 1, 2, 3]))]},
    "latency_batch": {"latency_batch": 3},
    "cache_bytes": {"cache_bytes": 2**17},
    "seed": {"seed": 1},
    "threads": {"threads": 2},
    "out": {"out": "DIR/."},
    "onnx": {"onnx": True},
    "fp16": {"onnx": True, "fp16": True},
    "int8": {"onnx": True, "int8": True},
    "progress": {"progress": True},
}


@dataclass(frozen=True)
class Answer:
    """Everything that a run says, wherever it got it from."""

    chosen: tuple[str, ...]
    scores: tuple[tuple[str, str, float, float, float], ...]
    latencies: tuple[float, ...]
    weights: bytes = b""
    accuracies: tuple[float, ...] = ()


@pytest.fixture(autouse=True)
def latency_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency depends on the network, the batch, the backend and the rounds, so that no figure passes for another."""

    def compare(
        before: nn.Module | Path, candidates: Sequence[nn.Module | Path], inputs: Sequence[Tensor], **how: Any
    ) -> tuple[LatencyComparison, ...]:
        def cost(network: nn.Module | Path) -> float:
            if isinstance(network, Path):
                return float(network.stat().st_size)
            count = sum(p.numel() * (1 + p.dim()) for p in network.parameters())
            return 1e-6 * (
                count + 40 * len(inputs[0]) + 90 * (how["backend"] != "torch") + 7 * torch.get_num_threads()
            )

        return tuple(comparison(cost(before), cost(one), batch=tuple(inputs[0].shape)) for one in candidates)

    monkeypatch.setattr("fxprune.timing.latency.compare", compare)


def compress(folder: Path, settings: dict[str, Any]) -> Answer:
    given = {**BASE, "out": folder, "progress": False, **settings}
    if given["out"] == "DIR/.":
        given["out"] = f"{folder}/."
    small = fxprune.compress(tiny(), images(), **given)
    made = fxprune.report(small)
    weights = b"".join(
        bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in small.state_dict().values()
    )
    accuracies = () if made.accuracy is None else (made.accuracy["before"].top1, made.accuracy["after"].top1)
    return Answer(made.plan.chosen, rows(made.plan.scores), (made.latency.ratio,), weights, accuracies)


def sweep(folder: Path, settings: dict[str, Any]) -> Answer:
    given = {**{k: v for k, v in BASE.items() if k != "k"}, "out": folder, "progress": False, **settings}
    if given["out"] == "DIR/.":
        given["out"] = f"{folder}/."
    made = fxprune.sweep(tiny(), images(), **given)
    losses = tuple(point.recovery_loss for point in made.points)
    ratios = tuple(point.latency.ratio for point in made.points)
    accuracies = tuple(point.accuracy for point in made.points if point.accuracy is not None)
    return Answer(made.points[-1].dropped, rows(made.scores), (*ratios, *losses), accuracies=accuracies)


def rows(scores: Sequence[Any]) -> tuple[tuple[str, str, float, float, float], ...]:
    return tuple(
        (s.region.entry, s.region.exit, s.recovery_loss, s.bare_loss, 1 - s.cost.saving) for s in scores
    )


def test_every_field_is_asked_for_otherwise_below() -> None:
    assert OTHER.keys() == {one.name for one in fields(Options)}


VERBS: dict[str, tuple[Callable[[Path, dict[str, Any]], Answer], set[str]]] = {
    "compress": (compress, set(OTHER)),
    "sweep": (sweep, {*Settings.__annotations__, "submodule"}),
}


@pytest.mark.parametrize(
    ("verb", "field"), [(verb, field) for verb, (_, known) in VERBS.items() for field in sorted(known)]
)
def test_two_runs_in_one_folder_give_what_fresh_folders_give(verb: str, field: str, tmp_path: Path) -> None:
    """The law: whatever one run left behind, the next one that asks otherwise, and the first again, are not misled."""
    run, _ = VERBS[verb]
    shared = tmp_path / "shared"
    first = run(shared, {})
    assert run(shared, OTHER[field]) == run(tmp_path / "fresh", OTHER[field])
    assert run(shared, {}) == first == fresh(verb, tmp_path)


@cache
def _remembered(verb: str) -> list[Answer]:
    return []


def fresh(verb: str, folder: Path) -> Answer:
    """What the plain question gives in a fresh folder; asked once for all fields."""
    known = _remembered(verb)
    if not known:
        known.append(VERBS[verb][0](folder / "fresh base", {}))
    return known[0]


@pytest.mark.parametrize("verb", VERBS)
def test_the_other_questions_have_other_answers(verb: str, tmp_path: Path) -> None:
    """Without which the law would say nothing; where an answer may stay, the reason stands here."""
    same = {
        "device",
        "out",
        "onnx",
        "fp16",
        "int8",
        "progress",
    }  # the CPU either way; where, what else and how, not what
    same |= {"threads", "cache_bytes"}  # the last digits; a cache that holds fewer images
    same |= {"selection"}  # both choose well here: see the test below
    run, known = VERBS[verb]
    base = fresh(verb, tmp_path)
    for field in sorted(known - same):
        assert run(tmp_path / field, OTHER[field]) != base, field


def test_another_way_of_choosing_has_latencies_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_graph_order(planner: Planner) -> Iterator[tuple[Any, ...]]:
        regions = [score.region for score in planner.scores]
        yield from (tuple(regions[:i]) for i in range(1, len(regions) + 1))

    monkeypatch.setattr(Planner, "_independent", in_graph_order)
    first = sweep(tmp_path / "shared", {})
    other = sweep(tmp_path / "shared", {"selection": "independent"})
    assert other == sweep(tmp_path / "fresh", {"selection": "independent"})
    assert other.latencies != first.latencies


@pytest.mark.parametrize(("verb", "settings"), [("compress", CompressSettings), ("sweep", Settings)])
def test_signatures_come_from_the_options(verb: str, settings: Any) -> None:
    parameters = inspect.signature(getattr(fxprune, verb)).parameters
    defaults = {one.name: one.default for one in fields(Options)}
    for name in settings.__annotations__:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == defaults[name]
    own = parameters.keys() - settings.__annotations__.keys()
    assert own == {"model", "loader", "evaluate", "submodule", *(["k"] if verb == "compress" else [])}
    assert {*own, *settings.__annotations__} >= defaults.keys() - (
        CompressSettings.__annotations__.keys() - Settings.__annotations__.keys() | {"k"}
        if verb == "sweep"
        else set()
    )


def test_a_keyword_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"compress\(\) has no argument 'target_speed'; did you mean target_speedup"
    ):
        fxprune.compress(tiny(), images(), target_speed=1.2)
    with pytest.raises(
        TypeError, match=r"no argument 'ignored_layers'; what torch-pruning calls so is ignore here"
    ):
        fxprune.compress(nn.Identity(), [], ignored_layers=[])
    with pytest.raises(TypeError, match=r"sweep\(\) has no argument 'k'"):
        fxprune.sweep(tiny(), images(), k=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 2**64}, r"seed is 18446744073709551616; it must be a whole number from 0 to"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": None}, "seed is None"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"device": "bogus"}, "device is 'bogus'; it must be cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device is 'mps'"),
        ({"images": "3"}, "images is '3'; it must be a whole number, 1 or more"),
        ({"images": 2.5}, "images is 2.5"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": 99999999999}, "threads is 99999999999; it must be a whole number from 1 to 4096"),
        ({"latency_batch": 0}, "latency_batch is 0; it must be a whole number, 1 or more"),
        ({"cache_bytes": 0}, "cache_bytes is 0"),
        ({"recipe": {}}, r"recipe is \{\}; choose from"),
        ({"kinds": ()}, r"kinds is \(\); choose from identity"),
        ({"kinds": "round"}, r"kinds is \('round',\); choose from"),
        ({"out": 5}, "out is 5; it must be the path of a folder"),
        ({"out": b"dir"}, "out is b'dir'"),
        ({"out": ""}, "out is ''; it must be the path of a folder, '.' for the present one"),
        ({"out": "a\0b"}, "must be the path of a folder"),
        ({"target_speedup": float("inf"), "k": None}, "target_speedup is inf"),
        ({"target_latency_ms": float("nan"), "k": None}, "target_latency_ms is nan"),
        ({"min_agreement": float("nan")}, "min_agreement is nan"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Options.of(**{"k": 1, **settings})


def test_reports_hold_all_that_was_asked(tmp_path: Path) -> None:
    small = fxprune.compress(tiny(), images(), 1, recipe=brief(), ignore=["body.0", fair], progress=False)
    settings = fxprune.report(small).settings
    assert settings.keys() >= {one.name for one in fields(Options)}
    assert settings["ignore"] == ["body.0", "fair"]
    assert settings["kinds"] == ("identity",)
    assert (
        settings["latency_batch"] == 8 and settings["device"] == "cpu" and settings["selection"] == "greedy"
    )


def fair(region: Any) -> bool:
    return bool(region.label == "body.1")
