"""Where features are read: the node that mimicking compares."""

from __future__ import annotations

import logging
import math

from torch import fx

from fxprune.discovery.dominance import Dominance, flow_nodes
from fxprune.errors import GraphError
from fxprune.graph import operators as ops
from fxprune.graph import vocabulary

__all__ = ["find_tap", "output_tap"]

logger = logging.getLogger(__name__)


def find_tap(gm: fx.GraphModule, name: str | None = None) -> tuple[str, ...]:
    """Finds the tap of a network.

    1. The last spatial feature map before a global pooling that everything goes through (MiR, section 3.3);
    2. else the input of the last linear layer that everything goes through;
    3. else every floating-point output of the network.

    Args:
        gm: A graph with shapes.
        name: A node, or the module path of its last call, that the user wants instead.

    Returns:
        Names of the nodes to compare.

    Raises:
        GraphError: `name` is not in the graph, or no output is a floating-point tensor.
    """
    flow = flow_nodes(gm)
    if name is not None:
        calls = [n for n, node in flow.items() if node.op == "call_module" and node.target == name]
        if name not in flow and not calls:
            raise GraphError(
                f"tap {name!r} is neither a node nor a module of the graph; its last nodes are {list(flow)[-6:-1]}"
            )
        return (name if name in flow else calls[-1],)
    dominance = Dominance(flow)
    output = next(reversed(flow))
    through = [node for n, node in flow.items() if n != output and dominance.dominates(n, output)]
    pools = [node for node in through if _pools_globally(gm, node)]
    last = pools or [node for node in through if ops.op_name(gm, node) == "linear"]
    if last:
        return (last[-1].all_input_nodes[0].name,)
    outputs = tuple(n.name for n in flow[output].all_input_nodes if n.name in flow and ops.is_floating(n))
    if not outputs:
        raise GraphError("no output of the network is a floating-point tensor; name a tap")
    return outputs


def _pools_globally(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a pooling or mean reduces all spatial dimensions of one feature map to one position."""
    if ops.op_name(gm, node) not in vocabulary.POOLS or not node.all_input_nodes:
        return False
    before, meta = ops.shape_of(node.all_input_nodes[0]), node.meta["tensor_meta"]
    if before is None or len(before) < 3:
        return False
    after = meta if hasattr(meta, "shape") else meta[0]  # ATen's maximum pooling returns the positions too
    left = math.prod(after.shape[1:])
    return left in (before[1], before[-1]) and left < math.prod(before[1:])  # one value a channel is left


def output_tap(gm: fx.GraphModule) -> tuple[str, ...]:
    """Where a part of a model is mimicked: every floating-point tensor it computes and returns.

    Unlike `find_tap` it never reads before a pooling: what follows a part is not known, so all it returns counts.

    Args:
        gm: A graph with shapes.

    Raises:
        GraphError: The part returns no floating-point tensor.
    """
    flow = flow_nodes(gm)
    output = next(reversed(flow.values()))
    returned = [n for n in output.all_input_nodes if n.name in flow and n.op != "placeholder"]
    tap = tuple(n.name for n in returned if ops.is_floating(n))
    if not tap:
        raise GraphError(
            "no output of this part is a floating-point tensor that it computes; name a larger part, or a tap",
            nodes=[n.name for n in returned],
        )
    if len(tap) < len(returned):
        unread = [n.name for n in returned if n.name not in tap]
        logger.warning("not mimicked, as they are no floating-point tensors: %s", ", ".join(unread))
    return tap
