"""Further families of networks that people bring: detectors, dense prediction, video, signals, pairs of images.

As in `test_users.py`: small configurations, random weights, counted latencies; skipped where a package is missing.
`regions=` names what is cut where scoring all blocks would take long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision import models

import fxprune
from tests.doubles import brief, count_latency
from tests.test_users import labelled, need
from tests.tiny import images, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count_latency(monkeypatch)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def compressed(model: nn.Module, loader: Any, **settings: Any) -> Any:
    given = {} if "regions" in settings else {"k": 1}
    return fxprune.compress(model.eval(), loader, recipe=brief(), progress=False, **given, **settings)


def shapes(value: Any) -> Any:
    """The shapes of a network's answer, in its own structure."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(item) for key, item in value.items()}
    return [shapes(item) for item in value] if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def assert_same_answers(one: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> None:
    wanted, found = (network(*args, **kwargs) for network in (one, other))
    assert type(found) is type(wanted) or isinstance(found, dict)  # an OrderedDict comes back as a dict
    assert shapes(found) == shapes(wanted)


BACKBONE: dict[str, Any] = {
    "embedding_size": 8,
    "layer_type": "basic",
    "hidden_sizes": [8, 16],
    "depths": [2, 2],
    "out_features": ["stage1", "stage2"],
}


def _backbone() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(**BACKBONE)


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_backbone(),
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        num_labels=2,
    )
    return DetrForObjectDetection(config)


def _rt_detr() -> nn.Module:
    from transformers import RTDetrResNetBackbone, RTDetrResNetConfig

    return RTDetrResNetBackbone(RTDetrResNetConfig(**BACKBONE))


def _auto_backbone() -> nn.Module:
    from transformers import AutoBackbone

    model: nn.Module = AutoBackbone.from_config(_backbone())
    return model


def _depth_anything() -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    stages = [f"stage{number}" for number in (1, 2)]
    dinov2 = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        out_features=stages,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=dinov2,
        patch_size=8,
        reassemble_hidden_size=16,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return DepthAnythingForDepthEstimation(config)


HUGGING_FACE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "detr": (_detr, {"regions": ["model.decoder.layers.0"]}),
    "part of detr": (_detr, {"submodule": "model.backbone"}),
    "rt-detr": (_rt_detr, {}),
    "autobackbone": (_auto_backbone, {}),
    "depth anything": (_depth_anything, {"regions": ["backbone.encoder.layer.1"]}),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_detectors_backbones_and_depth_of_hugging_face(family: str) -> None:
    need("transformers")
    build, settings = HUGGING_FACE[family]
    model, loader = build(), labelled()
    small = compressed(model, loader, **settings)
    assert len(fxprune.report(small).plan.chosen) == 1
    assert_same_answers(model, small, pixel_values=loader[0]["pixel_values"])
    assert (type(small) is type(model)) == ("submodule" in settings)


SEGMENTERS = {
    "lraspp_mobilenet_v3_large": ["backbone.8"],
    "deeplabv3_mobilenet_v3_large": ["backbone.8"],
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_of_torchvision(name: str) -> None:
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    loader = [(torch.randn(4, 3, 64, 64), torch.zeros(4, 64, 64))]
    small = compressed(model, loader, regions=SEGMENTERS[name])
    assert_same_answers(model, small, loader[0][0])


@pytest.mark.parametrize("name", ["FPN", "DeepLabV3Plus"])
def test_segmenters_of_segmentation_models_pytorch(name: str) -> None:
    need("segmentation_models_pytorch")
    import segmentation_models_pytorch as smp

    model = getattr(smp, name)("resnet34", encoder_weights=None, classes=3)
    loader = [{"image": torch.randn(4, 3, 64, 64), "mask": torch.zeros(4, 64, 64)}]
    small = compressed(model, loader, regions=["encoder.layer3.1", "encoder.layer3.2"])
    assert_same_answers(model, small, loader[0]["image"])


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        (
            "maxvit_tiny_tf_224",
            {"depths": (2, 1), "embed_dim": (32, 32), "stem_width": 8, "img_size": 64},
            64,
        ),
        ("efficientformer_l1", {"depths": (2, 1, 1, 1), "embed_dims": (8, 16, 24, 32)}, 224),
        ("fastvit_t8", {"layers": (2, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}, 64),
        ("vit_small_patch16_224", {"depth": 2, "img_size": 32}, 32),
    ],
)
def test_further_families_of_timm(name: str, options: dict[str, Any], size: int) -> None:
    need("timm")
    import timm

    model = timm.create_model(name, num_classes=5, **options)
    loader = [torch.randn(4, 3, size, size)]
    small = compressed(model, loader)
    assert fxprune.report(small).plan.chosen
    assert_same_answers(model, small, loader[0])


