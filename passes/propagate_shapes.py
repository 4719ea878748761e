"""Notes shapes and types on every node."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph.shapes import propagate_shapes
from fxprune.passes.base import FxPass

__all__ = ["PropagateShapes"]


class PropagateShapes(FxPass):
    """Sets `node.meta["tensor_meta"]` on every node; the graph's code stays, so `modified` is always False.

    Args:
        *args: Positional example inputs.
        **kwargs: Keyword example inputs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args, self._kwargs = args, kwargs

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the graph on fake tensors."""
        propagate_shapes(graph_module, self._args, self._kwargs)
        return PassResult(graph_module, False)
