"""What the nodes of a graph compute, whichever front end wrote them: predicates on nodes.

A node is named by one canonical word (`add`, `relu`, `conv2d`), whether it is a module call, a function, a
method, or an ATen operator from `torch.export`; the words are in `fxprune.graph.vocabulary`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

from fxprune.graph import vocabulary

__all__ = [
    "MUTATES",
    "argument",
    "arguments",
    "fixed_interval",
    "is_dense",
    "is_elementwise",
    "is_identity",
    "is_linear",
    "module_of",
    "module_path",
    "mutated_input",
    "op_name",
    "output_interval",
    "owns_weights",
    "parts_of",
    "scope_key",
    "shape_of",
    "tensor_meta",
]


MUTATES = "mutates"
"""Key in `node.meta`: which of `all_input_nodes` the node was seen to change in place and return."""

_ELEMENTWISE = vocabulary.NORMS | vocabulary.ACTIVATIONS | {"norm_activation"}
_LINEAR = vocabulary.DENSE | vocabulary.NORMS | vocabulary.AVERAGE_POOLS | vocabulary.LAYOUT
_CLAMPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls, None for other nodes."""
    if node.op != "call_module":
        return None
    module: nn.Module = gm
    for part in str(node.target).split("."):
        module = module._modules[part]  # type: ignore[assignment]  # get_submodule, without its checks: it is hot
    return module


def parts_of(module: nn.Module) -> Iterable[nn.Module]:
    """The module and all modules inside it."""
    return module.modules() if module._modules else (module,)  # most are leaves, and `modules` takes its time


def op_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """The canonical word for what a node computes; in-place variants have their plain operator's name."""
    module = module_of(gm, node)
    if module is not None:
        return vocabulary.module_name(module)
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = vocabulary.function_name(node.target) if node.op == "call_function" else str(node.target)
    name = name.rstrip("_") or name
    return vocabulary.ALIASES.get(name, name)


def mutated_input(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose tensor this one changes in place and returns, None when it changes nothing."""
    seen: int | None = node.meta.get(MUTATES)
    if seen is not None:
        return node.all_input_nodes[seen]
    target: Any = node.target
    inplace = False
    if node.op == "call_module":
        inplace = bool(getattr(module_of(gm, node), "inplace", False))
    elif node.op == "call_method":
        inplace = target.endswith("_") and not target.endswith("__")
    elif node.op == "call_function":
        inplace = vocabulary.works_in_place(target) or node.kwargs.get("inplace") is True
    first = argument(node, 0, "input") if inplace else None
    return first if isinstance(first, fx.Node) else None


def tensor_meta(node: fx.Node) -> Any:
    """Shape and dtype of a node's tensor as `TensorMetadata`; None for nodes that hold no single tensor."""
    meta = node.meta.get("tensor_meta")
    return meta if hasattr(meta, "shape") else None


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor, None when it holds none or several."""
    meta = tensor_meta(node)
    return None if meta is None else tuple(meta.shape)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, whether given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def arguments(gm: fx.GraphModule, node: fx.Node) -> Mapping[str, Any]:
    """All arguments of a function by name, defaults filled in; none where torch does not know its signature."""
    normalised = node.normalized_arguments(gm, normalize_to_only_use_kwargs=True)
    return {} if normalised is None else normalised.kwargs


def is_identity(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node returns its first input unchanged in evaluation mode (Identity, idle dropout, clone)."""
    name = op_name(gm, node)
    if name not in ("dropout", "stochastic_depth"):
        return name in ("identity", "copy")
    if node.op == "call_module":
        return True  # tracing is in evaluation mode
    position = 3 if name == "stochastic_depth" else 2
    keyword = "train" if isinstance(node.target, OpOverload) else "training"
    return argument(node, position, keyword, True) is False


def is_elementwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a normalisation, an activation or an identity, so that shape and meaning stay."""
    return op_name(gm, node) in _ELEMENTWISE or is_identity(gm, node)


def is_dense(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a convolution or a linear layer: a map over channels with a weight of its own."""
    return op_name(gm, node) in vocabulary.DENSE


def is_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is linear in its data in evaluation mode (affine counts): the parts of a projection shortcut."""
    return op_name(gm, node) in _LINEAR or is_identity(gm, node)


def fixed_interval(gm: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The interval whose values a clamping activation leaves alone; None for every other node."""
    name = op_name(gm, node)
    if name in _CLAMPS:
        return _CLAMPS[name]
    if name == "hardtanh":
        module = module_of(gm, node)
        if isinstance(module, nn.Hardtanh):
            return float(module.min_val), float(module.max_val)
        return float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    if name in ("clamp", "clip"):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if isinstance(low, (int, float)) and isinstance(high, (int, float)):
            return float(low), float(high)
    return None


def output_interval(gm: fx.GraphModule, node: fx.Node) -> tuple[float, float]:
    """An interval that holds every value of the node, found by looking back through range-keeping operators."""
    for _ in range(8):
        interval = fixed_interval(gm, node)
        if interval is not None:
            return interval
        keeps = is_identity(gm, node) or op_name(gm, node) in vocabulary.POOLS
        if not keeps or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return -math.inf, math.inf


def owns_weights(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node computes with parameters of its own: a module that has some, or a function given some."""
    module = module_of(gm, node)
    if module is not None:  # as module.parameters(), without its checks: it is hot
        return any(p is not None for part in parts_of(module) for p in part._parameters.values())
    if node.op in ("call_function", "call_method"):
        return any(source.op == "get_attr" for source in node.all_input_nodes)
    return False


def _scope(node: fx.Node) -> tuple[str, str]:
    """Key and path of the module call that executed a node; "" for the root's, and a graph module's, which is flat."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    key, (path, kind) = next(reversed(stack.items()))
    if isinstance(kind, type) and issubclass(kind, fx.GraphModule):
        return "", ""
    path = str(path).removeprefix("L['self']").removeprefix(".")
    return str(key) if path else "", path


def scope_key(node: fx.Node) -> str:
    """Identifies the module *call* that executed the node ("" for the root's own forward)."""
    return _scope(node)[0]


def module_path(node: fx.Node) -> str:
    """Path of the module that the node calls, or of the one whose forward executed it; "" for the root."""
    return str(node.target) if node.op == "call_module" else _scope(node)[1]


def is_floating(node: fx.Node) -> bool:
    """Whether the node holds one tensor of a floating-point type."""
    meta = tensor_meta(node)
    return meta is not None and bool(meta.dtype.is_floating_point)