class Residual(nn.Module):
    """A residual block in one, two or three dimensions."""

    def __init__(self, dimensions: int, width: int = 8) -> None:
        super().__init__()
        kind, norm = (getattr(nn, f"{name}{dimensions}d") for name in ("Conv", "BatchNorm"))
        self.first, self.norm = kind(width, width, 3, padding=1), norm(width)
        self.second = kind(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.norm(self.first(x)).relu())).relu()


class Signals(nn.Module):
    """A one-dimensional ResNet, as for electrocardiograms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(12, 8, 7, stride=2, padding=3)
        self.body = nn.Sequential(Residual(1), Residual(1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean(2))


def test_one_dimensional_networks() -> None:
    model, loader = Signals(), [(torch.randn(4, 12, 64), torch.zeros(4))] * 2
    small = compressed(model, loader)
    assert fxprune.report(small).fold_error is not None
    assert_same_answers(model, small, loader[0][0])


def test_video_networks_of_torchvision() -> None:
    kinds = models.video.resnet
    model = kinds.VideoResNet(
        kinds.BasicBlock, [kinds.Conv3DSimple] * 4, [2, 1, 1, 1], kinds.BasicStem, num_classes=5
    )
    loader = [torch.randn(4, 3, 4, 16, 16)]
    small = compressed(model, loader)
    assert fxprune.report(small).plan.chosen[0] in ("layer1.0", "layer1.1")
    assert_same_answers(model, small, loader[0])


class Stereo(nn.Module):
    """Finds shifts between two images of one encoder in a volume of costs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(2), Residual(2))
        self.costs = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), Residual(3, 4), nn.Conv3d(4, 1, 3, padding=1)
        )

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        left, right = self.encoder(left), self.encoder(right)
        costs = torch.stack([(left * right.roll(shift, 3)).mean(1) for shift in range(4)], 1)
        volume = self.costs(costs.unsqueeze(1)).squeeze(1).softmax(1)
        return {"disparity": (volume * torch.arange(4).view(1, 4, 1, 1)).sum(1)}


def test_stereo_networks_whose_batches_hold_the_answer_too() -> None:
    loader = [{name: torch.randn(4, 3, 16, 16) for name in ("left", "right", "disparity")}]
    model = Stereo()
    found = fxprune.discover(fxprune.trace(model, {name: loader[0][name] for name in ("left", "right")}))
    labels = [region.label for region in found.regions]
    assert labels == ["encoder.1#all", "encoder.2#all", "costs.1"]
    small = compressed(model, loader, regions=["encoder.1#all", "costs.1"])
    assert_same_answers(model, small, left=loader[0]["left"], right=loader[0]["right"])


def test_networks_of_data_parallel_processes_are_compressed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        small = compressed(nn.parallel.DistributedDataParallel(tiny()), images())
    finally:
        dist.destroy_process_group()
    plain = compressed(tiny(), images())
    with torch.no_grad():
        assert torch.equal(small(images(2)), plain(images(2)))
