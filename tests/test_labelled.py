"""Labelled images and functions of the user's: what is measured with them, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.labelled import LabelledImages
from fxprune.errors import CalibrationError, OptionError
from fxprune.graph.call import Inputs
from fxprune.judging.judge import Accuracy, Judge, Judgement, accuracy
from fxprune.options import Options
from tests.doubles import brief, count_latency, forbid_work
from tests.tiny import images, tiny

SEED = 5  # the network that names several classes
LABELS = torch.tensor([3, 1, 3, 0, 2, 3, 4, 1, 3, 3])
PICTURES = images(10, seed=1)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither timing nor fitting may begin."""
    forbid_work(monkeypatch)


def compress(labels: Any = None, *, model: nn.Module | None = None, **settings: Any) -> fx.GraphModule:
    settings = {"k": 2, "recipe": brief(), "progress": False, "latency_batch": 2, **settings}
    small = fxprune.compress(model or tiny(SEED), images(), labels=labels, **settings)
    assert isinstance(small, fx.GraphModule)
    return small


def sweep(**settings: Any) -> Any:
    return fxprune.sweep(tiny(SEED), images(), recipe=brief(), progress=False, latency_batch=2, **settings)


@torch.no_grad()
def right(network: nn.Module) -> float:
    return int((network(PICTURES).argmax(1) == LABELS).sum()) / 10


# --- what is measured ---


def pairs(*shapes: int, classes: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shapes, classes, generator=generator), torch.randint(
        classes, shapes, generator=generator
    )


def labelled(loader: Any, like: Tensor) -> LabelledImages:
    return LabelledImages(loader, CalibrationSet(Inputs((like,))), Options.of(1))


@pytest.mark.parametrize(("classes", "top5"), [(5, False), (6, True), (8, True)])
def test_accuracy_is_counted_over_all_batches(classes: int, top5: bool) -> None:
    scores, labels = pairs(40, classes=classes)
    ranks = (scores > scores.gather(1, labels[:, None])).sum(
        1
    )  # how many classes score more than the right one
    loader = list(zip(scores.split(16), labels.split(16), strict=True))
    found = accuracy(nn.Identity(), labelled(loader, scores), "cpu")
    assert 0 < found.top1 < 1
    assert found == Accuracy(40, int((ranks == 0).sum()) / 40, int((ranks < 5).sum()) / 40 if top5 else None)


@pytest.mark.parametrize(
    "loader",
    [
        [(PICTURES, LABELS)],
        [[PICTURES[:7], LABELS[:7].to(torch.uint8)], (PICTURES[7:], LABELS[7:].int(), "more")],
        DataLoader(TensorDataset(PICTURES, LABELS), batch_size=3, shuffle=True),
        TensorDataset(PICTURES, LABELS),
        [({"x": PICTURES}, LABELS)],
        [({"pixel_values": PICTURES}, LABELS)],
    ],
    ids=["pair", "several", "loader", "dataset", "keywords", "known key"],
)
def test_both_networks_are_measured_on_labels(loader: Any, tmp_path: Path) -> None:
    model = tiny(SEED)
    small = compress(loader, model=model, k=4, out=tmp_path)
    report = fxprune.report(small)
    assert report.accuracy == {
        "before": Accuracy(10, right(model), None),
        "after": Accuracy(10, right(small), None),
    }
    assert right(model) > 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["accuracy"]["after"] == {"images": 10, "top1": right(small), "top5": None}
    assert "on 10 labelled images" in str(report)


def test_labels_change_nothing_but_the_report() -> None:
    plain, measured = compress().state_dict(), compress([(PICTURES, LABELS)]).state_dict()
    assert all(torch.equal(value, measured[name]) for name, value in plain.items())


def test_input_fn_is_given_the_whole_pair() -> None:
    seen: list[Any] = []

    def first(batch: Any) -> Tensor:
        seen.append(batch)
        return batch[0] if isinstance(batch, tuple) else batch

    report = fxprune.report(compress([(PICTURES, LABELS)], input_fn=first))
    assert report.accuracy is not None
    assert report.accuracy["before"].top1 == right(tiny(SEED))
    assert any(isinstance(batch, tuple) and batch[1] is LABELS for batch in seen)


def test_a_sweep_has_an_accuracy_at_every_point_and_plots_it(tmp_path: Path) -> None:
    by_labels = sweep(labels=[(PICTURES, LABELS)], out=tmp_path)
    by_hand = sweep(evaluate=right)
    assert [p.accuracy for p in by_labels.points] == [p.accuracy for p in by_hand.points]
    assert by_labels.accuracy == by_hand.accuracy == right(tiny(SEED))
    assert (by_labels.labelled, by_hand.labelled) == (10, None)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["files"].keys() == {"sweep.svg", "sweep_accuracy.svg"}
    root = ElementTree.parse(tmp_path / "sweep_accuracy.svg").getroot()
    texts = [text.text for text in root.findall("{http://www.w3.org/2000/svg}text")]
    assert {"original", "k=1", "k=4", "accuracy"} <= set(texts)
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 5
    sweep(out=tmp_path)
    assert not (tmp_path / "sweep_accuracy.svg").exists()  # it belongs to the run before


