"""The networks that benchmarks measure are the ones the weights were trained for, and shrink natively."""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from benchmarks.claims import accuracy
from benchmarks.common import data, options, result_file
from benchmarks.common.result_file import ResultFile
from benchmarks.models.blocks import surviving
from benchmarks.models.cifar_resnet import CifarResNet, resnet, resnet20, resnet56
from benchmarks.models.mobilenet_v2 import MobileNetV2
from fxprune import files
from fxprune.errors import ArtifactError, CalibrationError, OptionError, PostconditionError, SourceError
from fxprune.options import RECIPES


def folder() -> Path:
    try:
        return data.data_folder()
    except SourceError as error:
        pytest.skip(str(error))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def randomise(model: nn.Module) -> nn.Module:
    """Gives batch norm statistics that differ from the identity, so that equality means something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def silence(layer: nn.Module) -> None:
    """Makes a residual branch end in zeros, so that its block is the identity."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()


# He et al. 2016 give 0.27 M and 0.85 M. MobileNetV2: torchvision's 3,504,872 less one of the two vectors of
# batch norm over 17,056 channels (the bias stays), plus a 1001st class of 1,281.
@pytest.mark.parametrize(
    ("model", "expected"), [(resnet20(), 269_722), (resnet56(), 853_018), (MobileNetV2(), 3_489_097)]
)
def test_parameter_count(model: nn.Module, expected: int) -> None:
    assert parameters(model) == expected


@pytest.mark.parametrize(
    ("model", "size", "classes"),
    [(resnet20(), 32, 10), (MobileNetV2(), 224, 1001), (MobileNetV2(), 96, 1001)],
)
def test_symbolic_trace_computes_the_same(model: nn.Module, size: int, classes: int) -> None:
    model = randomise(model)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, classes)
        assert torch.equal(symbolic_trace(model)(x), expected)


@pytest.mark.parametrize(
    "labels", [("layer1.0",), ("layer1.0", "layer1.1", "layer1.2"), ("layer2.1", "layer3.2")]
)
def test_cifar_resnet_without_blocks_equals_silenced_blocks(labels: tuple[str, ...]) -> None:
    full = randomise(resnet20())
    for label in labels:
        silence(full.get_submodule(f"{label}.bn2"))
    compare_native(full, resnet20(without=labels), labels, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("labels", [("features.3",), ("features.5.conv", "features.16")])
def test_mobilenet_without_blocks_equals_silenced_blocks(labels: tuple[str, ...]) -> None:
    full = randomise(MobileNetV2())
    blocks = tuple(label.removesuffix(".conv") for label in labels)
    for label in blocks:
        silence(full.get_submodule(f"{label}.conv.2"))
    compare_native(full, MobileNetV2(without=labels), blocks, torch.randn(1, 3, 96, 96))


def compare_native(full: nn.Module, native: nn.Module, labels: tuple[str, ...], x: Tensor) -> None:
    prefixes = tuple(f"{label}." for label in labels)
    state = {key: value for key, value in full.state_dict().items() if not key.startswith(prefixes)}
    assert state.keys() == native.state_dict().keys()
    native.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(native.eval()(x), full(x), rtol=0, atol=1e-6)


def test_depth_of_resnet_1202() -> None:
    with torch.device("meta"):
        model = resnet(1202)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions + 1 == 1202
    assert parameters(model) == pytest.approx(19.4e6, rel=0.01)  # He et al. 2016, table 6


@pytest.mark.parametrize("depth", [0, 2, 19, 21, -4])
def test_impossible_depth(depth: int) -> None:
    with pytest.raises(OptionError, match=f"not {depth}"):
        resnet(depth)


@pytest.mark.parametrize("label", ["layer2.0", "layer4.1", "layer1.3", "", "layer1", "layer1.00"])
def test_without_a_block_that_cannot_go(label: str) -> None:
    with pytest.raises(OptionError, match=r"choose from layer1\.0, "):
        CifarResNet(3, without=(label,))


def test_mobilenet_cannot_go_without_a_block_that_changes_shape() -> None:
    with pytest.raises(OptionError, match=r"features\.2"):
        MobileNetV2(without=("features.2",))


def test_block_labels_are_not_mere_text_prefixes() -> None:
    assert surviving(["a.1", "a.10"], ["a.1", "a.10"], ["a.10.conv"]) == ("a.1",)


def test_absent_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(SourceError, match="--data or the environment variable FXPRUNE_DATA"):
        data.data_folder(missing)
    monkeypatch.setenv("FXPRUNE_DATA", str(tmp_path))
    assert data.data_folder() == tmp_path
    with pytest.raises(SourceError, match="no CIFAR-10 images"):
        data.cifar10_test()
    with pytest.raises(SourceError, match="no weights"):
        data.load_weights(resnet20(), "resnet20_cifar10")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    torch.save(resnet56().state_dict(), tmp_path / "weights" / "w.pt")
    with pytest.raises(SourceError, match=r"layer\d\.\d"):
        data.load_weights(resnet20(), "w", tmp_path)
    torch.save(MobileNetV2(without=["features.3"]).state_dict(), tmp_path / "weights" / "w.pt")
    with pytest.raises(SourceError, match=r"features\.3"):
        data.load_weights(MobileNetV2(), "w", tmp_path)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    part = tmp_path / "photos" / "fit"
    part.mkdir(parents=True)
    (part / "0001_x.jpg").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match="0001_x"):
        data.photographs("fit", tmp_path)


