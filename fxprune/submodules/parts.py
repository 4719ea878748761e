"""Parts of a model side by side in one graph, to be compressed as one network, and each by itself again.

```
a ── part A ── x ── relative ──┐            a ── part A ── x
                               ├─ output                          => what `split` gives back
b ── part B ── y ── relative ──┘            b ── part B ── y
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxprune.discovery.taps import output_tap
from fxprune.errors import GraphError
from fxprune.graph.call import Inputs, bind
from fxprune.graph.extract import ancestors, between, share
from fxprune.graph.operators import scope_key
from fxprune.tracing.evaluation import to_evaluation

__all__ = ["WEIGHED_BY", "Parts", "as_returned", "comparable"]

_PART = "fxprune_part"
"""Key of a node's part in its `meta`."""

_ROOT = "L['self']"
"""What torch.export calls a model in the paths of its modules."""

WEIGHED_BY = 16
"""Images whose values tell how much each output varies."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of a model that are compressed as one network.

    Attributes:
        graphs: Their graphs by path, which say how each is called.
        example: What they are called with: of one part its call, of several `Calls`.
    """

    graphs: Mapping[str, fx.GraphModule]
    example: Inputs

    def joined(self) -> fx.GraphModule:
        """The parts as one network that shares their weights, each under its path; one part is that network itself.

        Raises:
            GraphError: A part's graph takes one input for several tensors.
        """
        if len(self.graphs) == 1:
            return next(iter(self.graphs.values()))
        graph, root, outputs = fx.Graph(), dict[str, Any](), []
        given = [
            [graph.placeholder(f"{_stem(path)}_{i}") for i in range(_count(call))]
            for path, call in zip(self.graphs, self.example.calls, strict=True)
        ]
        for (path, part), call, inputs in zip(self.graphs.items(), self.example.calls, given, strict=True):
            mapped: dict[fx.Node, Any] = {}
            for node, leaf in _leaves(path, part, call).items():
                mapped[node] = node.args[0] if leaf is None else inputs[leaf]
                if leaf is not None:
                    inputs[leaf].meta = dict(node.meta)
            for node in part.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    root[f"{path}.{node.target}"] = attrgetter(str(node.target))(part)
                if node.op not in ("placeholder", "output"):
                    target = (
                        f"{path}.{node.target}" if node.op in ("call_module", "get_attr") else node.target
                    )
                    mapped[node] = _copied(node, graph, mapped, target, f"{_stem(path)}_{node.name}")
                    mapped[node].meta |= {"nn_module_stack": _scopes(node, path), _PART: path}
            outputs.append(fx.node.map_arg(part.graph.output_node().args[0], mapped.__getitem__))
        graph.output(tuple(outputs))
        for node in graph.nodes:
            node.meta.setdefault("tensor_meta", None)  # of an input that no part reads, and of the output
        names = [f"part_{i}" for i in range(len(outputs))]
        structure = pytree.tree_structure((self.example.args, {}))
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, structure, None)))
        return to_evaluation(fx.GraphModule(root, graph, "Parts"))

    def split(self, network: fx.GraphModule) -> dict[str, fx.GraphModule]:
        """Each part by itself, by path, called as it always was; it shares its weights with the network.

        Args:
            network: What `joined` gave, or made of it by passes.
        """
        if len(self.graphs) == 1:
            return dict.fromkeys(self.graphs, network)
        inputs = iter(network.graph.find_nodes(op="placeholder"))
        outputs: Any = network.graph.output_node().args[0]
        return {
            path: _alone(network, path, part, call, list(islice(inputs, _count(call))), output)
            for (path, part), call, output in zip(
                self.graphs.items(), self.example.calls, outputs, strict=True
            )
        }


class _Leaf:
    """Stands for one of the values that a part is called with."""

    def __init__(self, index: int) -> None:
        self.index = index


def _leaves(path: str, part: fx.GraphModule, call: Inputs) -> dict[fx.Node, int | None]:
    """Which of a call's values each of a part's inputs is; None for one that is left at its default."""
    structure = pytree.tree_structure((call.args, call.kwargs))
    args, kwargs = pytree.tree_unflatten([_Leaf(i) for i in range(structure.num_leaves)], structure)
    nodes = [node for node in part.graph.find_nodes(op="placeholder") if not str(node.target).startswith("*")]
    found: dict[fx.Node, int | None] = {}
    for node, value in zip(nodes, bind(part, args, kwargs), strict=True):
        if not isinstance(value, _Leaf) and not (node.args and value is node.args[0]):
            raise GraphError(
                f"submodule {path!r} takes a {type(value).__name__} as its {node.target}, which cannot stand beside "
                "other parts: compress it by itself, or try front_end='export'"
            )
        found[node] = value.index if isinstance(value, _Leaf) else None
    return found


def _count(call: Inputs) -> int:
    return len(pytree.tree_leaves((call.args, call.kwargs)))


def _stem(path: str) -> str:
    return path.replace(".", "_")


