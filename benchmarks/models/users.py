"""Networks that users bring, at small sizes and with random weights, and how each is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

__all__ = ["USERS", "UserModel"]

BY_FLOPS = {"latency_batch": 1, "cost": "flops"}
TRANSFORMER = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 96,
    "patch_size": 16,
}


@dataclass(frozen=True)
class UserModel:
    """One network and how it is called.

    Attributes:
        build: Makes the whole model.
        loader: Makes its calibration batches.
        submodule: The part to compress, None for the whole.
        settings: Further arguments of `compress`.
        call: Runs the whole model on a loader's batch.
    """

    build: Callable[[], nn.Module]
    loader: Callable[[], list[Any]]
    submodule: str | None
    settings: Mapping[str, Any]
    call: Callable[[nn.Module, Any], Any]


def _detector(name: str) -> nn.Module:
    small = {} if name.startswith("ssd") else {"min_size": 256, "max_size": 256}
    model: nn.Module = models.get_model(name, weights=None, weights_backbone=None, **small)
    return model


def _pictures(size: int, images: int) -> list[Any]:
    """Batches of two pictures and their (empty) targets, as detectors' loaders give them."""
    return [(list(pair), [{}] * 2) for pair in torch.rand(images // 2, 2, 3, size, size)]


def _vision_transformer() -> nn.Module:
    model: nn.Module = models.vit_b_32(weights=None)
    head = model.get_submodule("heads.head")
    assert isinstance(head, nn.Linear)
    # zeros, as torchvision has them, would hide every difference
    nn.init.normal_(head.weight, std=0.02)
    return model


def _hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=224
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def _transformers(name: str, **values: Any) -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, name)(getattr(transformers, _config_of(name))(**values))
    return model


def _config_of(name: str) -> str:
    family = re.match(r"(.+?)(For|VisionModel|Backbone)", name)
    assert family is not None
    return f"{family[1]}{'Vision' if family[2] == 'VisionModel' else ''}Config"


def _with_labels(build: Callable[[], nn.Module], size: int, part: str | None = None) -> UserModel:
    """With labels in the batches, as the loaders of Hugging Face's networks have them."""
    return UserModel(
        build,
        lambda: [
            {"pixel_values": batch, "labels": torch.zeros(4, dtype=torch.long)}
            for batch in torch.rand(4, 4, 3, size, size)
        ],
        part,
        BY_FLOPS,
        lambda model, batch: model(pixel_values=batch["pixel_values"]),
    )


def _on_hugging_face(name: str, size: int, **values: Any) -> UserModel:
    return _with_labels(partial(_transformers, name, **values), size)


def _resnet_config() -> Any:
    from transformers import ResNetConfig

    stages = ["stage2", "stage3", "stage4"]
    return ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], out_features=stages)


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet_config(),
        encoder_layers=2,
        decoder_layers=2,
        d_model=64,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=20,
    )
    model: nn.Module = DetrForObjectDetection(config)
    return model


def _auto_backbone() -> nn.Module:
    from transformers import AutoBackbone

    model: nn.Module = AutoBackbone.from_config(_resnet_config())
    return model


def _depth_anything() -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    stages = [f"stage{number}" for number in (3, 4, 5, 6)]
    backbone = Dinov2Config(
        **{**TRANSFORMER, "patch_size": 14, "image_size": 98},
        out_features=stages,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=TRANSFORMER["hidden_size"],
        neck_hidden_sizes=[24, 48, 96, 192],
        fusion_hidden_size=32,
    )
    model: nn.Module = DepthAnythingForDepthEstimation(config)
    return model


def _ultralytics(name: str) -> nn.Module:
    from ultralytics import YOLO

    model: nn.Module = YOLO(f"{name}.yaml").model
    return model


def _timm(name: str, **values: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **values)
    return model


def _smp(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = getattr(smp, name)("resnet34", encoder_weights=None)
    return model


def _segmenter(name: str) -> nn.Module:
    model: nn.Module = models.get_model(name, weights=None, weights_backbone=None)
    return model


class _Residual(nn.Module):
    """A residual block in one, two or three dimensions."""

    def __init__(self, dimensions: int, width: int) -> None:
        super().__init__()
        convolution, norm = (getattr(nn, f"{name}{dimensions}d") for name in ("Conv", "BatchNorm"))
        self.first, self.norm = convolution(width, width, 3, padding=1), norm(width)
        self.second = convolution(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.second(self.norm(self.first(x)).relu())
        return (x + branch).relu()


class _Signals(nn.Module):
    """A one-dimensional ResNet, as for electrocardiograms of twelve leads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(12, 64, 15, stride=4, padding=7)
        self.body = nn.Sequential(*(_Residual(1, 64) for _ in range(5)))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.stem(x)).mean(2))
        return scores


class _Stereo(nn.Module):
    """Finds shifts between two images, which share an encoder, in a volume of costs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), *(_Residual(2, 32) for _ in range(4))
        )
        self.costs = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), _Residual(3, 8), _Residual(3, 8), nn.Conv3d(8, 1, 3, padding=1)
        )

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        left, right = self.encoder(left), self.encoder(right)
        costs = torch.stack([(left * right.roll(shift, 3)).mean(1) for shift in range(8)], 1)
        likely = self.costs(costs.unsqueeze(1)).squeeze(1).softmax(1)
        return {"disparity": (likely * torch.arange(8).view(1, 8, 1, 1)).sum(1)}