def test_few_shot_draws_are_seeded_nested_and_apart() -> None:
    root = folder()
    few, held = data.few_shot(20, seed=3, held_back=30, data=root)
    again, same_held = data.few_shot(40, seed=3, held_back=30, data=root)
    other, _ = data.few_shot(20, seed=4, data=root)
    assert few.shape == (20, 3, 32, 32)
    assert held.labels.shape == (30,)
    assert torch.equal(again[:20], few)
    assert torch.equal(same_held.images, held.images)
    assert not torch.equal(other, few)
    distance = torch.cdist(few.flatten(1), held.images.flatten(1))
    assert distance.min() > 0
    with pytest.raises(OptionError, match="the pool has 5000"):
        data.few_shot(5000, seed=0, held_back=1, data=root)


def test_published_weights_recognise_their_images() -> None:
    root = folder()
    _, held = data.few_shot(1, seed=0, held_back=200, data=root)
    for name, model in (("resnet20", resnet20()), ("resnet56", resnet56())):
        trained = data.load_weights(model, f"{name}_cifar10", root)
        assert data.accuracy(trained, held.images, held.labels) > 0.9
        assert data.agreement(trained, trained, held.images) == 1.0


def test_accuracy_counts() -> None:
    images = torch.eye(4).view(4, 4, 1, 1)
    labels = torch.tensor([0, 1, 2, 0])
    assert data.accuracy(nn.Flatten(), images, labels, batch_size=3) == 0.75


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result_file, "RESULTS", tmp_path)
    return tmp_path


def test_result_file_is_whole_or_absent(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ResultFile("x", {}, seed=7)
    kept.put("figure", 1.5)
    written: dict[str, Any] = json.loads(kept.file.read_text())
    assert (written["entries"]["figure"], written["seed"]) == (1.5, 7)
    assert written["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    with pytest.raises(TypeError):
        kept.put("figure", object())

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(ArtifactError, match="disk is full"):
        kept.put("figure", 2.5)
    assert [path.name for path in kept.file.parent.iterdir()] == ["x.json"]
    assert json.loads(kept.file.read_text())["entries"] == kept.entries == {"figure": 1.5}


def full(source: Path, target: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def finished(seed: int, chosen: list[str]) -> dict[str, Any]:
    return {
        "images": 50,
        "seed": seed,
        "chosen": chosen,
        "accuracy_before": 0.9,
        "accuracy_after": 0.8 + seed / 100,
        "agreement": 0.85,
        "seconds": 2.0,
        "fold_error": 1e-7,
        "native_max_abs_diff": 0.0,
        "onnx_max_abs_diff": 1e-6,
        "latency": {"torch": {"native": {"ratio": 1.0, "interval": {"low": 0.99, "high": 1.01}}}},
    }


def test_finished_runs_are_taken_up_under_the_same_settings_only(results: Path) -> None:
    kept = ResultFile("x", {"k": 3})
    kept.put("50/1", finished(1, ["a", "b"]))
    kept.put("50/0", finished(0, ["c"]))
    again = ResultFile("x", {"k": 3})
    assert [run["seed"] for run in again.entries.values()] == [1, 0]
    assert again.once("50/1", lambda: None) == finished(1, ["a", "b"])
    assert "500/1" not in again.entries
    assert accuracy.timed_before(again.entries, ["b", "a"]) == finished(1, [])["latency"]
    assert accuracy.timed_before(again.entries, ["d"]) is None
    assert ResultFile("x", {"k": 4}).entries == {}


def test_table_shows_mean_spread_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.print_runs([finished(0, ["a", "b"]), finished(2, ["a", "b"]), finished(4, ["c"])])
    shown = capsys.readouterr().out
    assert "82.00 ± 2.00%" in shown
    assert "a, b (2); c (1)" in shown
    assert "0.990 to 1.010" in shown
    assert "worst onnx_max_abs_diff: 1.00e-06" in shown


def test_native_twin_takes_all_weights_and_refuses_leftovers() -> None:
    full = randomise(resnet20())
    images = torch.randn(4, 3, 32, 32)
    test = data.LabelledImages(images, torch.zeros(4, dtype=torch.long))
    case = accuracy.Case(full, lambda without: resnet20(without=without), test, images)
    pruned = randomise(resnet20(without=["layer1.1"]))
    small = symbolic_trace(pruned.to(memory_format=torch.channels_last))
    native = accuracy.native_twin(case, small, ["layer1.1"])
    assert accuracy.max_abs_diff(small, native, images) == 0.0
    with pytest.raises(PostconditionError, match=r"(?s)layer1\.2.*layer1\.1"):
        accuracy.native_twin(case, small, ["layer1.2"])


def test_iterations_of_a_trial_replace_the_recipes() -> None:
    recipe = options.shortened("practise", adaptor=7, mimic=None)
    assert recipe.adaptor.iterations == 7
    assert recipe.mimic == RECIPES["practise"].mimic
    settings = options.settings_of(argparse.Namespace(), basis=(), recipes=[recipe])
    assert settings["recipes"]["practise"]["adaptor"]["iterations"] == 7
