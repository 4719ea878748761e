from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fxprune.errors import ArtifactError, OptionError, SourceError
from fxprune.export import artifact
from fxprune.shell import images as shell_images
from fxprune.shell.images import BATCH, IMAGENET_MEAN, IMAGENET_STD, load_images, load_labelled
from fxprune.sources.networks import image_size, load_model, load_weights, onnx_inputs


def test_torchvision_networks_come_untrained_and_in_evaluation_mode() -> None:
    model = load_model("torchvision:resnet18")
    assert type(model).__name__ == "ResNet"
    assert not model.training


def test_no_backbone_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    assert isinstance(load_model("torchvision:lraspp_mobilenet_v3_large"), nn.Module)


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(SourceError, match=r"'resnet43'.*resnet34"):
        load_model("torchvision:resnet43")


def test_timm_networks() -> None:
    pytest.importorskip("timm")
    assert not load_model("timm:resnet10t").training
    with pytest.raises(SourceError, match=r"resnet10t"):
        load_model("timm:resnet10tt")


def test_a_missing_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SourceError, match=r"pip install fxprune\[timm\]"):
        load_model("timm:resnet18")


FACTORIES = """
from torch import nn
from neighbour import WIDTH

def build():
    return nn.Linear(WIDTH, 2)

def number():
    return 5

def broken():
    raise RuntimeError("no such layer")

def leaving():
    raise SystemExit(0)
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    path = tmp_path / "nets.py"
    path.write_text(FACTORIES)
    return path


def test_a_factory_in_a_file_may_import_its_neighbours(factories: Path) -> None:
    path = list(sys.path)
    model = load_model(f"{factories}:build")
    assert isinstance(model, nn.Linear) and model.in_features == 3 and not model.training
    assert sys.path == path
    sys.modules.pop("neighbour")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("bild", r"no function 'bild'.*broken, build, leaving, number"),
        ("number", "returned a int"),
        ("broken", r"broken\(\).*failed: RuntimeError: no such layer"),
        ("leaving", r"leaving\(\).*failed: SystemExit: 0"),
    ],
)
def test_factories_that_do_not_build(factories: Path, factory: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_model(f"{factories}:{factory}")
    sys.modules.pop("neighbour")


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(SourceError, match="cannot be imported: SyntaxError"):
        load_model(f"{tmp_path / 'bad.py'}:f")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(SourceError, match="cannot be imported: SystemExit: 7"):
        load_model(f"{tmp_path / 'script.py'}:f")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet34", "Did you mean torchvision:resnet34"),
        ("model.pth", r"is a checkpoint.*--weights model.pth"),
        ("model.pt", "would run code"),
        ("nets.py", "give nets.py:FACTORY"),
        ("missing.py:f", "does not exist"),
        ("missing.pt2", "does not exist"),
        ("", "names no network"),
    ],
)
def test_what_names_no_network(spec: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_model(spec)


def test_a_pt2_file_is_read_through_the_artifact_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"")
    gm = torch.fx.symbolic_trace(nn.ReLU())
    monkeypatch.setattr(artifact, "load", lambda given: gm if given == path else None)
    assert load_model(str(path)) is gm


@pytest.mark.parametrize("name", ["dir.pt2", "results"])
def test_a_folder_that_save_wrote_names_its_network(tmp_path: Path, name: str) -> None:
    gm = torch.fx.symbolic_trace(nn.ReLU())
    artifact.save(gm, tmp_path / name, example_inputs=(torch.zeros(1, 2),))
    assert torch.equal(load_model(str(tmp_path / name))(-torch.ones(3, 2)), torch.zeros(3, 2))


def test_an_empty_name_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="names no network"):
        load_model("")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    ],
    ids=["plain", "nested", "data parallel", "compiled", "old"],
)
def test_weights_are_found_wherever_training_put_them(tmp_path: Path, wrap) -> None:
    source, target = network(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_half_precision_checkpoints_are_widened(tmp_path: Path) -> None:
    source, target = network().half(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, source[0].weight.float())


def test_keys_that_do_not_match_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"] = torch.zeros(5, 3, 1, 1)
    del state["1.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(13)}
    torch.save(state, tmp_path / "w.pt")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SourceError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing: 1.bias" in message
    assert "13 unexpected: extra.0" in message and "extra.9 and 3 more" in message
    assert "0.weight ((5, 3, 1, 1), the network has (4, 3, 1, 1))" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.to_sparse(), r"kind: 0.weight \(sparse"),
        (lambda x: x.to("meta"), r"kind: 0.weight \(sparse or without values"),
        (lambda x: x.to(torch.complex64), r"0.weight \(complex numbers"),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_of_another_kind_are_refused(tmp_path: Path, change, words: str) -> None:
    model, state = network(), network().state_dict()
    state["0.weight"] = change(state["0.weight"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=words):
        load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model[0].weight, network()[0].weight)


def test_complex_weights_fit_complex_networks(tmp_path: Path) -> None:
    source, target = (nn.Linear(2, 2, dtype=torch.complex64) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(source.weight, target.weight)


def test_numbered_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(dict(enumerate(network().state_dict().values())), tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"numbers its tensors.*state_dict"):
        load_weights(network(), tmp_path / "w.pt")


def test_missing_and_unsafe_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        load_weights(network(), tmp_path / "none.pt")
    torch.save(network(), tmp_path / "pickled.pt")
    with pytest.raises(ArtifactError):
        load_weights(network(), tmp_path / "pickled.pt")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index, suffix in enumerate(("png", "jpg", "JPEG", "bmp", "webp", "png")):
        folder = tmp_path / ("cats" if index % 2 else "dogs/small")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + index, 60 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.{suffix}")
    Image.fromarray(np.full((50, 30), 200, dtype=np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    return tmp_path


def test_images_equal_torchvisions_evaluation_transform(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import transforms

    monkeypatch.setattr(shell_images, "BATCH", 3)
    images = load_images(photos, size=28, limit=100)
    reference = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    batches = list(images)
    assert [len(batch) for batch in batches] == [3, 3, 1] and len(images) == 3
    expected = torch.stack([reference(Image.open(path).convert("RGB")) for path in images.paths])
    assert torch.allclose(torch.cat(batches), expected, atol=1e-6)
    assert torch.equal(torch.cat(list(images)), torch.cat(batches))
    assert images.unreadable == ()


@pytest.mark.parametrize("size", [(14, 56), (56, 14), (28, 30)])
def test_images_may_be_longer_than_high(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.zeros((41, 59, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(59), 4 * np.arange(41)[:, None]  # its colours tell places
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    red, green, _ = load_images(tmp_path, size=size).pixels[0].float()
    assert red.shape == size
    step = 4 / (
        max(size[0] / 41, size[1] / 59) * 256 / 224
    )  # the same in both directions: nothing is distorted
    assert (red[:, -1] - red[:, 0]).mean() == pytest.approx(step * (size[1] - 1), rel=0.06)
    assert (green[-1] - green[0]).mean() == pytest.approx(step * (size[0] - 1), rel=0.06)
    assert (red.mean(), green.mean()) == (pytest.approx(116, abs=4), pytest.approx(80, abs=4))


def test_the_draw_of_images_is_seeded(photos: Path) -> None:
    draws = [load_images(photos, size=8, limit=3, seed=seed).paths for seed in range(6)]
    assert load_images(photos, size=8, limit=3, seed=0).paths == draws[0]
    assert len(set(draws)) > 1
    assert all(len(set(paths)) == 3 for paths in draws)


def test_unreadable_images_are_named_skipped_and_replaced(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "bad.jpg").write_bytes(b"no image")
    cut = photos / "cut.png"
    cut.write_bytes((photos / "grey.png").read_bytes()[:60])
    images = load_images(photos, size=8, limit=100)
    assert len(images.paths) == 7
    assert {Path(entry.split(": ")[0]).name for entry in images.unreadable} == {"bad.jpg", "cut.png"}
    assert sum("cannot be read" in record.message for record in caplog.records) == 2
    assert all(len(load_images(photos, size=8, limit=6, seed=seed).paths) == 6 for seed in range(5))


def test_pictures_of_extreme_shape_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, shape in (("thin", (1, 20000)), ("long", (421, 20)), ("wide", (20, 401)), ("good", (20, 400))):
        Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    convert, decoded = Image.Image.convert, []
    monkeypatch.setattr(
        Image.Image, "convert", lambda image, *args: decoded.append(image.size) or convert(image, *args)
    )
    images = load_images(tmp_path, size=28)
    assert [path.name for path in images.paths] == ["good.png"] and decoded == [(400, 20)]
    assert next(iter(images)).shape == (1, 3, 28, 28)
    assert sum("over 20 times" in entry for entry in images.unreadable) == 3
    assert any("20000 x 1 pixels" in entry for entry in images.unreadable)


@pytest.mark.filterwarnings("default")  # as in the shell, where a warning alone stops nothing
def test_pictures_of_too_many_pixels_are_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    images = load_images(photos, size=8)
    assert {path.name for path in images.paths} == {"0.png", "grey.png"}
    assert len(images.unreadable) == 5 and all("exceeds limit" in entry for entry in images.unreadable)


def test_memory_that_ran_out_is_no_property_of_a_picture(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        load_images(photos, size=8)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        load_images(tmp_path / "none")
    with pytest.raises(SourceError, match="holds no image"):
        load_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"is a file"):
        load_images(tmp_path / "a.png")
    with pytest.raises(SourceError, match=r"None of the 1 image files"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"limit": 0},
        {"std": (0, 1, 1)},
        {"mean": (1,)},
        {"mean": (float("nan"), 0, 0)},
        {"std": (1, float("inf"), 1)},
    ],
)
def test_image_options_out_of_range(photos: Path, options) -> None:
    with pytest.raises(OptionError):
        load_images(photos, **options)


def write_onnx(path: Path, *shapes: tuple[object, ...], kind: int = TensorProto.FLOAT) -> Path:
    inputs = [helper.make_tensor_value_info(f"x{i}", kind, list(shape)) for i, shape in enumerate(shapes)]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    output = helper.make_tensor_value_info("y", kind, None)
    node = helper.make_node("Identity", ["x0"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", inputs, [output], [weight])), path)
    return path


def test_onnx_inputs_follow_the_file(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", ("batch", 3, 8, 8), (2, 5))
    assert [tuple(x.shape) for x in onnx_inputs(path)] == [(1, 3, 8, 8), (2, 5)]
    assert [tuple(x.shape) for x in onnx_inputs(path, batch=4)] == [(4, 3, 8, 8), (4, 5)]
    assert torch.equal(onnx_inputs(path)[0], onnx_inputs(path)[0])
    integers = write_onnx(tmp_path / "i.onnx", (2, 3), kind=TensorProto.INT64)
    assert onnx_inputs(integers)[0].dtype == torch.int64


def test_the_size_of_images_is_that_of_the_file(tmp_path: Path) -> None:
    fixed = write_onnx(tmp_path / "fixed.onnx", ("batch", 3, 48, 96))
    half = write_onnx(tmp_path / "half.onnx", ("batch", 3, 48, "width"))
    assert image_size(str(fixed), None) == (48, 96)
    assert image_size(str(half), 48) == (48, 48)
    assert image_size("torchvision:resnet18", None) == (224, 224)
    assert image_size("torchvision:resnet18", 32) == (32, 32)
    with pytest.raises(OptionError, match="size of its input x0 free: give --size"):
        image_size(str(half), None)
    with pytest.raises(OptionError, match="48 x 96 pixels only: leave out --size 48"):
        image_size(str(fixed), 48)


@pytest.mark.parametrize("shapes", [[(1, 1, 8, 8)], [(1, 3, 8, 8)] * 2, [(1, 8, 8, 3)], [(1, 3)]])
def test_files_that_take_no_images_of_a_folder_are_refused(
    shapes: list[tuple[object, ...]], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="three channels, channels first"):
        image_size(str(write_onnx(tmp_path / "m.onnx", *shapes)), None)


def test_inputs_of_absurd_size_are_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", ("batch", 3, 8, 8))
    with pytest.raises(OptionError, match=r"x0 of .* would be \[2147483647, 3, 8, 8\]: over"):
        onnx_inputs(path, batch=2**31 - 1)


def test_free_dimensions_need_a_shape(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", ("batch", 3, "h", "w"))
    with pytest.raises(OptionError, match="--input-shape"):
        onnx_inputs(path)
    assert onnx_inputs(path, shapes=[(2, 3, 4, 4)])[0].shape == (2, 3, 4, 4)
    with pytest.raises(OptionError, match="1 inputs"):
        onnx_inputs(path, shapes=[(1,), (2,)])


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        onnx_inputs(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"certainly no protobuf")
    with pytest.raises(SourceError):
        onnx_inputs(tmp_path / "bad.onnx")


# --- labelled folders ---


def test_classes_are_the_folders_in_order_of_their_names(photos: Path) -> None:
    (photos / "bats").mkdir()  # no image of this class, which is an output of the network all the same
    (photos / ".hidden").mkdir()
    Image.new("RGB", (9, 9)).save(photos / ".hidden" / "x.png")
    labelled = load_labelled(photos, size=28)
    assert [(label, path.name) for label, path in zip(labelled.labels, labelled.paths, strict=True)] == [
        (1, "1.jpg"),
        (1, "3.bmp"),
        (1, "5.png"),
        (2, "0.png"),
        (2, "2.JPEG"),
        (2, "4.webp"),
    ]
    plain = load_images(photos, size=28)
    by_path = dict(zip(plain.paths, next(iter(plain)), strict=True))
    for _ in range(2):  # it can be read again and again
        ((pictures, labels),) = labelled
        assert labels.tolist() == [1, 1, 1, 2, 2, 2] and labels.dtype == torch.int64
        assert torch.equal(pictures, torch.stack([by_path[path] for path in labelled.paths]))


def test_labelled_images_come_in_batches(tmp_path: Path) -> None:
    for name, count in (("a", BATCH - 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (9, 9)).save(tmp_path / name / f"{index}.png")
    labels = [labels.tolist() for _, labels in load_labelled(tmp_path, size=8)]
    assert labels == [[0] * (BATCH - 1) + [1], [1]]


def test_a_labelled_image_that_cannot_be_read_is_named(photos: Path) -> None:
    (photos / "cats" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"1\.jpg cannot be read as an image"):
        list(load_labelled(photos, size=8))


def test_folders_without_labelled_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        load_labelled(tmp_path / "none")
    (tmp_path / "cats").mkdir()
    with pytest.raises(SourceError, match="holds no image"):
        load_labelled(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "flat.png")
    with pytest.raises(SourceError, match="holds no labelled images: it must hold one folder for each class"):
        load_labelled(tmp_path)
    with pytest.raises(OptionError, match="size is 0"):
        load_labelled(tmp_path, size=0)
    with pytest.raises(OptionError, match="standard deviations above 0"):
        load_labelled(tmp_path, std=(1.0, 0.0, 1.0))
