"""A compressed network from its folder: every file is checked before it is read, and nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx, nn

from fxprune.artifacts.placing import in_place
from fxprune.artifacts.recipe import ORIGIN, RECIPE, Origin, Rebuilding, read_file, read_recipe
from fxprune.artifacts.saving import NETWORK
from fxprune.errors import ArtifactError, OptionError
from fxprune.export.artifact import program_of, state_of
from fxprune.export.naming import NAMES
from fxprune.graph.call import Calls, Inputs
from fxprune.graph.examples import example_for
from fxprune.graph.shapes import propagate_shapes
from fxprune.options import FrontEnd
from fxprune.passes import Cut, Prepare
from fxprune.plan import Plan
from fxprune.reports.compression import REPORT, CompressionReport
from fxprune.submodules.parts import Parts
from fxprune.tracing.trace import trace
from fxprune.tracing.unwrap import inner

__all__ = ["load_network", "rebuild"]


def load_network(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The network that `save_network` wrote; see `fxprune.load`.

    Args:
        folder: Where.
        model: The original, with whatever weights; by default the graph comes from `model.pt2`.

    Raises:
        ArtifactError: A file is missing, was changed, is newer or not provably harmless; or the weights do not fit.
        PreconditionError: The model lacks a block that was cut, or has another in its place.
        TraceError: The model cannot be traced.
    """
    source = Path(folder)
    recipe = read_recipe(source)
    data = _verified(source, recipe)
    plan = Plan.from_json(data["plan.json"], str(source / "plan.json"))
    origin = Origin(plan, recipe.front_end, recipe.submodule, recipe.original_weights)
    parts = None
    if model is None:
        program = program_of(data["model.pt2"], str(source / "model.pt2"))
        graph = trace(program, example_for(program.module(check_guards=False), plan.inputs).given)
    else:
        state = state_of(data["model.safetensors"], str(source / "model.safetensors"))
        if not origin.paths:
            graph = rebuild(model, plan, state, front_end=recipe.front_end)
        else:
            parts = _parts(model, origin)
            graph = _cut(parts.joined(), plan, state, type(model).__name__)
    for name, parameter in graph.named_parameters():
        parameter.requires_grad_(name not in recipe.frozen)
    graph.meta[ORIGIN] = origin
    if recipe.onnx_names is not None:
        graph.meta[NAMES] = recipe.onnx_names
    if "report.json" in data:
        graph.meta[REPORT] = _report(data["report.json"], source)
    return graph if model is None or parts is None else in_place(model, parts, graph)


def _verified(source: Path, recipe: Rebuilding) -> dict[str, bytes]:
    """The files that belong to a network, as their SHA-256 in the recipe says."""
    strange = sorted(recipe.files.keys() - set(NETWORK))
    if strange:
        raise ArtifactError(f"{source / RECIPE} lists {strange[0]!r}, which is no file of a saved network")
    missing = sorted(set(NETWORK) - recipe.files.keys() - {"report.json"})
    if missing:
        raise ArtifactError(f"{source / RECIPE} lists no {missing[0]}: save the network again")
    return {name: read_file(source / name, digest) for name, digest in recipe.files.items()}


def _parts(model: nn.Module, origin: Origin) -> Parts:
    """The parts of a model that were compressed, as they were."""
    modules = {path: _part(model, path) for path in origin.paths}
    example = example_for(next(iter(modules.values())), origin.plan.inputs)
    example = example if len(modules) == 1 else Calls(example.args)
    pairs = zip(modules.items(), example.calls, strict=True)
    return Parts({path: _prepared(part, call, origin.front_end) for (path, part), call in pairs}, example)


def _part(model: nn.Module, path: str) -> nn.Module:
    try:
        part: nn.Module = inner(model.get_submodule(path))
    except AttributeError as error:
        raise OptionError(
            f"submodule {path!r} of the model was compressed, and this {type(model).__name__} has none"
        ) from error
    return part


def _report(text: bytes, source: Path) -> CompressionReport:
    try:
        return CompressionReport.from_json(text)
    except ValueError as error:
        raise ArtifactError(
            f"{source / 'report.json'} is no report of this version of fxprune: {error}"
        ) from error


def rebuild(
    model: nn.Module, plan: Plan, state: Mapping[str, Tensor], *, front_end: FrontEnd = "auto"
) -> fx.GraphModule:
    """A network without the blocks of a plan, with the weights that it had after its compression.

    Args:
        model: The original, with whatever weights; it is not changed.
        plan: What to cut.
        state: The compressed network's weights.
        front_end: As for the compression.

    Raises:
        ArtifactError: The weights are not those of the network without these blocks.
        PreconditionError: A block is missing, or another one.
        TraceError: The model cannot be traced.
    """
    graph = _cut(
        _prepared(model, example_for(model, plan.inputs), front_end), plan, state, type(model).__name__
    )
    graph.meta[ORIGIN] = Origin(plan, front_end, None, None)
    return graph


def _prepared(model: nn.Module, example: Inputs, front_end: FrontEnd) -> fx.GraphModule:
    """A network's graph with shapes, as a compression begins with it."""
    as_it_is = isinstance(model, fx.GraphModule) and front_end != "export"
    graph = trace(model, None if as_it_is else example.given, front_end=front_end)
    Prepare()(graph)
    propagate_shapes(graph, example.args, example.kwargs)
    return graph


def _cut(graph: fx.GraphModule, plan: Plan, state: Mapping[str, Tensor], model: str) -> fx.GraphModule:
    """The same graph without the blocks of a plan, with these weights."""
    Cut(plan)(graph)
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    try:
        graph.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(
            f"the weights do not fit {model} without {', '.join(cut.label for cut in plan.cuts)}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return graph
