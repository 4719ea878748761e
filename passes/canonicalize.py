"""Removes what computes nothing."""

from __future__ import annotations

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph import operators as ops
from fxprune.graph import vocabulary
from fxprune.passes.base import FxPass

__all__ = ["Canonicalize"]


class Canonicalize(FxPass):
    """Removes (1) calls of `nn.Identity` and (2) nodes whose value nobody reads.

    ```
    x ── Identity ── conv          x ── conv
    x ── shape (unused)      =>
    ```

    Placeholders, outputs, in-place operators and functions that are not torch's own stay, whoever reads them.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Removes both kinds of node."""
        graph = graph_module.graph
        idle = [node for node in graph.nodes if type(ops.module_of(graph_module, node)) is nn.Identity]
        for node in idle:  # case 1
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        modified = graph.eliminate_dead_code(_is_impure) or bool(idle)  # case 2
        if modified:
            graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def _is_impure(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it: it may change something else."""
    if node.op in ("placeholder", "output"):
        return True
    owner = node.graph.owning_module
    if owner is None or ops.mutated_input(owner, node) is not None:
        return True
    foreign = node.op == "call_function" and not vocabulary.is_torchs_own(node.target)
    # torch takes assertions, say, for impure, but every module in training mode too
    return node.op not in ("call_module", "call_method") and (foreign or bool(node.is_impure()))
