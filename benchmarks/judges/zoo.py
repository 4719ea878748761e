"""The networks of the coverage table: every torchvision builder, the smallest model of every timm module."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.judges.hooked_reference import Inputs, call

__all__ = ["Case", "cases"]

SIZES = (64, 96, 128, 160, 192, 224, 256)
BATCH = 2
# Submodules of detectors and optical flow that are networks by themselves, by the start of the name.
PARTS = {
    "fasterrcnn": "backbone.body",
    "maskrcnn": "backbone.body",
    "keypointrcnn": "backbone.body",
    "retinanet": "backbone.body",
    "fcos": "backbone.body",
    "ssd300": "backbone",
    "ssdlite": "backbone",
    "raft": "feature_encoder",
}
RESIZING = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos")
SEGMENTATION = ("fcn_", "deeplabv3_", "lraspp_")
# Clips as (frames, size): S3D pools 2 x 7 x 7 after shrinking 8 x 32 x 32.
CLIPS = {
    "s3d": (16, 224),
    "mvit": (16, 224),
    "swin3d": (4, 64),
    "r3d": (4, 32),
    "mc3": (4, 32),
    "r2plus1d": (4, 32),
}
# The smallest by number of parameters among each module's small variants, timm 1.0.31.
TIMM: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "gernet_s",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mnasnet_small",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_300m",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_so150m2_patch16_reg1_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One network.

    Attributes:
        name: `torchvision:NAME` or `timm:NAME`.
        build: Makes the module to be traced, in evaluation mode, and its example inputs.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]


def cases(suite: str) -> Iterator[Case]:
    """The networks of a suite: `torchvision`, `timm` or `all`.

    Raises:
        ModuleNotFoundError: timm was asked for and is not installed.
    """
    if suite in ("torchvision", "all"):
        models = importlib.import_module("torchvision.models")
        for name in models.list_models():
            if not name.startswith("quantized_"):
                yield Case(f"torchvision:{name}", functools.partial(_torchvision, name))
    if suite in ("timm", "all"):
        timm = importlib.import_module("timm")
        for module in timm.list_modules():
            name = TIMM.get(module) or min(timm.list_models(module=module), key=len)
            yield Case(f"timm:{name}", functools.partial(_timm, name))


def _smallest(model: nn.Module, shapes: list[tuple[int, ...]]) -> Tensor:
    """The first input that the network accepts, made of noise.

    Raises:
        RuntimeError: It accepts none.
    """
    failures = []
    for shape in shapes:
        example = torch.randn(BATCH, *shape)
        try:
            with torch.no_grad():
                call(model, example.clone())
        except Exception as error:  # every network refuses small images in its own way
            failures.append(f"{shape}: {type(error).__name__}: {error}")
        else:
            return example
    raise RuntimeError(f"{type(model).__name__} accepts none of these inputs: {'; '.join(failures)}")


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    timm = importlib.import_module("timm")
    model = timm.create_model(name, pretrained=False).eval()
    cfg = model.default_cfg or {}
    channels, *own = cfg.get("input_size", (3, 224, 224))
    squares = [(channels, s, s) for s in SIZES]
    shapes = [(channels, *own)] if cfg.get("fixed_input_size") else [*squares, (channels, *own)]
    return model, _smallest(model, shapes)


def _torchvision(name: str) -> tuple[nn.Module, Inputs]:
    models = importlib.import_module("torchvision.models")
    options = _options(name)
    model = models.get_model(name, weights=None, **options).eval()
    part = next((path for start, path in PARTS.items() if name.startswith(start)), None)
    if part is not None:
        return _part(model, name, part)
    clip = next((c for start, c in CLIPS.items() if name.startswith(start)), None)
    if clip is not None:
        frames, size = clip
        return model, _smallest(model, [(3, frames, size, size)])
    sizes = (options["image_size"],) if "image_size" in options else SIZES
    return model, _smallest(model, [(3, size, size) for size in sizes])


def _options(name: str) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": 2 * int(name.rpartition("_")[2])}
    if name.startswith(RESIZING):
        return {"weights_backbone": None, "min_size": 96, "max_size": 128}
    if name.startswith((*SEGMENTATION, "ssd")):
        return {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": False}
    return {}


def _part(model: nn.Module, name: str, path: str) -> tuple[nn.Module, Inputs]:
    """A submodule with the inputs that it gets when the whole model runs on noise."""
    seen: list[tuple[Any, ...]] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        if name.startswith("raft"):
            image = torch.rand(1, 3, 128, 128)
            model(image, image.flip(-1), num_flow_updates=1)
        else:
            model([torch.rand(3, 96, 128) for _ in range(BATCH)])
    hook.remove()
    arguments = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in seen[0])
    return model.get_submodule(path), arguments if len(arguments) > 1 else arguments[0]
