"""What a compressed part is worth is told of the whole model around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import CalibrationError
from fxprune.graph.extract import share
from fxprune.reports.compression import CompressionReport
from fxprune.submodules.capture import capture_inputs
from fxprune.submodules.parts import Parts
from fxprune.submodules.whole import Whole, whole_around
from tests.doubles import brief, comparison, count_latency
from tests.tiny import Tiny, images


class Body(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.out_features = 5

    def forward(self, x: Tensor) -> Any:
        return OrderedDict(scores=super().forward(x))


class Detector(nn.Module):
    """Untraceable as a whole, for it branches on values; its head is larger than its body."""

    def __init__(self, width: int = 4000) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Sequential(nn.Linear(self.body.out_features, width), nn.ReLU(), nn.Linear(width, 2))
        self.flag = nn.Buffer(torch.zeros(1))

    def forward(self, given: Any) -> Tensor:
        found = self.body(given if isinstance(given, Tensor) else torch.stack(given))
        found.move_to_end("scores")
        scores = found["scores"]
        assert scores.shape[1] == self.body.out_features
        return self.head(scores if float(scores.detach().sum()) < 1e9 else -scores)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    return Detector()


def whole_of(model: nn.Module, loader: Any, count: int) -> Whole:
    images, batch = capture_inputs(model, "body", loader)
    example = images.example(2)
    parts = Parts({"body": fxprune.trace(model.get_submodule("body"), example.given)}, example)
    return whole_around(model, parts, batch, count, "cpu")


def compressed(model: nn.Module, loader: Any = None, **settings: Any) -> CompressionReport:
    given = [images()] if loader is None else loader
    small = fxprune.compress(
        model, given, submodule="body", recipe=brief(), progress=False, **({"k": 1} | settings)
    )
    return fxprune.report(small)


def test_the_model_around_another_part_shares_all_weights_and_changes_nothing(model: Detector) -> None:
    whole = whole_of(model, [images()], 4)
    part = fxprune.trace(model.body, images(2))
    code, held = part.code, set(vars(part))
    for graph in (part, share(part)):
        around = whole.around(graph)
        assert isinstance(around, Detector) and isinstance(around.body, fx.GraphModule)
        assert torch.equal(around(images(3)), model.eval()(images(3)))
        assert {id(p) for p in around.body.parameters()} == {id(p) for p in part.parameters()}
        assert {id(p) for p in around.head.parameters()} == {id(p) for p in whole.model.head.parameters()}
        assert around.flag is whole.model.flag
    assert part.code == code and set(vars(part)) == held
    assert isinstance(whole.model.body, Body) and isinstance(model.body, Body)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("count", [3, 5])
def test_the_timed_batch_repeats_the_images_of_the_first(model: Detector, as_list: bool, count: int) -> None:
    first = list(images(3)) if as_list else images(3)
    whole = whole_of(model, [(first, [{}] * 3), (first, [{}] * 3)], count)
    assert whole.batch_shape == (count, 3, 16, 16)
    (given,) = whole.batch.args
    assert isinstance(given, list) == as_list
    assert torch.equal(torch.stack(list(given)), images(3)[[0, 1, 2, 0, 1][:count]])


def test_keywords_are_repeated_as_well() -> None:
    class Named(Detector):
        def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # as users' models differ
            return super().forward(pixels * mask)

    whole = whole_of(Named(), [{"pixels": images(2), "mask": torch.ones(2, 1, 1, 1)}], 3)
    assert {name: len(value) for name, value in whole.batch.kwargs.items()} == {"pixels": 3, "mask": 3}


def test_a_model_that_takes_no_other_number_of_images_is_told_how(model: Detector) -> None:
    class Two(Detector):
        def forward(self, given: Tensor) -> Tensor:
            found: Tensor = super().forward(given)
            return found.view(2, 2)

    with pytest.raises(
        CalibrationError, match=r"around submodule 'body'.*3 images.*of 2: Run.*latency_batch=2"
    ):
        compressed(Two(3), [images(2)] * 3, latency_batch=3)
    assert compressed(Two(3), [images(2)] * 3, latency_batch=2).latency.before.batch_shape[0] == 2


@pytest.mark.parametrize("backend", ["torch", "torch-channels-last"])
def test_latencies_are_those_of_the_whole_and_the_report_has_both(model: Detector, backend: str) -> None:
    report = compressed(model, [(list(images(4)), [{}] * 4)] * 3, latency_batch=2, backend=backend)
    assert report.part_latency is not None
    size = sum(p.numel() for p in model.parameters())
    body = sum(p.numel() for p in model.body.parameters())
    assert report.latency.before.median_s == pytest.approx(1e-6 * (1 + size))
    assert report.part_latency.before.median_s == pytest.approx(1e-6 * (1 + body))
    assert report.latency.saved_s == pytest.approx(report.part_latency.saved_s)
    timed = [score.latency.before for score in report.plan.scores if score.latency]
    assert {one.median_s for one in timed} == {report.latency.before.median_s}
    assert {one.batch_shape for one in (*timed, report.part_latency.before)} == {(2, 3, 16, 16)}
    lines = str(report).splitlines()
    whole, part = (line for line in lines if line.startswith("latency"))
    assert whole.startswith(f"latency of the whole model {1e3 * report.latency.before.median_s:.3f} -> ")
    assert part.startswith(f"latency of body alone {1e3 * report.part_latency.before.median_s:.3f} -> ")
    assert "the whole model is" in report.verdict
    assert CompressionReport.from_json(report.to_json()).part_latency == report.part_latency


def test_a_target_is_one_of_the_whole(model: Detector) -> None:
    size = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.body.body]
    report = compressed(model, k=None, target_speedup=size / (size - 0.9 * max(blocks)))
    assert report.plan.chosen == ("body.3",)


def test_a_runtime_that_takes_files_times_the_part(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type[nn.Module]] = []

    def compare(before: nn.Module, candidates: Sequence[nn.Module], *_: Any, **__: Any) -> tuple[Any, ...]:
        seen.extend(type(network) for network in (before, *candidates))
        return tuple(comparison(1.0, 0.5) for _ in candidates)

    monkeypatch.setattr("fxprune.timing.latency.compare", compare)
    report = compressed(model, backend="onnxruntime-cpu")
    assert seen and all(issubclass(kind, fx.GraphModule) for kind in seen)
    assert report.part_latency is None
    assert "\nlatency of body alone" in str(report) and "its part body is 2.00 times" in report.verdict


def test_latencies_of_another_model_around_the_same_part_are_not_used(
    model: Detector, tmp_path: Path
) -> None:
    other = Detector(5)
    other.body.load_state_dict(model.body.state_dict())
    first, again, second = (compressed(one, out=tmp_path) for one in (model, model, other))
    assert first.plan.scores == again.plan.scores
    assert second.plan.scores[0].latency.before.median_s < 0.2 * first.latency.before.median_s


class Both(Detector):
    """Two bodies for one head."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Body()

    def forward(self, given: Tensor) -> Tensor:
        more: Tensor = self.other(given)["scores"]
        return super().forward(given) + more.mean(1, keepdim=True)


def test_parts_are_compressed_one_after_another() -> None:
    model = Both()
    for part in ("body", "other"):
        model = fxprune.compress(model, [images()], 1, submodule=part, recipe=brief(), progress=False)
    first, second = (fxprune.report(part) for part in (model.body, model.other))
    assert [report.settings["submodule"] for report in (first, second)] == ["body", "other"]
    assert second.latency.before.median_s == pytest.approx(first.latency.after.median_s)
    assert model(images(2)).shape == (2, 2)
