"""Folds adaptors into the operators beside them, so that nothing of them remains."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import FoldError
from fxprune.graph import operators as ops
from fxprune.graph.regions import Side
from fxprune.passes.base import FxPass
from fxprune.passes.insert_adaptors import Adaptor
from fxprune.placement.algebra import fold_bias_post, fold_post, fold_pre
from fxprune.placement.dense import OperatorIndex

__all__ = ["FoldAdaptors"]


class FoldAdaptors(FxPass):
    """Multiplies every adaptor into its operator's weight, in float64, and removes it.

    ```
    conv(W, b) ── adaptor(A)   =>   conv(A W, A b)
    adaptor(A) ── conv(W, b)   =>   conv(W A, b)
    ```

    The weights of the operators change in place; see `fxprune.placement.algebra` for the formulas.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every adaptor must be called, and its operator must be there."""
        called = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
        adaptors = {
            name: m.site.operator for name, m in graph_module.named_modules() if isinstance(m, Adaptor)
        }
        stray = [operator for name, operator in adaptors.items() if name not in called]
        if stray:
            raise FoldError(f"adaptors remain at {', '.join(stray)} that no node calls", nodes=stray)
        index = OperatorIndex(graph_module)
        gone = [operator for operator in adaptors.values() if index.get(operator) is None]
        if gone:
            raise FoldError(
                f"{', '.join(gone)}, which adaptors belong to, are gone; fold before rewriting their neighbours",
                nodes=gone,
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Folds all adaptors."""
        graph = graph_module.graph
        adaptors: list[Adaptor] = []
        for node in list(graph.nodes):
            module = ops.module_of(graph_module, node)
            if isinstance(module, Adaptor):
                adaptors.append(module)
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
                graph_module.delete_submodule(str(node.target))
        index = OperatorIndex(graph_module)  # with the adaptors gone, operators see their plain neighbours
        for adaptor in adaptors:
            _fold(graph_module, index, adaptor)
        return PassResult(graph_module, bool(adaptors))


@torch.no_grad()
def _fold(gm: fx.GraphModule, index: OperatorIndex, adaptor: Adaptor) -> None:
    site = adaptor.site
    operator = index[site.operator]
    map_ = adaptor.weight.double()
    fold, name = (fold_pre, operator.read) if site.side is Side.PRE else (fold_post, operator.write)
    weight = attrgetter(name)(gm)
    weight.copy_(fold(weight.double(), map_, operator.layout))
    if site.side is Side.POST and operator.bias is not None:
        bias = attrgetter(operator.bias)(gm)
        bias.copy_(fold_bias_post(bias.double(), map_))
