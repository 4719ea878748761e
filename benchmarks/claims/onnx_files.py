"""ONNX files as networks: what both of PyTorch's exporters write of many families, and files that others made.

    python -m benchmarks.claims.onnx_files [--only resnet18,swin_t] [--folder FILES] [--size 320]

A few networks are exported in all three ways, the others in one each, in turn. Each file is read by `from_onnx`, one
region is cut, and what is left is written as ONNX again and compared with torch; a file that is refused has the reason
in its row. Weights are random, constants among them stirred, and iterations few, so accuracy and times mean nothing
here. Most networks need the extra `test-users`. With `--folder`, the ONNX files in a folder, whoever made them, are
tried in place of those, height and width as `--size` says where a file leaves them free.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

import fxprune
from benchmarks.claims.coverage import stir
from benchmarks.claims.user_models import USERS, recipe
from benchmarks.common import options
from benchmarks.common.tables import print_rows
from fxprune.building.file import inputs_of, parse
from fxprune.errors import FxpruneError
from fxprune.export.messages import innermost
from fxprune.processes.threads import using_threads
from fxprune.sources.networks import onnx_inputs

__all__ = ["NETWORKS", "WAYS", "main"]

WAYS = ("dynamo", "torchscript", "torchscript, one image")
"""How a network is exported: with a free batch size by either exporter, and for one image as many files are."""
_TORCHVISION = (
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1",
    "swin_t", "swin_v2_t", "vgg11",
)  # fmt: skip
_TIMM = (
    "convnextv2_atto", "cait_xxs24_224", "deit_tiny_patch16_224", "edgenext_xx_small", "fastvit_t8", "ghostnet_050",
    "hgnetv2_b0", "maxvit_rmlp_pico_rw_256", "mixer_s32_224", "mobilenetv4_conv_small", "mobilevit_xxs", "nfnet_l0",
    "poolformer_s12", "pvt_v2_b0", "repvit_m0_9", "starnet_s1", "vit_tiny_patch16_224",
)  # fmt: skip
_USERS = ("hf_resnet", "hf_convnextv2", "hf_swinv2", "hf_segformer", "hf_dinov2", "smp_unet_resnet34")
_YOLO = ("yolov8n", "yolo11n", "yolov8n-cls")

_IN_ALL_WAYS = ("mobilenet_v3_small", "resnet18", "swin_t", "vit_tiny_patch16_224", "yolov8n")


def _torchvision(name: str) -> nn.Module:
    settings = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = models.get_model(name, weights=None, **settings)
    return network


def _segmenter() -> nn.Module:
    network: nn.Module = models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    return network


def _vision_transformer() -> nn.Module:
    network: nn.Module = models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=10)
    nn.init.normal_(network.get_parameter("heads.head.weight"), std=0.02)  # zeros would hide every difference
    return network


def _timm(name: str) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name)
    return network


def _user(name: str) -> nn.Module:
    return USERS[name].build()


def _yolo(name: str) -> nn.Module:
    network = _user(name)
    for module in network.modules():
        if hasattr(module, "export"):
            vars(module)["export"] = True  # as Ultralytics' own exporter sets it
    return network


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (partial(_torchvision, name), 224) for name in _TORCHVISION},
    "vision_transformer": (_vision_transformer, 32),
    "deeplabv3_mobilenet_v3_large": (_segmenter, 128),
    **{name: (partial(_timm, name), 256 if name.endswith("256") else 224) for name in _TIMM},
    **{name: (partial(_user, name), 64 if name == "hf_swinv2" else 96) for name in _USERS},
    **{name: (partial(_yolo, name), 128) for name in _YOLO},
}
"""Each with the height and width of its images."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the table and leaves JSON in `benchmarks/results/`."""
    defaults = {"threads": torch.get_num_threads(), "seed": 0, "out": None}
    parser = options.parser("onnx_files", __doc__, **defaults)
    parser.add_argument(
        "--only", type=options.words, default=tuple(NETWORKS), help=f"of {','.join(NETWORKS)}"
    )
    parser.add_argument("--folder", type=Path, help="ONNX files to try in place of exported ones")
    parser.add_argument(
        "--size", type=_sides, default=(224, 224), help="of their images, such as 224 or 48x320"
    )
    arguments = options.parse(parser, argv)
    name = "onnx_files" if arguments.folder is None else "onnx_files_of_others"
    with using_threads(arguments.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters have much to say
        kept = options.result_file(arguments, name, options.settings_of(arguments, "size", basis=("seed",)))
        for file, make in _work(arguments.only, arguments.folder, arguments.size).items():
            row = kept.once(file, make)
            print(f"{file}: {row['refused'] or row['regions']}", flush=True)
    rows = [{"file": file, **row} for file, row in kept.entries.items()]
    figures = ("made_by", "regions", "cut", "onnx_max_abs_diff", "seconds", "refused")
    print_rows(rows, {"file": "file", **{figure.replace("_", " "): figure for figure in figures}})


def _sides(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _work(
    only: Sequence[str], folder: Path | None, size: tuple[int, int]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What makes each row, by its name."""
    if folder is None:
        return {f"{name}, {way}": partial(_export_and_try, name, way) for name in only for way in _ways(name)}
    files = sorted(folder.rglob("*.onnx"))
    return {str(file.relative_to(folder)): partial(read_cut_and_write, file, size) for file in files}


def _ways(name: str) -> Sequence[str]:
    turn = list(NETWORKS).index(name) % len(WAYS)
    return WAYS if name in _IN_ALL_WAYS else WAYS[turn : turn + 1]


@torch.no_grad()
def _stir(network: nn.Module, images: Tensor) -> None:
    """Keeps answers from vanishing, as those of new networks do: where all are small, none is wrong."""
    stir(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train().momentum = 1.0  # it takes over the statistics of these images
    network(images)
    network.eval()


def _export_and_try(name: str, way: str) -> dict[str, Any]:
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    network, free, images = build().eval(), way != WAYS[2], torch.randn(2, 3, size, size)
    _stir(network, images)
    images = images if free else images[:1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.onnx")
        try:
            if way == "dynamo":
                batch = ({0: torch.export.Dim("batch")},)
                torch.onnx.export(
                    network,
                    (images,),
                    file,
                    dynamo=True,
                    dynamic_shapes=batch,
                    external_data=False,
                    verbose=False,
                )
            else:
                axes = {"images": {0: "batch"}} if free else None
                torch.onnx.export(
                    network,
                    (images,),
                    file,
                    dynamo=False,
                    input_names=["images"],
                    dynamic_axes=axes,
                    opset_version=17,
                )
        except Exception as error:  # exporters raise whatever they stumble over
            return _row(refused=f"torch's exporter: {str(error).strip().splitlines()[0]}")
        return read_cut_and_write(file, (size, size))


def read_cut_and_write(file: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Reads a file, cuts the first region that can be cut, and writes what is left; a refusal is part of the row."""
    begun = time.perf_counter()
    made = _row()
    try:
        model = parse(file)
        made["made_by"] = f"{model.producer_name} {model.producer_version}".strip()
        shapes = [
            (2, *(own or side for own, side in zip(entry.shape[1:], (3, *size), strict=False)))
            for entry in inputs_of(model, file)
        ]
        network, batch = fxprune.from_onnx(file, input_shapes=shapes), onnx_inputs(file, shapes=shapes)
        found = fxprune.discover(fxprune.trace(network, batch))
        made["regions"] = len(found.regions)
        if found.regions:
            first = found.regions[0].label
            small = fxprune.compress(
                network,
                [batch],
                regions=[first],
                recipe=recipe(),
                cost="flops",
                latency_batch=1,
                progress=False,
            )
            with tempfile.TemporaryDirectory() as folder:
                record = fxprune.export_onnx(small, Path(folder, "small.onnx"))
            made |= {"cut": first, "onnx_max_abs_diff": record.max_abs_diff}
    except FxpruneError as error:
        made["refused"] = str(error).replace(str(file), "it")
    except Exception as error:  # a defect, and no reason to leave out the files behind it
        made["refused"] = f"a defect: {innermost(error)}"
    return made | {"seconds": time.perf_counter() - begun}


def _row(refused: str = "") -> dict[str, Any]:
    return {"made_by": "pytorch", "regions": None, "cut": "", "onnx_max_abs_diff": None, "refused": refused}


if __name__ == "__main__":
    main()
