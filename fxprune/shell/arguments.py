"""The shell's arguments: one function a command, and the types that check single values."""

from __future__ import annotations

import math
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from functools import partial
from typing import get_args

from fxprune.backends import BACKENDS
from fxprune.graph.regions import Kind
from fxprune.options import RECIPES, Cost, Criterion, FrontEnd, Selection
from fxprune.serving.triton_config import Accelerator, TritonSettings
from fxprune.sources.forms import FORMS, MOST_VALUES

__all__ = [
    "add_apply",
    "add_compress",
    "add_demo",
    "add_export",
    "add_inspect",
    "add_measure",
    "add_report",
    "add_sweep",
]

_KINDS = tuple(kind.value for kind in Kind)
_SELECTIONS = get_args(Selection)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value <= most:
        raise ArgumentTypeError(f"{value} does not lie between {least} and {most}")
    return value


_positive = partial(_whole, least=1, most=2**31 - 1)
_not_negative = partial(_whole, least=0, most=2**31 - 1)
_size = partial(_whole, least=1, most=4096)
_seed = partial(_whole, least=0, most=2**63 - 2)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(_positive(part) for part in text.split(","))
    if math.prod(shape) > MOST_VALUES:
        raise ArgumentTypeError(f"{text} holds more than {MOST_VALUES} values")
    return shape


def _channels(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not three numbers, as in 0.5,0.5,0.5") from None
    return red, green, blue


def _path(text: str) -> str:
    if not text:
        raise ArgumentTypeError("the path is empty; for this folder give .")
    return text


def _split(text: str) -> list[str]:
    return text.split(",")


def _of(what: str, names: Sequence[str], text: str) -> tuple[str, ...]:
    given = tuple(_split(text))
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ArgumentTypeError(f"unknown {what} {unknown[0]!r}: choose from {', '.join(names)}")
    return given


_kinds = partial(_of, "kind", _KINDS)
_backends = partial(_of, "backend", BACKENDS)


def _add_model(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=FORMS)
    add("--weights", type=_path, metavar="FILE", help="checkpoint: .safetensors, .pt, .pth")
    add("--size", type=_size, help="image height and width (what an ONNX file says, else 224)")
    kinds = f"kinds of region: {','.join(_KINDS)} (identity)"
    add("--kinds", type=_kinds, default=("identity",), help=kinds)
    add("--front-end", choices=get_args(FrontEnd), default="auto", help="how the network is captured (auto)")
    several = "regions to leave alone; several with commas, or the option again"
    add("--ignore", type=_split, action="extend", default=[], metavar="PATTERN", help=several)


def _add_threads(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=_positive, help="CPU threads (torch's choice, at most the cores that may be used)"
    )


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=0)
    _add_threads(parser)
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def _add_job(parser: ArgumentParser, selections: tuple[str, ...], out: str) -> None:
    """What `compress` and `sweep` share: the images, where results go, and what decides about scores."""
    add = parser.add_argument
    _add_model(parser)
    add("--out", type=_path, metavar="OUT/", help=out)
    add("--data", type=_path, required=True, metavar="IMAGES/", help="folder of images; labels are not used")
    labels = "labelled images to measure accuracy on: a folder for each class, in the order of the network's outputs"
    add("--labels", type=_path, metavar="LABELLED/", help=labels)
    add("--images", type=_positive, default=500, help="calibration images to draw (500)")
    add("--mean", type=_channels, default=_IMAGENET_MEAN, metavar="R,G,B")
    add("--std", type=_channels, default=_IMAGENET_STD, metavar="R,G,B")
    add("--recipe", choices=tuple(RECIPES), default="fast")
    add("--criterion", choices=get_args(Criterion), default="recovery")
    part = "this part of the network only, several with commas, or the option again; files hold the parts"
    add("--submodule", type=_split, action="extend", metavar="PATH", help=part)
    add("--cost", choices=get_args(Cost), default="latency", help="what a cut is to save (latency)")
    add("--selection", choices=selections, help="how sets are chosen (as the recipe says)")
    add("--backend", choices=BACKENDS, default="torch", help="where latency is measured (torch)")
    add("--latency-batch", type=_positive, metavar="N", help="batch size of the latency measured")
    add("--device", choices=("cpu", "cuda"))
    add("--tap", metavar="NODE", help="node where features are compared (found in the graph)")
    add("--cache-mib", type=_positive, default=2048, metavar="N", help="memory for activations (2048)")
    _add_run(parser)


def add_demo(parser: ArgumentParser) -> None:
    """Arguments of `fxprune demo`."""
    where = "where results go (fxprune-demo)"
    parser.add_argument("--out", type=_path, default="fxprune-demo", metavar="DIR", help=where)
    _add_run(parser)


def add_inspect(parser: ArgumentParser) -> None:
    """Arguments of `fxprune inspect`."""
    _add_model(parser)
    parser.add_argument("--input-shape", type=_shape, metavar="1,3,224,224", help="in place of --size")


def add_draw(parser: ArgumentParser) -> None:
    """Arguments of `fxprune draw`."""
    add_inspect(parser)
    parser.add_argument("--out", type=_path, default="network.svg", metavar="FILE", help="(network.svg)")


