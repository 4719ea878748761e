"""Parts of a graph as graph modules of their own, which share modules and parameters with the whole."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import fx

from fxprune.graph.draft import Draft
from fxprune.graph.operators import tensor_meta

__all__ = ["ancestors", "between", "descendants", "exits", "is_returned", "kept", "reached", "share"]


def share(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own and the very same leaf modules and parameters, to be rewritten."""
    graph = fx.Graph()
    val_map: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        # as Graph.node_copy, whose arguments torch would search for symbolic numbers: they were there before
        new = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        new.args = fx.node.map_arg(node.args, val_map.__getitem__)
        if node.kwargs:
            new.kwargs = fx.node.map_arg(node.kwargs, val_map.__getitem__)
        new.meta.update(node.meta)
        val_map[node] = new
    graph._codegen = gm.graph._codegen
    copy = Draft(gm, graph, type(gm).__name__)
    assert all(node.name == new.name for node, new in val_map.items())  # records speak of nodes by name
    copy.meta = dict(gm.meta)
    return copy


def between(gm: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> fx.GraphModule:
    """The part of a graph that computes some nodes from others.

    Args:
        gm: The whole.
        inputs: Nodes that become placeholders, in this order; all placeholders of `gm` that are needed must be among
            them.
        outputs: Nodes whose values are returned, as a tuple.

    Returns:
        A module that shares its leaf modules and parameters with `gm`.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    needed = ancestors(gm, outputs, inputs).difference(inputs)
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for name in inputs:
        mapped[nodes[name]] = graph.placeholder(name)
        mapped[nodes[name]].meta = dict(nodes[name].meta)
    for node in gm.graph.nodes:
        if node.name in needed:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
    graph.output(tuple(mapped[nodes[name]] for name in outputs))
    return fx.GraphModule(gm, graph, "Part")


def ancestors(gm: fx.GraphModule, names: Iterable[str], given: Collection[str] = ()) -> set[str]:
    """The named nodes and everything they are computed from, as far as some nodes that are given."""
    found, known = set(names), frozenset(given)
    for node in reversed(gm.graph.nodes):
        if node.name in found and node.name not in known:
            found.update(source.name for source in node.all_input_nodes)
    return found


def descendants(gm: fx.GraphModule, names: Iterable[str]) -> set[str]:
    """The named nodes and everything computed from them."""
    found = set(names)
    for node in gm.graph.nodes:
        if any(source.name in found for source in node.all_input_nodes):
            found.add(node.name)
    return found


def exits(gm: fx.GraphModule, names: Iterable[str]) -> list[str]:
    """What is read elsewhere of the named nodes and of all between them: everything computed from them goes through it.

    Tensors only: of a node that holds several, what is picked out of it.

    ```
    a ── x ── b ── c      exits of a and b: x and b
         └── d
    ```
    """
    named = list(names)
    inside = descendants(gm, named) & ancestors(gm, named)
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        several = node.args[0]
        if isinstance(several, fx.Node) and several.name in inside and tensor_meta(several) is None:
            inside.add(node.name)
    return [
        node.name
        for node in gm.graph.nodes
        if node.name in inside
        and tensor_meta(node) is not None
        and any(user.name not in inside for user in node.users)
    ]


def is_returned(gm: fx.GraphModule, names: Collection[str]) -> bool:
    """Whether one of the named nodes is an output of the graph."""
    return any(source.name in names for source in gm.graph.output_node().all_input_nodes)


def reached(starts: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> dict[fx.Node, None]:
    """The nodes that a walk meets, those where it starts included; `onward` says where it goes from each."""
    found = dict.fromkeys(starts)
    stack = list(found)
    while stack:
        for node in onward(stack.pop()):
            if node not in found:
                found[node] = None
                stack.append(node)
    return found


def kept(body: Iterable[fx.Node], bypass: fx.Node) -> dict[fx.Node, None]:
    """Nodes of a region's body that are still needed once the bypass stands in for the exit: a projection shortcut."""
    members = set(body)
    return reached(members & {bypass}, lambda node: [s for s in node.all_input_nodes if s in members])