def test_a_sweep_without_a_measure_builds_no_network_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("fxprune.pipeline.stages.cut_and_fold", built)
    assert [point.accuracy for point in sweep().points] == [None] * 4


def test_one_process_judges_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Judgement(None, 0.25)
    monkeypatch.setattr("fxprune.judging.judge.on_main", lambda judge: told)  # as on another rank

    def never(network: nn.Module) -> float:
        raise AssertionError("judged here too")

    assert Judge(None, never, "cpu")(nn.Identity()) is told
    assert Judge(None, None, "cpu")(nn.Identity()) == Judgement(None, None)


# --- what is refused ---


def once() -> Iterator[tuple[Tensor, Tensor]]:
    yield PICTURES, LABELS


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("LABELS/", "labels is the path 'LABELS/', which does not tell how its images are to be prepared"),
        (Path("LABELS"), "labels is the path 'LABELS'"),
        (once(), "labels is a generator, which can be read only once"),
        (3, "labels: The loader, a int, is not an iterable"),
        ([], "labels: the loader yields no batch"),
        ([PICTURES], "labels: batch 0 is a Tensor and no tensor of labels: every batch must be a pair"),
        ((PICTURES, LABELS), "batch 0 is a Tensor and no tensor of labels"),
        ([(PICTURES,)], "batch 0 is a tuple and no tensor of labels"),
        ([(PICTURES, LABELS.tolist())], "batch 0 holds a list and no tensor of labels"),
        ([(PICTURES, LABELS[:9])], "labels: batch 0 holds 10 images and 9 labels"),
        ([(PICTURES, LABELS.float())], r"labels of batch 0 are torch.float32 of shape \(10,\)"),
        (
            [(PICTURES, nn.functional.one_hot(LABELS))],
            r"torch.int64 of shape \(10, 5\): give one whole number",
        ),
        ([(PICTURES, LABELS == 3)], "torch.bool"),
        ([(PICTURES, LABELS + 1)], "an image has the label 5, but the network's outputs are 0 to 4"),
        ([(PICTURES, LABELS - 1)], "an image has the label -1"),
        ([(PICTURES, LABELS), (PICTURES, LABELS + 1)], "an image has the label 5"),
        ([(PICTURES[:, :1], LABELS)], r"batch 0 holds images of \(1, 16, 16\) .* \(3, 16, 16\)"),
        ([(PICTURES.double(), LABELS)], "torch.float64, the calibration images are of .* torch.float32"),
        ([(PICTURES[:0], LABELS[:0])], "labels: Batch 0 is empty"),
        ([(PICTURES / 0, LABELS)], "labels: Batch 0 holds NaN or infinite values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_that_do_not_fit_are_refused_before_any_work(labels: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        compress(labels)
    if not isinstance(labels, Iterator):
        with pytest.raises(CalibrationError, match=words):
            sweep(labels=labels)


@pytest.mark.usefixtures("no_work")
def test_labels_need_class_scores() -> None:
    model = nn.Sequential(*list(tiny().children())[:3])
    with pytest.raises(OptionError, match="labels need a network whose output is one score for each class"):
        compress([(PICTURES, LABELS)], model=model)


@pytest.mark.usefixtures("no_work")
def test_a_part_is_not_measured() -> None:
    for given in ({"labels": [(PICTURES, LABELS)]}, {"evaluate": right}):
        with pytest.raises(OptionError, match="measure the model that compress returns"):
            compress(submodule="body", **given)


@pytest.mark.usefixtures("no_work")
def test_a_sweep_has_one_accuracy() -> None:
    with pytest.raises(OptionError, match="give labels or evaluate, not both"):
        sweep(labels=[(PICTURES, LABELS)], evaluate=right)


def test_fewer_images_than_classes_are_measured_all_the_same() -> None:
    report = fxprune.report(compress([(PICTURES[:1], LABELS[:1])]))
    assert report.accuracy is not None and report.accuracy["before"].images == 1


# --- a function of the user's ---


def test_evaluate_is_asked_about_both_networks(tmp_path: Path) -> None:
    small = compress([(PICTURES, LABELS)], evaluate=right, out=tmp_path)
    report = fxprune.report(small)
    assert report.evaluation == {"before": right(tiny(SEED)), "after": right(small)}
    assert report.accuracy is not None  # labels are another measure, and both may be given
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"] == report.evaluation
    assert fxprune.report(compress()).evaluation is None


def test_evaluate_may_do_with_its_copies_what_it_likes() -> None:
    def destructive(network: nn.Module) -> Tensor:
        for parameter in network.parameters():
            parameter.data.zero_()
        network.double().train()
        return torch.tensor(0.5)

    plain, small = compress(), compress(evaluate=destructive)
    assert fxprune.report(small).evaluation == {"before": 0.5, "after": 0.5}
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.usefixtures("no_work")
def test_an_evaluate_that_fails_does_so_before_any_work() -> None:
    with pytest.raises(OptionError, match="evaluate returned None; it must return a number"):
        compress(evaluate=lambda network: None)
    with pytest.raises(ZeroDivisionError):
        sweep(evaluate=lambda network: 1 / 0)