def add_compress(parser: ArgumentParser) -> None:
    """Arguments of `fxprune compress`."""
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--k", type=_positive, help="how many regions to cut")
    goal.add_argument("--target-speedup", type=float, metavar="X", help="for instance 1.3")
    goal.add_argument("--target-latency-ms", type=float, metavar="T")
    named = "cut exactly these regions, as inspect names them; several with commas"
    goal.add_argument("--regions", type=_split, default=SUPPRESS, metavar="LABEL", help=named)
    planned = "cut exactly the blocks of an earlier compression, from its plan.json"
    goal.add_argument("--plan", type=_path, default=SUPPRESS, metavar="FILE", help=planned)
    least = "least top-1 agreement with the original"
    parser.add_argument("--min-agreement", type=float, metavar="F", help=least)
    half = "write model.fp16.onnx too, in half precision (for GPUs; with --out)"
    parser.add_argument("--fp16", action="store_true", help=half)
    eight = "write model.int8.onnx too, in eight bits, and time it on the CPU (with --out)"
    parser.add_argument("--int8", action="store_true", help=eight)
    out = (
        "write original.onnx, model.onnx, model.pt2, model.safetensors, plan.json, report.html, report.json and "
        "recipe.json there; "
        "a run that was interrupted goes on from the scores it kept there"
    )
    _add_job(parser, _SELECTIONS, out)


def add_apply(parser: ArgumentParser) -> None:
    """Arguments of `fxprune apply`."""
    add = parser.add_argument
    add("plan", type=_path, metavar="PLAN", help="plan.json of a compression")
    add("model", metavar="MODEL", help=f"the original, with whatever weights: {FORMS}")
    weights = "weights of the compressed network (model.safetensors beside the plan)"
    add("--weights", type=_path, metavar="FILE", help=weights)
    add("--front-end", choices=get_args(FrontEnd), default="auto", help="as for the compression (auto)")
    add("--out", type=_path, required=True, metavar="OUT/", help="where the network goes, as by compress")


def add_sweep(parser: ArgumentParser) -> None:
    """Arguments of `fxprune sweep`."""
    selections = tuple(name for name in _SELECTIONS if name != "exact")
    _add_job(parser, selections, "write sweep.json and sweep.svg there, and keep scores")


def add_measure(parser: ArgumentParser) -> None:
    """Arguments of `fxprune measure`."""
    add = parser.add_argument
    add("before", metavar="BEFORE", help=f"what the others are compared with: {FORMS}")
    add("after", metavar="AFTER", nargs="+", help="likewise")
    where = f"one or several, with commas (onnxruntime-cpu): {','.join(BACKENDS)}"
    add("--backend", type=_backends, default=["onnxruntime-cpu"], metavar="BACKEND", help=where)
    add("--device", choices=("cpu", "cuda"), help="of torch's backends (cpu)")
    add("--batch", type=_positive, metavar="N", help="batch size (the file's, or 1)")
    shape = "one an input; needed where no network says what it takes"
    add("--input-shape", type=_shape, action="append", default=[], metavar="1,3,224,224", help=shape)
    _add_threads(parser)
    add("--rounds", type=_positive, metavar="N", help="rounds in a process (until the interval is narrow)")
    processes = "fresh processes, one after another, in each of which all take turns (3); 1 is this one alone"
    add("--processes", type=_positive, default=3, metavar="N", help=processes)
    loadgen = "then run MLPerf's LoadGen (SingleStream, Offline) over each, and keep what it writes there"
    add("--record", type=_path, metavar="DIR", help=loadgen)
    least = "least seconds of each of its runs (MLPerf's 600)"
    add("--record-seconds", type=_positive, default=600, metavar="S", help=least)


def add_report(parser: ArgumentParser) -> None:
    """Arguments of `fxprune report`."""
    parser.add_argument(
        "folder", type=_path, metavar="DIR", help="where compress or the demo wrote report.json"
    )
    page = "where the page goes (DIR/report.html)"
    parser.add_argument("--html", type=_path, metavar="PATH", help=page)


def add_export(parser: ArgumentParser) -> None:
    """Arguments of `fxprune export`."""
    add, settings = parser.add_argument, TritonSettings()
    add("sources", type=_path, metavar="SOURCE", nargs="+", help="folder of a compression, or ONNX files")
    repository = "Triton's model repository, where the model gets a folder"
    add("--triton", type=_path, required=True, metavar="REPO/", help=repository)
    add("--name", required=True, help="the model's name, for clients and its folder")
    versions = "of a folder, in the order of their numbers (original,compressed); the last is the default"
    add("--versions", type=_split, metavar="VERSION", help=versions)
    most = f"the most images in one run ({settings.max_batch_size})"
    add("--max-batch", type=_positive, default=settings.max_batch_size, metavar="N", help=most)
    wait = f"microseconds that a request waits for others ({settings.max_queue_delay_us})"
    add("--max-queue-delay", type=_not_negative, default=settings.max_queue_delay_us, metavar="US", help=wait)
    add("--threads", type=_positive, help="CPU threads for one run (onnxruntime's choice)")
    add("--accelerator", choices=get_args(Accelerator), help="beside onnxruntime (none)")
    add("--overwrite", action="store_true", help="replace a model of this name")
