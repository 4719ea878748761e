"""Networks that users bring and that published pruning code refuses, each through the whole of `compress`.

    python -m benchmarks.claims.user_models [--only retinanet_resnet50_fpn,hugging_face_vit]

Parts of torchvision's detectors and of RAFT, a torchvision ViT, a Hugging Face ViT, and with the extra `test-users` the
families of Hugging Face, Ultralytics, timm and segmentation-models-pytorch, whose cuts are chosen by FLOPs, for
which needs no clock. Weights and images are random, so accuracy means nothing here; what counts is that two regions
are cut, that the result runs, that its ONNX file agrees with torch, and what time it saves. Few iterations are enough.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torchvision import models

import fxprune
from benchmarks.common import options
from benchmarks.common.tables import print_rows
from fxprune.options import RECIPES, Recipe
from fxprune.processes.threads import using_threads

__all__ = ["USERS", "UserModel", "main"]

ITERATIONS = 4
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


def _on_hugging_face(name: str, size: int, **values: Any) -> UserModel:
    """With labels in the batches, as the loaders of such networks have them."""
    return UserModel(
        partial(_transformers, name, **values),
        lambda: [
            {"pixel_values": batch, "labels": torch.zeros(4, dtype=torch.long)}
            for batch in torch.rand(4, 4, 3, size, size)
        ],
        None,
        BY_FLOPS,
        lambda model, batch: model(pixel_values=batch["pixel_values"]),
    )


def _ultralytics(name: str) -> nn.Module:
    from ultralytics import YOLO

    model: nn.Module = YOLO(f"{name}.yaml").model
    return model


def _timm(name: str, **values: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **values)
    return model


def _unet(encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = smp.Unet(encoder, encoder_weights=None)
    return model


def _on_images(build: Callable[[], nn.Module], size: int) -> UserModel:
    return UserModel(
        build,
        lambda: list(torch.rand(4, 4, 3, size, size)),
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
    "yolov8n": _on_images(partial(_ultralytics, "yolov8n"), 128),
    "yolo11n": _on_images(partial(_ultralytics, "yolo11n"), 128),
    "yolov8n-cls": _on_images(partial(_ultralytics, "yolov8n-cls"), 128),
    "timm_resnet18_features": _on_images(partial(_timm, "resnet18", features_only=True), 96),
    "timm_mobilevit_s": _on_images(partial(_timm, "mobilevit_s"), 96),
    "timm_fastvit_t8": _on_images(partial(_timm, "fastvit_t8"), 96),
    "timm_efficientnet_b0": _on_images(partial(_timm, "efficientnet_b0"), 96),
    "smp_unet_resnet34": _on_images(partial(_unet, "resnet34"), 96),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    defaults = {"k": 2, "threads": torch.get_num_threads(), "seed": 0, "out": None}
    parser = options.parser("user_models", __doc__, **defaults)
    parser.add_argument("--only", type=options.words, default=tuple(USERS), help=f"of {','.join(USERS)}")
    arguments = options.parse(parser, argv)
    with using_threads(arguments.threads):
        kept = options.result_file(
            arguments, "user_models", options.settings_of(arguments, basis=("k", "seed"))
        )
        for name in arguments.only:
            torch.manual_seed(arguments.seed)
            figures = kept.once(name, partial(compress_and_run, USERS[name], arguments.k, arguments.seed))
            print(f"{name}: without {', '.join(figures['chosen'])}", flush=True)
    _print(kept.entries)


def recipe() -> Recipe:
    """The default recipe, cut down to a few iterations."""
    fast = RECIPES["fast"]
    return dataclasses.replace(
        fast,
        adaptor=dataclasses.replace(fast.adaptor, iterations=ITERATIONS, batch_size=4),
        mimic=dataclasses.replace(fast.mimic, iterations=ITERATIONS, batch_size=4),
    )


def compress_and_run(user: UserModel, k: int, seed: int) -> dict[str, Any]:
    """Compress a network, run it, export what was compressed and measure it.

    Raises:
        FxpruneError: A stage refused the network, or the exported file disagrees with torch.
        MeasurementError: The latency in the report was not measured.
    """
    model, loader = user.build().eval(), user.loader()
    begun = time.perf_counter()
    small = fxprune.compress(
        model,
        loader,
        k=k,
        recipe=recipe(),
        submodule=user.submodule,
        seed=seed,
        progress=False,
        **user.settings,
    )
    seconds = time.perf_counter() - begun
    made = fxprune.report(small)
    latency = made.latency
    with torch.inference_mode():
        user.call(small, loader[0])
    part = small if user.submodule is None else small.get_submodule(user.submodule)
    with tempfile.TemporaryDirectory() as folder:
        record = fxprune.export_onnx(part, Path(folder) / "part.onnx")
    exported = any(isinstance(node.target, OpOverload) for node in _graph_of(part).graph.nodes)
    return {
        "part": user.submodule or "",
        "front_end": "export" if exported else "fx",
        "regions": len(made.plan.scores),
        "chosen": list(made.plan.chosen),
        "parameters": made.parameters,
        "ratio": latency.ratio,
        "interval": dataclasses.asdict(latency.interval),
        "fold_error": made.fold_error,
        "onnx_max_abs_diff": record.max_abs_diff,
        "seconds": seconds,
        "notes": list(made.notes),
    }


def _graph_of(part: nn.Module) -> fx.GraphModule:
    return next(module for module in part.modules() if isinstance(module, fx.GraphModule))


def _print(entries: Mapping[str, Any]) -> None:
    rows = [
        {"network": name, **row, "low": row["interval"]["low"], "high": row["interval"]["high"]}
        for name, row in entries.items()
    ]
    names = {
        "network": "network",
        "part": "part",
        "front end": "front_end",
        "regions": "regions",
        "cut": "chosen",
    }
    latency = {"latency ratio": "ratio", "95 % from": "low", "to": "high"}
    print_rows(rows, {**names, **latency, "fold": "fold_error", "onnx": "onnx_max_abs_diff", "s": "seconds"})


if __name__ == "__main__":
    main()
