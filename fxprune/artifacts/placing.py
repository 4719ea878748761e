"""Compressed parts in their places in the whole model, and taken out of it again."""

from __future__ import annotations

from torch import fx, nn

from fxprune.artifacts.recipe import ORIGIN, Origin, PartOrigin
from fxprune.errors import GraphError
from fxprune.graph.call import Calls
from fxprune.graph.examples import example_of
from fxprune.reports.compression import REPORT
from fxprune.submodules.parts import Parts
from fxprune.submodules.replacement import replace_submodule

__all__ = ["in_place", "taken_out"]


def in_place(model: nn.Module, parts: Parts, network: fx.GraphModule) -> nn.Module:
    """A copy of a model with compressed parts in their places; see `replace_submodule`.

    Args:
        model: The whole model; it is not changed.
        parts: Of the original.
        network: They are joined in it; what its `meta` says of it goes with each.
    """
    for (path, part), call in zip(parts.split(network).items(), parts.example.calls, strict=True):
        if part is not network:
            part.meta[ORIGIN] = PartOrigin(network.meta[ORIGIN], path)
            part.meta |= {key: network.meta[key] for key in (REPORT,) if key in network.meta}
        model = replace_submodule(model, path, part, example=call)
    return model


def taken_out(model: nn.Module) -> tuple[fx.GraphModule, Origin] | None:
    """The parts of a model that were compressed together, joined again; None where there are none.

    Raises:
        GraphError: The model is one of them, lacks one, or holds another that was compressed otherwise.
    """
    graphs = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and ORIGIN in module.meta
    }
    found = {name: graph.meta[ORIGIN] for name, graph in graphs.items()}
    first = next((one for one in found.values() if isinstance(one, PartOrigin)), None)
    if first is None:
        return None
    origin, together = first.origin, f"{' and '.join(first.origin.paths)} were compressed together"
    if "" in found:
        raise GraphError(f"{together}, and this is {first.path} alone: give the whole model")
    wanted = {path: PartOrigin(origin, path) for path in origin.paths}
    strange = [path for path in {**wanted, **found} if wanted.get(path) != found.get(path)]
    if strange:
        raise GraphError(
            f"{together}, and {strange[0]} is no longer there, or was compressed by another call: what one call "
            "returned is saved together; keep the weights of this model with its state_dict()"
        )
    calls = Calls(example_of(origin.plan.inputs).args)
    network = Parts({path: graphs[path] for path in origin.paths}, calls).joined()
    report = graphs[first.path].meta.get(REPORT)
    network.meta |= {ORIGIN: origin} if report is None else {ORIGIN: origin, REPORT: report}
    return network, origin
