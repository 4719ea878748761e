"""What a region costs, as a key: regions of one signature save the same time, so one of them is measured."""

from __future__ import annotations

from torch import fx

from fxprune.graph import operators as ops
from fxprune.graph.regions import Region

__all__ = ["signature"]


def signature(gm: fx.GraphModule, region: Region) -> tuple[str, ...]:
    """Operators, their settings and the shapes they work on, in graph order."""
    body = set(region.body)
    return (
        region.kind.value,
        *(_describe(gm, n) for n in gm.graph.nodes if n.name in body and n.op != "get_attr"),
    )


def _describe(gm: fx.GraphModule, node: fx.Node) -> str:
    module = ops.module_of(gm, node)
    plain = [str(a) for a in node.args if isinstance(a, (int, float, bool, str, tuple, list))]
    inputs = [str(ops.shape_of(source)) for source in node.all_input_nodes]
    settings = (
        repr(module)
        if module is not None
        else f"{ops.op_name(gm, node)}{plain if not node.all_input_nodes else ''}"
    )
    return f"{settings} {' '.join(inputs)} -> {ops.shape_of(node)}"
