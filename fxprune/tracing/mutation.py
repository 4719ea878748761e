"""In-place operators, made visible as dataflow.

`relu_(x)` changes `x` and returns it. Whatever reads `x` later reads the changed value, which the edges of an FX
graph do not show. After `show_mutation` they do: later readers of `x` read the operator's result, which is the
same tensor. The code computes what it did before, and dominators mean what they say.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from fxprune.graph import operators as ops
from fxprune.graph import vocabulary
from fxprune.graph.extract import reached

__all__ = ["base_of", "show_mutation"]


def base_of(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, bool]:
    """The node whose storage a node shares, and whether the two are the same tensor rather than a view."""
    whole = True
    while node.op != "placeholder" and node.all_input_nodes:
        changed = ops.mutated_input(gm, node)
        if changed is not None:
            node = changed
        elif ops.is_identity(gm, node) and ops.op_name(gm, node) != "copy":
            node = node.all_input_nodes[0]
        elif ops.op_name(gm, node) in vocabulary.VIEWS:
            node, whole = node.all_input_nodes[0], False
        else:
            break
    return node, whole


def show_mutation(gm: fx.GraphModule) -> None:
    """Lets the later readers of a tensor that was changed in place read the operator that changed it.

    Changes through a view are left as they are; discovery refuses regions that they reach into.

    Args:
        gm: Rewired in place.
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if ops.mutated_input(gm, node) is None:
            continue
        base, whole = base_of(gm, node)
        if not whole:
            continue
        same = _same_tensor(gm, base, node)
        for alias in same:
            for user in list(alias.users):
                if position[user] > position[node] and user not in same:
                    user.replace_input_with(alias, node)
    gm.recompile()


def _same_tensor(gm: fx.GraphModule, base: fx.Node, until: fx.Node) -> Collection[fx.Node]:
    """`base` and the nodes that return that very tensor, up to an operator and without it."""
    return reached(
        [base], lambda node: [u for u in node.users if u is not until and base_of(gm, u) == (base, True)]
    )
