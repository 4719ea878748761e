"""First scripts, as people write them from the README alone, with the packages that their networks come from.

Configurations are small, weights random, latencies counted; each test is skipped where its package is missing.
"""

from __future__ import annotations

import logging
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.shell import cli
from tests.doubles import brief, count_latency
from tests.tiny import images, tiny

PAGE = Path(__file__).parent.parent / "docs" / "first_scripts.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))
PACKAGES = {
    "Hugging Face": ("transformers",),
    "Ultralytics": ("ultralytics",),
    "timm": ("timm",),
    "segmentation-models-pytorch": ("segmentation_models_pytorch",),
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count_latency(monkeypatch)
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def need(*packages: str) -> None:
    """Skips the test unless all packages are there; they warn while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in packages:
            pytest.importorskip(package)


def compressed(model: nn.Module, loader: Any, **settings: Any) -> Any:
    goal = {} if {"k", "regions"} & settings.keys() else {"k": 2}
    return fxprune.compress(model, loader, recipe=brief(), progress=False, **goal, **settings)


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if "```python" in text])
def test_the_first_scripts_of_the_page_run(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(*PACKAGES.get(section, ()))
    compress = fxprune.compress
    quick = {"recipe": brief(), "progress": False}
    monkeypatch.setattr(fxprune, "compress", lambda *given, **rest: compress(*given, **{**rest, **quick}))
    sources = re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)
    assert sources
    namespace: dict[str, Any] = {"__name__": "first_script"}
    for number, source in enumerate(sources):
        exec(compile(source, f"{PAGE.name}, {section}, block {number}", "exec"), namespace)
    commands = re.findall(r"^fxprune (.+)$", SECTIONS[section], flags=re.MULTILINE)
    if commands:
        draw_images(Path("IMAGES"))
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)) == 0, command


def draw_images(folder: Path) -> None:
    folder.mkdir()
    for place, pixels in enumerate((255 * images()).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{place}.png")


def test_every_package_has_its_section() -> None:
    assert PACKAGES.keys() <= SECTIONS.keys()


def _hf(name: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**values)).eval()

    return build


class Block(nn.Module):
    """A residual block without normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


def test_graphs_that_onnx2torch_wrote() -> None:
    need("onnx2torch")
    import onnx2torch

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.Conv2d(8, 4, 1)).eval()
    fxprune.export_onnx(net, "net.onnx", images(2), opset=18)
    small = compressed(onnx2torch.convert("net.onnx"), images(), k=1, front_end="export")
    assert len(fxprune.report(small).plan.chosen) == 1


TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [3, 2]}
VIT = _hf("ViTForImageClassification", "ViTConfig", **TRANSFORMER)
RESNET = _hf("ResNetForImageClassification", "ResNetConfig", embedding_size=8, layer_type="basic", **STAGES)
HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "resnet": RESNET,
    "convnext v2": _hf("ConvNextV2ForImageClassification", "ConvNextV2Config", num_stages=2, **STAGES),
    "swin v2": _hf(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=4,
    ),
    "segformer": _hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "dinov2": _hf("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, **TRANSFORMER),
    "clip": _hf("CLIPVisionModel", "CLIPVisionConfig", **TRANSFORMER),
    "siglip": _hf("SiglipVisionModel", "SiglipVisionConfig", **TRANSFORMER),
}


def labelled(size: int = 32) -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": torch.randn(3, 3, size, size), "labels": torch.zeros(3).long()} for _ in range(2)
    ]


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_with_labels_in_the_batches(family: str, caplog: pytest.LogCaptureFixture) -> None:
    need("transformers")
    caplog.set_level(logging.INFO, "fxprune")
    model, loader = HUGGING_FACE[family](), labelled()
    small = compressed(model, loader)
    assert len(fxprune.report(small).plan.chosen) == 2
    assert [r.message for r in caplog.records if "ignored" in r.message] == [
        "Batches are mappings: pixel_values passed on, labels ignored."
    ]
    with torch.no_grad():
        wanted, found = (network(pixel_values=loader[0]["pixel_values"]) for network in (model, small))
    assert type(found) is type(wanted)
    assert found.keys() == wanted.keys()
    assert all(found[key].shape == wanted[key].shape for key in wanted)


@pytest.mark.parametrize(("build", "part"), [(VIT, "vit"), (RESNET, "resnet.encoder")], ids=["vit", "resnet"])
def test_a_part_of_a_hugging_face_model_keeps_what_the_class_can_do(
    build: Callable[[], nn.Module], part: str, tmp_path: Path
) -> None:
    need("transformers")
    model, loader = build(), labelled()
    small = compressed(model, loader, submodule=part)
    assert type(small) is type(model)
    assert small.config.to_dict() == model.config.to_dict()
    loss = small(**loader[0]).loss
    loss.backward()
    assert any(p.grad is not None for p in small.get_submodule(part).parameters())
    small.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        outputs = [network(loader[0]["pixel_values"]).logits for network in (small, again)]
    assert not torch.allclose(*outputs)  # this is what the note warns of
    assert any("from_pretrained" in note for note in fxprune.report(small).notes)
    rebuilt = compressed(model, loader, submodule=part)
    rebuilt.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(loader[0]["pixel_values"]).logits, outputs[0])


def test_a_compressed_part_is_trained_by_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    need("transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    small = compressed(VIT(), labelled(), submodule="vit")
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0} for _ in range(4)]
    trainer = Trainer(model=small, args=arguments, train_dataset=rows)
    trainer.model_accepts_loss_kwargs = False  # the part that was traced takes no keywords of the loss
    done = trainer.train()
    assert done.global_step == 2
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} == {"vit", "classifier"}


@pytest.mark.parametrize(
    "name",
    [
        "yolo11n",
        pytest.param("yolov8n", marks=pytest.mark.slow),
        pytest.param("yolo11n-seg", marks=pytest.mark.slow),
    ],
)
def test_detectors_of_ultralytics_are_compressed_whole(name: str) -> None:
    need("ultralytics")
    from ultralytics import YOLO

    model, loader = YOLO(f"{name}.yaml").model.eval(), [torch.rand(4, 3, 64, 64)]
    small = compressed(
        model, loader, regions=["model.4.m.0", "model.6.m.0"] if name == "yolov8n" else ["model.4.m.0"]
    )
    with torch.no_grad():
        wanted, found = model(loader[0])[0], small(loader[0])[0]
    wanted, found = (value[0] if isinstance(value, tuple) else value for value in (wanted, found))
    assert found.shape == wanted.shape
    assert type(fxprune.in_own_class(model, small)) is type(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 48}),
        ("mobilevit_xxs", {}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (1, 2)},
        ),
    ],
)
def test_families_of_timm(name: str, options: dict[str, Any]) -> None:
    need("timm")
    import timm

    size = options.get("img_size", 64)
    model = timm.create_model(name, num_classes=5, **options).eval()
    small = compressed(model, [torch.randn(4, 3, size, size)], k=1)
    assert small(torch.randn(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_weights_under_parametrizations_are_compressed(kind: str) -> None:
    network = tiny()
    for block in network.body:
        getattr(parametrizations, kind)(block.conv1)
    small = compressed(network.eval(), images(), k=1)
    assert fxprune.report(small).plan.chosen
    assert small(images(2)).shape == (2, 5)
