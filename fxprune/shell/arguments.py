"""The shell's arguments: one function a command, and the types that check single values."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, get_args

from fxprune.graph.regions import Kind
from fxprune.options import RECIPES, Backend, Criterion, Selection

__all__ = ["MOST_VALUES", "add_compress", "add_demo", "add_inspect", "add_measure", "add_sweep"]

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

MOST_VALUES = 2**28
"""Values in one input: a GiB of float32."""

_MODEL = "torchvision:NAME, timm:NAME, path/to/file.py:factory, a .pt2 file, or the folder of one"
_KINDS = tuple(kind.value for kind in Kind)
_BACKENDS, _SELECTIONS = get_args(Backend), get_args(Selection)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{value} does not lie between {least} and {most}")
    return value


_positive = partial(_whole, least=1, most=2**31 - 1)
_size = partial(_whole, least=1, most=4096)
_seed = partial(_whole, least=0, most=2**63 - 2)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(_positive(part) for part in text.split(","))
    if math.prod(shape) > MOST_VALUES:
        raise argparse.ArgumentTypeError(f"{text} holds more than {MOST_VALUES} values")
    return shape


def _channels(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, as in 0.5,0.5,0.5") from None
    return red, green, blue


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; for this folder give .")
    return text


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown kind {unknown[0]!r}: choose from {', '.join(_KINDS)}")
    return kinds


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--weights", type=_path, metavar="FILE", help="checkpoint: .safetensors, .pt, .pth")
    parser.add_argument("--size", type=_size, default=224, help="image height and width (224)")
    parser.add_argument(
        "--kinds", type=_kinds, default=("identity",), help=f"kinds of region: {','.join(_KINDS)} (identity)"
    )
    parser.add_argument(
        "--ignore",
        type=lambda text: text.split(","),
        action="extend",
        default=[],
        metavar="PATTERN",
        help="regions to leave alone; several with commas, or the option again",
    )


def add_demo(commands: Commands) -> argparse.ArgumentParser:
    """Arguments of `fxprune demo`."""
    parser = commands.add_parser("demo", help="train, compress and measure on real digits")
    parser.add_argument(
        "--out", type=_path, default="fxprune-demo", metavar="DIR", help="where results go (fxprune-demo)"
    )
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--threads", type=_positive, help="CPU threads (torch's choice)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser


def add_inspect(commands: Commands) -> argparse.ArgumentParser:
    """Arguments of `fxprune inspect`."""
    parser = commands.add_parser("inspect", help="list what can be cut, and why the rest not")
    _add_model(parser)
    parser.add_argument("--input-shape", type=_shape, metavar="1,3,224,224", help="in place of --size")
    parser.add_argument("--front-end", choices=("auto", "fx", "export"), default="auto")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=_path, required=True, metavar="IMAGES/", help="folder of images; labels are not used"
    )
    parser.add_argument("--images", type=_positive, default=500, help="calibration images to draw (500)")
    parser.add_argument("--mean", type=_channels, default=_IMAGENET_MEAN, metavar="R,G,B")
    parser.add_argument("--std", type=_channels, default=_IMAGENET_STD, metavar="R,G,B")


def _add_scoring(parser: argparse.ArgumentParser, selections: tuple[str, ...]) -> None:
    """What decides about scores, for `compress` and `sweep` alike."""
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="fast")
    parser.add_argument("--criterion", choices=get_args(Criterion), default="recovery")
    parser.add_argument("--selection", choices=selections, help="how sets are chosen (as the recipe says)")
    parser.add_argument(
        "--backend", choices=_BACKENDS, default="torch", help="where latency is measured (torch)"
    )
    parser.add_argument(
        "--latency-batch", type=_positive, metavar="N", help="batch size of the latency measured"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--tap", metavar="NODE", help="node where features are compared (found in the graph)")
    parser.add_argument(
        "--cache-mib", type=_positive, default=2048, metavar="N", help="memory for activations (2048)"
    )
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--threads", type=_positive, help="CPU threads (torch's choice)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def add_compress(commands: Commands) -> argparse.ArgumentParser:
    """Arguments of `fxprune compress`."""
    parser = commands.add_parser("compress", help="cut, recover, export")
    _add_model(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--k", type=_positive, help="how many regions to cut")
    goal.add_argument("--target-speedup", type=float, metavar="X", help="for instance 1.3")
    goal.add_argument("--target-latency-ms", type=float, metavar="T")
    parser.add_argument(
        "--min-agreement", type=float, metavar="F", help="least top-1 agreement with the original"
    )
    parser.add_argument(
        "--out",
        type=_path,
        metavar="OUT/",
        help="write original.onnx, model.onnx, model.pt2, model.safetensors and report.json there; "
        "a run that was interrupted goes on from the scores it kept there",
    )
    parser.add_argument(
        "--submodule", metavar="PATH", help="compress this part of the network only; files hold the part"
    )
    _add_data(parser)
    _add_scoring(parser, _SELECTIONS)
    return parser


def add_sweep(commands: Commands) -> argparse.ArgumentParser:
    """Arguments of `fxprune sweep`."""
    parser = commands.add_parser("sweep", help="latency and recovery loss for every number of cuts")
    _add_model(parser)
    parser.add_argument(
        "--out", type=_path, metavar="OUT/", help="write sweep.json and sweep.svg there, and keep scores"
    )
    _add_data(parser)
    _add_scoring(parser, tuple(name for name in _SELECTIONS if name != "exact"))
    return parser


def add_measure(commands: Commands) -> argparse.ArgumentParser:
    """Arguments of `fxprune measure`."""
    parser = commands.add_parser("measure", help="time two ONNX files alternately")
    parser.add_argument("before", metavar="BEFORE.onnx")
    parser.add_argument("after", metavar="AFTER.onnx")
    parser.add_argument("--backend", choices=_BACKENDS[1:], default="onnxruntime-cpu")
    parser.add_argument("--batch", type=_positive, metavar="N", help="batch size (the file's, or 1)")
    parser.add_argument(
        "--input-shape", type=_shape, action="append", default=[], metavar="1,3,224,224", help="one an input"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads (torch's choice)")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="rounds (until the interval is narrow)")
    return parser
