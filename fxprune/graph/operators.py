"""What the nodes of a graph compute, whichever front end wrote them: small tables and predicates.

A node is named by one canonical word (`add`, `relu`, `conv2d`), whether it is a module call, a function, a
method, or an ATen operator from `torch.export`. Names of functions that are not torch's own are kept whole,
so that a user's function called `dropout` is never taken for torch's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

__all__ = [
    "data_inputs",
    "fixed_interval",
    "is_addition",
    "is_elementwise",
    "is_identity",
    "is_linear",
    "is_subtraction",
    "module_of",
    "module_path",
    "mutated_input",
    "op_name",
    "output_interval",
    "owns_weights",
    "scope_key",
    "shape_of",
    "tensor_meta",
]

TRUSTED = ("torch", "_operator", "operator", "builtins", "torchvision")
"""Root packages whose function names are canonical."""

MODULE_NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.SELU: "selu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.Softplus: "softplus",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Dropout3d: "dropout",
    nn.AlphaDropout: "dropout",
    nn.FeatureAlphaDropout: "dropout",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.LayerNorm: "layer_norm",
    nn.GroupNorm: "group_norm",
    nn.LocalResponseNorm: "local_response_norm",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
    nn.MaxPool3d: "max_pool3d",
    nn.AvgPool3d: "avg_pool3d",
    nn.Flatten: "flatten",
    nn.ZeroPad2d: "pad",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
    nn.MultiheadAttention: "multi_head_attention",
}

ALIASES: dict[str, str] = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "clone": "copy",
    "contiguous": "identity",
    "detach": "identity",
    "alias": "identity",
    "lift_fresh_copy": "copy",
    "concat": "cat",
    "concatenate": "cat",
    "multiply": "mul",
    "feature_dropout": "dropout",
    "dropout2d": "dropout",
    "dropout3d": "dropout",
    "alpha_dropout": "dropout",
    "feature_alpha_dropout": "dropout",
    "native_dropout": "dropout",
    "native_batch_norm": "batch_norm",
    "hardtanh": "hardtanh",
}

INPLACE_FUNCTIONS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.ior}
)
NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "local_response_norm"})
ACTIVATIONS = frozenset(
    {
        "relu", "relu6", "hardtanh", "clamp", "clip", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
        "sigmoid", "tanh", "elu", "celu", "selu", "leaky_relu", "prelu", "softplus",
    }
)  # fmt: skip
CONVOLUTIONS = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    }
)  # fmt: skip
AVERAGE_POOLS = frozenset(
    {
        "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean",
    }
)  # fmt: skip
MAX_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"})
VIEWS = frozenset(
    {
        "getitem", "slice", "select", "narrow", "permute", "transpose", "flatten", "reshape", "view", "squeeze",
        "unsqueeze", "chunk", "split", "unbind", "expand",
    }
)  # fmt: skip
"""Operators whose result may share memory with their input."""
LAYOUT = frozenset(
    {
        "getitem", "slice", "select", "narrow", "index_select", "pad", "constant_pad_nd", "permute", "transpose",
        "flatten", "reshape", "view", "squeeze", "unsqueeze", "zero_pad2d",
    }
)  # fmt: skip


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls, None for other nodes."""
    if node.op != "call_module":
        return None
    module: nn.Module = gm
    for part in str(node.target).split("."):
        module = module._modules[part]  # type: ignore[assignment]  # get_submodule, without its checks: it is hot
    return module


def _function_name(target: Any) -> str:
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        name: str = target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name
        space, _, base = name.partition("::")
        return base if space == "aten" else name
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None)
    if module is None or module.split(".")[0] in TRUSTED:
        return name
    return f"{module}.{name}"


def _module_name(module: nn.Module | None) -> str:
    """A torch module's word; a subclass of a weighted one keeps it unless it holds an activation of its own."""
    for kind in type(module).__mro__:
        name = MODULE_NAMES.get(kind)
        if name is None:
            continue
        if kind is type(module):
            return name
        if name in CONVOLUTIONS or name == "linear":
            return name
        if name in NORMS and module is not None:
            active = any(not isinstance(child, nn.Identity) for child in module.children())
            return "norm_activation" if active else name
        break
    return f"{type(module).__module__}.{type(module).__qualname__}"


def op_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """The canonical word for what a node computes; in-place variants have their plain operator's name."""
    if node.op == "call_module":
        return _module_name(module_of(gm, node))
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _function_name(node.target) if node.op == "call_function" else str(node.target)
    name = name.rstrip("_") or name
    return ALIASES.get(name, name)


