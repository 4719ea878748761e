"""Stores weights that the graph computes from parameters on every call."""

from __future__ import annotations

from itertools import accumulate, count

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph import operators as ops
from fxprune.graph.extract import ancestors, between
from fxprune.passes.base import FxPass

__all__ = ["StoreWeights"]


class StoreWeights(FxPass):
    """Gives convolutions and linear layers (1) stored weights, where they were computed from parameters alone.

    ```
    parameter ── standardise ── scale ──┐              parameter ──┐
                                 x ── conv      =>          x ── conv
    ```

    Weight standardisation (NF-ResNets, BiT) and exported weight norm compute the same tensors on every call in
    evaluation mode. Stored, they can absorb adaptors, and cost no time. The parameters they came from (2) leave the
    graph module unless something else reads them.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Stores what can be stored."""
        constants = _constants(graph_module)
        computed = {
            source: constants[source]
            for node in graph_module.graph.nodes
            if node.op == "call_function" and ops.is_dense(graph_module, node) and node not in constants
            for source in node.all_input_nodes
            if source in constants and source.op != "get_attr" and ops.is_floating(source)
        }
        if not computed:
            return PassResult(graph_module, False)
        before = ancestors(graph_module, [node.name for node in computed])
        values = between(graph_module, (), [node.name for node in computed])()
        for node, value in zip(computed, values, strict=True):  # case 1
            owner = computed[node][0].rpartition(".")[0]
            module = graph_module.get_submodule(owner)
            name = next(name for i in count() if not hasattr(module, name := f"stored_weight{i or ''}"))
            module.register_parameter(name, nn.Parameter(value.detach().clone()))
            with graph_module.graph.inserting_before(node):
                stored = graph_module.graph.get_attr(f"{owner}.{name}".removeprefix("."))
            stored.meta = {k: v for k, v in node.meta.items() if k == "tensor_meta"}
            node.replace_all_uses_with(stored)
        for node in reversed(graph_module.graph.nodes):
            if node.name in before and not node.users:
                graph_module.graph.erase_node(node)
        _delete_unread(graph_module, {name for read in computed.values() for name in read})  # case 2
        return PassResult(graph_module, True)


def _constants(gm: fx.GraphModule) -> dict[fx.Node, list[str]]:
    """The nodes computed from parameters and buffers alone, and the names of those."""
    found: dict[fx.Node, list[str]] = {}
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            found[node] = [str(node.target)]
        elif (
            node.op in ("call_function", "call_method")
            and sources
            and all(source in found for source in sources)
            and ops.mutated_input(gm, node) is None
        ):
            found[node] = [name for source in sources for name in found[source]]
    return found


def _delete_unread(gm: fx.GraphModule, names: set[str]) -> None:
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for name in names - read:
        owner, _, attribute = name.rpartition(".")
        if called.isdisjoint(accumulate(owner.split("."), "{}.{}".format)):
            delattr(gm.get_submodule(owner), attribute)
