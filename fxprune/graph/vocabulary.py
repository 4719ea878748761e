"""The words for what nodes compute: one canonical name for modules, functions, methods and ATen operators alike.

Tables, and the functions that look a target up in them. Names of functions that are not torch's own are kept whole,
so that a user's function called `dropout` is never taken for torch's.
"""

from __future__ import annotations

import operator
import re
from functools import lru_cache
from typing import Any

from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

__all__ = [
    "ACTIVATIONS",
    "ALIASES",
    "AVERAGE_POOLS",
    "BATCH_NORM_FUNCTIONS",
    "CONVOLUTIONS",
    "DENSE",
    "LAYOUT",
    "NORMS",
    "POOLS",
    "VIEWS",
    "function_name",
    "has_word",
    "is_torchs_own",
    "module_name",
    "works_in_place",
]

OWN = ("torch", "_operator", "operator", "builtins")
"""Root packages whose functions change nothing but what their names say."""
TRUSTED = (*OWN, "torchvision")
"""Root packages whose function names are canonical."""

_NAMED_ALIKE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
    nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.PReLU, nn.Softplus, nn.Flatten, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear,
)  # fmt: skip
_NAMED_IN_WORDS = (
    nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NAMED_OTHERWISE: dict[str, tuple[type[nn.Module], ...]] = {
    "leaky_relu": (nn.LeakyReLU,),
    "dropout": (
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    ),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "instance_norm": (nn.InstanceNorm2d,),
    "pad": (nn.ZeroPad2d,),
    "multi_head_attention": (nn.MultiheadAttention,),
}  # fmt: skip
MODULE_NAMES: dict[type[nn.Module], str] = {
    **{kind: kind.__name__.lower() for kind in _NAMED_ALIKE},
    **{kind: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower() for kind in _NAMED_IN_WORDS},
    **{kind: name for name, kinds in _NAMED_OTHERWISE.items() for kind in kinds},
}

_OTHER_NAMES = {
    "add": "iadd",
    "sub": "isub",
    "mul": "imul multiply",
    "div": "itruediv truediv",
    "copy": "clone lift_fresh_copy",
    "identity": "contiguous detach alias",
    "cat": "concat concatenate",
    "dropout": "feature_dropout dropout2d dropout3d alpha_dropout feature_alpha_dropout native_dropout",
    "batch_norm": "native_batch_norm",
}
ALIASES = {alias: name for name, aliases in _OTHER_NAMES.items() for alias in aliases.split()}
INPLACE_FUNCTIONS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.ior}
)
BATCH_NORM_FUNCTIONS = frozenset(
    {
        "batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
    }
)  # fmt: skip
"""Functions that normalise by running statistics unless they are told to train; most return several tensors."""
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
LAYOUT = VIEWS - {"chunk", "split", "unbind", "expand"} | {"index_select", "pad", "constant_pad_nd"}
DENSE = CONVOLUTIONS | {"linear"}
"""Maps over channels with a weight of their own."""
POOLS = AVERAGE_POOLS | MAX_POOLS


@lru_cache(maxsize=4096)  # few functions, many nodes
def function_name(target: Any) -> str:
    """A function's word before aliases and in-place underscores are resolved."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        name: str = target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name
        space, _, base = name.partition("::")
        return base if space == "aten" else name
    name = getattr(target, "__name__", str(target))
    return name if _is_of(TRUSTED, target) else f"{target.__module__}.{name}"


def _is_of(packages: tuple[str, ...], target: Any) -> bool:
    module = getattr(target, "__module__", None)
    return module is None or module.split(".")[0] in packages


def is_torchs_own(target: Any) -> bool:
    """Whether a function is torch's or Python's own, so that it changes nothing but what its name says."""
    return isinstance(target, (OpOverload, OpOverloadPacket)) or _is_of(OWN, target)


def module_name(module: nn.Module) -> str:
    """A torch module's word; a subclass of a weighted one keeps it unless it holds an activation of its own."""
    for kind in type(module).__mro__:
        name = MODULE_NAMES.get(kind)
        if name is None:
            continue
        if kind is type(module):
            return name
        if name in DENSE:
            return name
        if name in NORMS:
            active = any(not isinstance(child, nn.Identity) for child in module.children())
            return "norm_activation" if active else name
        break
    return f"{type(module).__module__}.{type(module).__qualname__}"


def has_word(module: nn.Module) -> bool:
    """Whether there is a word for what a module does, rather than its type's name."""
    return "." not in module_name(module)


@lru_cache(maxsize=4096)
def works_in_place(target: Any) -> bool:
    """Whether a function changes its first argument, whatever it is given."""
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    name = getattr(target, "__name__", "")
    return target in INPLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__"))