def mutated_input(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose tensor this one changes in place, None when it changes nothing."""
    target: Any = node.target
    inplace = False
    if node.op == "call_module":
        inplace = bool(getattr(module_of(gm, node), "inplace", False))
    elif node.op == "call_method":
        inplace = target.endswith("_") and not target.endswith("__")
    elif node.op == "call_function":
        if isinstance(target, OpOverload):
            inplace = target._schema.is_mutable
        else:
            name = getattr(target, "__name__", "")
            inplace = target in INPLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__"))
        inplace = inplace or node.kwargs.get("inplace") is True
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if inplace and isinstance(first, fx.Node) else None


def tensor_meta(node: fx.Node) -> Any:
    """Shape and dtype of a node's tensor as `TensorMetadata`; None for nodes that hold no single tensor."""
    meta = node.meta.get("tensor_meta")
    return meta if hasattr(meta, "shape") else None


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor, None when it holds none or several."""
    meta = tensor_meta(node)
    return None if meta is None else tuple(meta.shape)


def data_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Input nodes, in argument order, each once."""
    yield from dict.fromkeys(node.all_input_nodes)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _is_idle_dropout(gm: fx.GraphModule, node: fx.Node, name: str) -> bool:
    if node.op == "call_module":
        return True  # tracing is in evaluation mode
    if name == "stochastic_depth":
        return _argument(node, 3, "training", True) is False
    return _argument(node, 2, "train" if isinstance(node.target, OpOverload) else "training", True) is False


def is_identity(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node returns its first input unchanged in evaluation mode (Identity, idle dropout, clone)."""
    name = op_name(gm, node)
    if name in ("dropout", "stochastic_depth"):
        return _is_idle_dropout(gm, node, name)
    return name in ("identity", "copy")


def is_addition(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a tensor addition."""
    return op_name(gm, node) == "add"


def is_subtraction(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a tensor subtraction."""
    return op_name(gm, node) == "sub"


def is_elementwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a normalisation, an activation or an identity, so that shape and meaning stay."""
    name = op_name(gm, node)
    return name in NORMS or name in ACTIVATIONS or name == "norm_activation" or is_identity(gm, node)


def is_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is linear in its data in evaluation mode (affine counts): the parts of a projection shortcut."""
    name = op_name(gm, node)
    return (
        name in CONVOLUTIONS
        or name == "linear"
        or name in NORMS
        or name in AVERAGE_POOLS
        or name in LAYOUT
        or is_identity(gm, node)
    )


def fixed_interval(gm: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The interval whose values a clamping activation leaves alone; None for every other node."""
    name = op_name(gm, node)
    if name == "relu":
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        module = module_of(gm, node)
        if isinstance(module, nn.Hardtanh):
            return float(module.min_val), float(module.max_val)
        return float(_argument(node, 1, "min_val", -1.0)), float(_argument(node, 2, "max_val", 1.0))
    if name in ("clamp", "clip"):
        low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
        if isinstance(low, (int, float, type(None))) and isinstance(high, (int, float, type(None))):
            return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return None


def output_interval(gm: fx.GraphModule, node: fx.Node) -> tuple[float, float]:
    """An interval that holds every value of the node, found by looking back through range-keeping operators."""
    for _ in range(8):
        interval = fixed_interval(gm, node)
        if interval is not None:
            return interval
        name = op_name(gm, node)
        if (
            not (is_identity(gm, node) or name in MAX_POOLS or name in AVERAGE_POOLS)
            or not node.all_input_nodes
        ):
            break
        node = node.all_input_nodes[0]
    return -math.inf, math.inf


def owns_weights(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node computes with parameters of its own: a module that has some, or a function given some."""
    module = module_of(gm, node)
    if module is not None:  # as module.parameters(), without its checks: it is hot
        return any(p is not None for part in module.modules() for p in part._parameters.values())
    if node.op in ("call_function", "call_method"):
        return any(source.op == "get_attr" for source in node.all_input_nodes)
    return False


def scope_key(node: fx.Node) -> str:
    """Identifies the module *call* that executed the node ("" for the root's own forward)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(next(reversed(stack))) if path and path != "L['self']" else ""


def module_path(node: fx.Node) -> str:
    """Path of the module that the node calls, or of the one whose forward executed it; "" for the root."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix(".")


def is_floating(node: fx.Node) -> bool:
    """Whether the node holds one tensor of a floating-point type."""
    meta = tensor_meta(node)
    return meta is not None and isinstance(meta.dtype, torch.dtype) and meta.dtype.is_floating_point
