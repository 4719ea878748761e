"""The demo's parts on few steps; the whole of it is marked slow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.fx import symbolic_trace

from fxprune.errors import ArtifactError, SourceError
from fxprune.reports.compression import CompressionReport
from fxprune.shell import demo
from tests.test_json import validate

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")


def test_digits_are_split_by_seed_and_disjoint() -> None:
    digits = demo.load_digits(seed=1)
    assert digits.images.shape == (1297, 1, 16, 16)
    assert digits.held_out_images.shape == (500, 1, 16, 16)
    assert digits.images.min() == -1.0
    assert digits.images.max() <= 1.0
    assert sorted(set(digits.labels.tolist())) == list(range(10))
    assert torch.equal(demo.load_digits(seed=1).held_out_labels, digits.held_out_labels)
    assert not torch.equal(demo.load_digits(seed=2).held_out_labels, digits.held_out_labels)
    # Two scans may look alike, so the proof that the sets have nothing in common is the count of all of them.
    everything = torch.cat([digits.images, digits.held_out_images])
    other = demo.load_digits(seed=2)
    assert torch.equal(_ordered(everything), _ordered(torch.cat([other.images, other.held_out_images])))


def _ordered(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).double().sum(1).sort().values


def test_network_has_seven_identity_blocks() -> None:
    model = demo.DigitsNet()
    x = torch.randn(2, 1, 16, 16)
    blocks = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Identity)]
    assert [name.removesuffix(".projection") for name in blocks] == [
        *("stage1.0", "stage1.1", "stage1.2"),
        *("stage2.1", "stage2.2"),
        *("stage3.1", "stage3.2"),
    ]
    model.eval()
    assert torch.equal(symbolic_trace(model)(x), model(x))


def test_training_learns_repeatably_and_leaves_the_random_state_alone() -> None:
    digits = demo.load_digits(seed=0)
    state = torch.random.get_rng_state()
    first = demo.train(digits, seed=0, epochs=1, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    again = demo.train(digits, seed=0, epochs=1, progress=False)
    images = digits.held_out_images
    with torch.inference_mode():
        torch.testing.assert_close(again(images), first(images), rtol=1e-3, atol=1e-3)
        right = first(images).argmax(1) == digits.held_out_labels
    assert right.float().mean() > 0.3  # 0.1 is chance


def test_missing_scikit_learn_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SourceError, match=r'pip install "fxprune\[demo\]"'):
        demo.run(tmp_path, progress=False)


def test_unwritable_folder_stops_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", lambda *_, **__: pytest.fail("trained before the folder was checked"))
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file"):
        demo.run(tmp_path / "file" / "out", progress=False)


def test_training_takes_no_more_threads_than_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise SourceError(f"on {torch.get_num_threads()} threads")

    monkeypatch.setattr(demo, "default_threads", lambda: 3)
    monkeypatch.setattr(demo, "train", train)
    for threads, used in ((None, 3), (2, 2)):
        with pytest.raises(SourceError, match=f"on {used} threads"):
            demo.run(tmp_path, threads=threads, progress=False)


@pytest.mark.slow
def test_whole_demo(tmp_path: Path) -> None:
    figures = demo.run(tmp_path, seed=0, progress=False)
    validate("demo", figures)
    assert figures["accuracy"]["before"] >= 0.97
    assert figures["accuracy"]["after"] >= 0.95
    assert len(figures["dropped"]) == 3
    assert json.loads((tmp_path / "demo.json").read_text()) == figures
    assert {path.name for path in tmp_path.iterdir()} == {
        *("original.onnx", "model.onnx", "model.safetensors", "model.pt2", "report.json", "report.html"),
        *("demo.json", "plan.json", "recipe.json", "scores"),
    }
    report = CompressionReport.from_json((tmp_path / "report.json").read_text())
    assert report.accuracy is not None
    assert {side: one.top1 for side, one in report.accuracy.items()} == pytest.approx(figures["accuracy"])