def _copied(node: fx.Node, graph: fx.Graph, mapped: Mapping[fx.Node, Any], target: Any, name: str) -> fx.Node:
    args = fx.node.map_arg(node.args, mapped.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, mapped.__getitem__)
    new = graph.create_node(node.op, target, args, kwargs, name=name, type_expr=node.type)
    new.meta = dict(node.meta)
    return new


def _scopes(node: fx.Node, path: str) -> dict[str, tuple[str, Any]]:
    """The module calls that a node was executed in, as those of the whole model name them."""
    stack = (node.meta.get("nn_module_stack") or {}).items()
    scopes = {
        f"{path}.{key}": (f"{path}.{str(inside).removeprefix(_ROOT).strip('.')}".rstrip("."), kind)
        for key, (inside, kind) in stack
    }
    return scopes if scope_key(node) else {**scopes, path: (path, nn.Module)}


def _alone(
    network: fx.GraphModule,
    path: str,
    part: fx.GraphModule,
    call: Inputs,
    inputs: Sequence[fx.Node],
    output: Any,
) -> fx.GraphModule:
    graph, root = fx.Graph(), dict[str, Any]()
    leaves = _leaves(path, part, call)
    mapped: dict[fx.Node, fx.Node] = {}
    for node in part.graph.find_nodes(op="placeholder"):
        new, leaf = graph.node_copy(node), leaves.get(node)
        if leaf is not None:
            mapped[inputs[leaf]] = new
    ends: list[str] = []
    fx.node.map_arg(output, lambda node: ends.append(node.name))
    needed = ancestors(network, ends)
    for node in network.graph.nodes:
        # what only changes another value is nobody's ancestor
        if node.op in ("placeholder", "output") or not (node.name in needed or node.meta.get(_PART) == path):
            continue
        if node.target is relative:
            mapped[node] = mapped[node.args[0]]
            continue
        target = node.target
        if node.op in ("call_module", "get_attr"):
            target = str(target).removeprefix(f"{path}.")
            root[target] = attrgetter(str(node.target))(network)
        mapped[node] = _copied(node, graph, mapped, target, node.name.removeprefix(f"{_stem(path)}_"))
    graph.output(fx.node.map_arg(output, mapped.__getitem__))
    graph.set_codegen(part.graph._codegen)
    return to_evaluation(fx.GraphModule(root, graph, type(part).__name__))


def relative(value: Tensor, factor: float) -> Tensor:
    """An output as it is compared beside those of other parts; `comparable` tells the factor."""
    return value * factor


@torch.no_grad()
def comparable(network: fx.GraphModule, parts: Parts, few: Inputs) -> tuple[str, ...]:
    """Where parts are mimicked: all that they return, see `output_tap`. Of several the losses are made comparable.

    Each of their outputs is multiplied by a factor, so that the mean squared error over all elements of all outputs
    is the mean over the parts of the error over the variance: a part counts as much as another, whatever the size of
    its values and their number. A part that returns several counts them alike. What never varies is left as it is.

    Args:
        network: The joined parts; of several parts its outputs change in place.
        parts: Of it.
        few: Images that tell how much each output varies, where the network is.

    Returns:
        Names of the nodes to compare.

    Raises:
        GraphError: A part returns no floating-point tensor that it computes.
    """
    tap = output_tap(network)
    if len(parts.graphs) == 1:
        return tap
    end = network.graph.output_node()
    groups: list[list[fx.Node]] = [[] for _ in parts.graphs]
    outputs: Any = end.args[0]
    for path, group, output in zip(parts.graphs, groups, outputs, strict=True):
        fx.node.map_arg(output, group.append)
        group[:] = dict.fromkeys(node for node in group if node.name in tap)
        if not group:
            raise GraphError(
                f"submodule {path!r} returns no floating-point tensor that it computes: leave it out"
            )
    inputs = [node.name for node in network.graph.find_nodes(op="placeholder")]
    nodes = [node for group in groups for node in group]
    values = between(network, inputs, [node.name for node in nodes])(*bind(network, few.args, few.kwargs))
    elements = sum(value.numel() for value in values)
    sizes = [len(group) for group in groups for _ in group]
    least = torch.finfo(torch.float32).tiny
    scaled: dict[fx.Node, fx.Node] = {}
    for node, value, size in zip(nodes, values, sizes, strict=True):
        weight = elements / (value.numel() * size * len(groups))
        variance = value.float().var(correction=0).item()
        with network.graph.inserting_before(end):
            factor = math.sqrt(weight / variance) if variance > least else 1.0
            scaled[node] = network.graph.create_node(
                "call_function", relative, (node, factor), name=f"{node.name}_relative"
            )
        scaled[node].meta = {"tensor_meta": node.meta["tensor_meta"]}
    end.args = fx.node.map_arg(end.args, lambda node: scaled.get(node, node))
    network.recompile()
    return tuple(node.name for node in scaled.values())


def as_returned(network: fx.GraphModule) -> fx.GraphModule:
    """The network without what `comparable` put behind its outputs; itself where there is nothing of the kind."""
    if not any(node.target is relative for node in network.graph.nodes):
        return network
    plain = share(network)
    for node in list(plain.graph.nodes):
        if node.target is relative:
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    plain.recompile()
    return plain
