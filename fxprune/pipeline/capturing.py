"""The network of a job, captured: its graph, its images, and where it is a part of a model what stands around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.backends import runs_modules
from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.errors import CalibrationError, DeviceError, GraphError
from fxprune.graph.call import Inputs, input_names
from fxprune.graph.opaque import opaque_note, opaque_parts
from fxprune.graph.shapes import propagate_shapes
from fxprune.options import Options
from fxprune.passes import Prepare
from fxprune.submodules.capture import capture_inputs
from fxprune.submodules.parts import Parts
from fxprune.submodules.whole import Whole, whole_around
from fxprune.tracing.trace import traced
from fxprune.tracing.unwrap import inner

__all__ = ["Network", "captured", "captured_parts", "device_for", "opaque_notes"]


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """What is to be compressed.

    Attributes:
        graph: A private copy, with shapes on every node.
        images: The calibration images.
        notes: What the user should know of how it was captured.
        parts: The parts of a model that the graph joins; None where it is the whole model.
        whole: The model around them, where that can be timed.
    """

    graph: fx.GraphModule
    images: CalibrationSet
    notes: tuple[str, ...]
    parts: Parts | None = None
    whole: Whole | None = None


def captured(model: Any, loader: Any, options: Options) -> Network:
    """A model as a whole."""
    names = input_names(model)
    images = draw(loader, limit=options.images, seed=options.seed, input_fn=options.input_fn, names=names)
    graph, notes = _graph(model, images.inputs, options)
    return Network(graph, images, notes)


def captured_parts(model: Any, loader: Any, options: Options) -> Network:
    """Parts of a model, side by side in one graph."""
    taken = capture_inputs(
        model,
        options.paths,
        loader,
        limit=options.images,
        input_fn=options.input_fn,
        device=options.device,
        seed=options.seed,
    )
    graphs, notes = dict[str, fx.GraphModule](), list[str]()
    for path, call in zip(options.paths, taken.images.inputs.calls, strict=True):
        graphs[path], found = _graph(inner(model.get_submodule(path)), call, options)
        notes += found if len(options.paths) == 1 else [f"{path}: {note}" for note in found]
    parts, whole = Parts(graphs, taken.images.example(2)), None
    assert options.latency_batch is not None and options.device is not None  # filled in by `open_job`
    if runs_modules(options.backend):  # other runtimes would need the model as a file, and few have one
        whole = whole_around(model, parts, taken.batch, options.latency_batch, options.device)
    return Network(parts.joined(), taken.images, tuple(notes), parts, whole)


def device_for(model: Any, device: str | None = None) -> str:
    """The device to work on: the one asked for, else where the model is.

    Raises:
        DeviceError: It is not there.
    """
    if device is None:
        tensors = model.parameters() if isinstance(model, nn.Module) else iter(())
        first = next(iter(tensors), None)
        return str(first.device) if first is not None and first.device.type in ("cpu", "cuda") else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"device {device} was asked for, but torch sees no CUDA device; install a driver and a CUDA build of "
            "torch, or leave device out to run on the CPU"
        )
    return device


def _graph(model: Any, images: Inputs, options: Options) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A private copy of a network with shapes on every node, and notes: only here is the caller's model read."""
    example, device = images.map(lambda tensor: tensor[:2]), str(options.device)
    _check_type(model, images)
    try:
        graph, note = traced(model, example.to(device_for(model)).given, options.front_end)
        _check_finite(graph)
        Prepare()(graph)
        graph.to(device)
        placed = example.to(device)
        propagate_shapes(graph, placed.args, placed.kwargs)
    except GraphError as error:
        shapes = [tuple(t.shape) for t in images.tensors()]
        raise CalibrationError(
            f"the network does not accept the calibration images of shape {shapes}: {error}. If it is to be called "
            "otherwise, pass input_fn=, from a batch to its arguments"
        ) from error
    return graph, (*(() if note is None else (note,)), *opaque_notes(graph))


def opaque_notes(graph: fx.GraphModule) -> list[str]:
    """What hides in a graph, in words; empty where nothing does."""
    parts = opaque_parts(graph)
    return [opaque_note(parts)] if parts else []


def _check_finite(graph: fx.GraphModule) -> None:
    bad = [name for name, p in graph.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise CalibrationError(
            f"weights are nan or infinite: {', '.join(bad[:4])}; check how they were loaded"
        )


def _check_type(model: Any, images: Inputs) -> None:
    tensors = list(model.parameters()) + list(model.buffers()) if isinstance(model, nn.Module) else []
    if any(t.is_meta for t in tensors):
        raise GraphError("the network's weights are on the meta device: load them before compressing")
    types = {t.dtype for t in tensors if t.is_floating_point()}
    half = sorted(str(t) for t in types & {torch.float16, torch.bfloat16})
    if half:
        raise GraphError(
            f"the network's weights are {', '.join(half)}; recovery needs float32: call model.float() first, and "
            "convert the result back"
        )
    first = images.tensors()[0]
    if len(types) == 1 and first.is_floating_point() and first.dtype not in types:
        raise CalibrationError(
            f"the images are {first.dtype}, the network's weights {types.pop()}; convert the images"
        )
