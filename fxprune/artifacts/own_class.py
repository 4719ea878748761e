"""A compressed network in the class that the original has, for tools that know that class and take no graph."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.artifacts.recipe import ORIGIN, PartOrigin
from fxprune.errors import GraphError
from fxprune.graph.call import Calls, Inputs
from fxprune.graph.examples import example_for
from fxprune.plan import Plan
from fxprune.submodules.capture import device_of, submodule_of
from fxprune.submodules.replacement import forward_attributes
from fxprune.tracing.evaluation import evaluation_copy
from fxprune.tracing.unwrap import inner
from fxprune.validation import shortened

__all__ = ["PassThrough", "own_class"]


_NEAR = 1e-4
"""Largest difference of an output, relative to its largest value."""


class PassThrough(nn.Module):
    """Gives back the first of what it is called with: what is left of a block that was cut."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first positional argument, or the first by name where there is none."""
        return next(iter((*args, *kwargs.values())))


def own_class(model: nn.Module, network: nn.Module) -> nn.Module:
    """A copy of a model with the cuts and the weights of its compressed graph; see `fxprune.in_own_class`.

    Raises:
        GraphError: `network` does not say what was cut from it, a cut is no whole module of the model, or the copy
            computes something else.
        OptionError: The model lacks a part that was compressed.
        TraceError: The model cannot be copied.
    """
    graphs = {
        path: module
        for path, module in evaluation_copy(network).named_modules()
        if isinstance(module, fx.GraphModule) and ORIGIN in module.meta
    }
    if not graphs:
        raise GraphError(
            "this network does not say what was cut from it: give what fxprune.compress returned"
        )
    whole = evaluation_copy(model)
    for path, graph in graphs.items():
        part = inner(submodule_of(whole, path)) if path else whole
        plan, inside, example = _asked(graph)
        for cut in plan.cuts:
            if all(module.startswith(inside) for module in cut.modules):
                label, *gone = (name.removeprefix(inside) for name in (cut.label, *cut.modules))
                _take_out(part, label, gone)
        _check(part, graph, example, _load(part, graph))
    return whole


def _asked(graph: fx.GraphModule) -> tuple[Plan, str, Inputs]:
    """The plan of a graph, what the paths of its modules begin with there, and inputs."""
    origin = graph.meta[ORIGIN]
    if not isinstance(origin, PartOrigin):
        return origin.plan, "", example_for(graph, origin.plan.inputs)
    calls = Calls(example_for(graph, origin.origin.plan.inputs).args).calls
    return origin.origin.plan, f"{origin.path}.", calls[origin.origin.paths.index(origin.path)]


def _take_out(model: nn.Module, label: str, gone: Sequence[str]) -> None:
    """Replaces the module around all of some modules, if it holds no others with weights."""
    around = _around(gone)
    # a label tells of the sum too, which may stand further out than all that has weights
    path = label if f"{around}.".startswith(f"{label}.") else around
    block = submodule_of(model, path) if path else model
    inside = block.named_modules(prefix=path)
    left = [name for name, module in inside if [*module.parameters(recurse=False)] and name not in gone]
    if not path or left:
        raise GraphError(
            f"{label} is no whole module of {type(model).__name__}"
            + (f", for {path} goes on with {shortened(left)}" if left else "")
            + ": its own class has no form without it; the graph itself is kept by fxprune.save and export_onnx"
        )
    plain = len(inspect.signature(block.forward).parameters) == 1
    nothing = nn.Identity() if plain else PassThrough()
    forward_attributes(block, nothing)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nothing)


def _around(modules: Sequence[str]) -> str:
    """Path of the innermost module that holds all the named ones."""
    parents = [module.split(".")[:-1] for module in modules]
    together = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return ".".join(names[0] for names in together)


def _load(part: nn.Module, graph: fx.GraphModule) -> Sequence[str]:
    """Gives a model the weights of a graph, of its type and where it is; returns the names of those without a place."""
    state = graph.state_dict()
    part.to(device_of(graph))
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name])
    try:
        # not all: constants that tracing stored are the graph's alone
        return list(part.load_state_dict(state, strict=False).unexpected_keys)
    except RuntimeError as error:
        raise GraphError(f"the weights are not those of this {type(part).__name__}: {error}") from error


@torch.no_grad()
def _check(part: nn.Module, graph: fx.GraphModule, example: Inputs, homeless: Sequence[str]) -> None:
    """Runs both on the same inputs."""

    def run(network: nn.Module) -> list[Tensor]:
        given = example.map(torch.clone)  # either may change its inputs in place
        values = pytree.tree_leaves(network(*given.args, **given.kwargs))
        return [value.double() for value in values if isinstance(value, Tensor) and value.numel()]

    wanted, found = run(graph), run(part)
    shapes, others = [[list(x.shape) for x in values] for values in (wanted, found)]
    if shapes != others:
        raise GraphError(f"the copy returns tensors of shapes {others}, the graph {shapes}")
    for one, other in zip(wanted, found, strict=True):
        largest = max(one.abs().max().item(), 1e-12)
        furthest = (one - other).abs().max().item() / largest
        if not furthest <= _NEAR:
            raise GraphError(
                f"the copy is not the graph: an output differs by {furthest:.2g} of its largest value"
                + (f"; weights without a place: {shortened(homeless)}" if homeless else "")
            )