def _on_images(build: Callable[[], nn.Module], *size: int) -> UserModel:
    """On inputs of a shape; of a square image one side is enough."""
    shape = (3, size[0], size[0]) if len(size) == 1 else size
    return UserModel(
        build,
        lambda: list(torch.rand(4, 4, *shape)),
        None,
        BY_FLOPS,
        lambda model, batch: model(batch),
    )


def _of_first(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def _on_detector(
    name: str, part: str, size: int, images: int, kinds: tuple[str, ...] = ("identity",)
) -> UserModel:
    return UserModel(
        partial(_detector, name),
        partial(_pictures, size, images),
        part,
        {"kinds": kinds, "latency_batch": 1},
        _of_first,
    )


USERS: Mapping[str, UserModel] = {
    "fasterrcnn_resnet50_fpn": _on_detector("fasterrcnn_resnet50_fpn", "backbone.body", 256, 16),
    "retinanet_resnet50_fpn": _on_detector("retinanet_resnet50_fpn", "backbone.body", 256, 16),
    "ssd300_vgg16": _on_detector("ssd300_vgg16", "backbone", 300, 4, ("identity", "sequential")),
    "raft_small": UserModel(
        lambda: models.optical_flow.raft_small(weights=None),
        lambda: list(torch.rand(4, 2, 2, 3, 128, 128)),
        "feature_encoder",
        {"input_fn": tuple, "latency_batch": 2},
        lambda model, frames: model(*frames),
    ),
    "vit_b_32": UserModel(
        _vision_transformer,
        lambda: list(torch.rand(2, 8, 3, 224, 224)),
        None,
        {"latency_batch": 1},
        lambda model, batch: model(batch),
    ),
    "hugging_face_vit": UserModel(
        _hugging_face,
        lambda: [{"pixel_values": batch} for batch in torch.rand(4, 4, 3, 224, 224)],
        None,
        {"latency_batch": 1},
        lambda model, batch: model(**batch),
    ),
    "hf_resnet": _on_hugging_face(
        "ResNetForImageClassification", 96, layer_type="basic", depths=[2, 2, 2, 2]
    ),
    "hf_convnextv2": _on_hugging_face("ConvNextV2ForImageClassification", 96),
    "hf_swinv2": _on_hugging_face("Swinv2ForImageClassification", 64, image_size=64, window_size=4),
    "hf_segformer": _on_hugging_face("SegformerForImageClassification", 96),
    "hf_dinov2": _on_hugging_face("Dinov2ForImageClassification", 96, **TRANSFORMER),
    "hf_clip": _on_hugging_face("CLIPVisionModel", 96, **TRANSFORMER),
    "hf_siglip": _on_hugging_face("SiglipVisionModel", 96, **TRANSFORMER),
    "hf_detr": _with_labels(_detr, 96),
    "hf_detr_backbone": _with_labels(_detr, 96, "model.backbone"),
    "hf_rt_detr_backbone": _on_hugging_face(
        "RTDetrResNetBackbone", 96, layer_type="basic", depths=[2, 2, 2, 2]
    ),
    "hf_autobackbone": _with_labels(_auto_backbone, 96),
    "hf_depth_anything": _with_labels(_depth_anything, 98),
    "yolov8n": _on_images(partial(_ultralytics, "yolov8n"), 128),
    "yolo11n": _on_images(partial(_ultralytics, "yolo11n"), 128),
    "yolo11n-seg": _on_images(partial(_ultralytics, "yolo11n-seg"), 128),
    "yolov8n-cls": _on_images(partial(_ultralytics, "yolov8n-cls"), 128),
    "timm_resnet18_features": _on_images(partial(_timm, "resnet18", features_only=True), 96),
    "timm_mobilevit_s": _on_images(partial(_timm, "mobilevit_s"), 96),
    "timm_fastvit_t8": _on_images(partial(_timm, "fastvit_t8"), 96),
    "timm_efficientnet_b0": _on_images(partial(_timm, "efficientnet_b0"), 96),
    "timm_maxvit_nano": _on_images(partial(_timm, "maxvit_nano_rw_256", img_size=64), 64),
    "timm_efficientformer_l1": _on_images(partial(_timm, "efficientformer_l1"), 224),
    "timm_vit_small": _on_images(partial(_timm, "vit_small_patch16_224", img_size=96, depth=6), 96),
    "smp_unet_resnet34": _on_images(partial(_smp, "Unet"), 96),
    "smp_fpn_resnet34": _on_images(partial(_smp, "FPN"), 96),
    "smp_deeplabv3plus_resnet34": _on_images(partial(_smp, "DeepLabV3Plus"), 96),
    "lraspp_mobilenet_v3_large": _on_images(partial(_segmenter, "lraspp_mobilenet_v3_large"), 96),
    "deeplabv3_mobilenet_v3_large": _on_images(partial(_segmenter, "deeplabv3_mobilenet_v3_large"), 96),
    "r3d_18": _on_images(lambda: models.video.r3d_18(weights=None), 3, 4, 32, 32),
    "signals_resnet": _on_images(_Signals, 12, 1000),
    "stereo": UserModel(
        _Stereo,
        lambda: [
            {"left": left, "right": right, "disparity": torch.zeros(4, 32, 32)}
            for left, right in torch.rand(4, 2, 4, 3, 64, 64)
        ],
        None,
        BY_FLOPS,
        lambda model, batch: model(left=batch["left"], right=batch["right"]),
    ),
}
