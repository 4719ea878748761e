"""Paths of modules from the names in an ONNX file: plain ones, for they become Python."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

import onnx
from torch import fx, nn

__all__ = ["identifier", "path_of", "plain_path", "scope_of"]

_TAKEN = frozenset({*dir(nn.Module()), *dir(fx.GraphModule), "meta"})
_EXPORTERS = re.compile(r"val_\d+")
"""What PyTorch's exporter calls constants of its own, without a look at what has that name already."""
_PARAMETERS = (".weight", ".bias", ".w_0", ".b_0", ".running_mean", ".running_var")


def identifier(name: str) -> str:
    """A name that Python takes for that of an argument."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{plain}" if not plain.isidentifier() or keyword.iskeyword(plain) or plain == "self" else plain


def plain_path(parts: Iterable[str]) -> str:
    """A path of letters, digits and underscores, none of its steps a name that something else has."""
    steps = [re.sub(r"\W", "_", step, flags=re.ASCII) for part in parts for step in part.split(".") if step]
    return ".".join(f"{step}_" if step in _TAKEN or _EXPORTERS.fullmatch(step) else step for step in steps)


def scope_of(node: onnx.NodeProto) -> str:
    """Path of the module whose forward an operator belongs to, by what exporters note; "" where they do not."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    if "namespace" in notes:  # "layer1: Sequential/layer1.0: Block/add: aten.add.Tensor"
        around = [part.partition(":")[0].strip() for part in notes["namespace"].split("/")[:-1]]
        return plain_path([around[-1]] if around else [])
    folded: list[str] = []
    for part in node.name.strip("/").split("/")[:-1]:  # "/layer1/layer1.0/conv1/Conv"
        if folded and part.startswith(f"{folded[-1]}."):
            folded[-1] = part
        else:
            folded.append(part)
    return plain_path(folded)


def path_of(node: onnx.NodeProto) -> str:
    """Where the module of an operator with weights is to stand."""
    for name in node.input[1:]:
        owner = next((name.removesuffix(end) for end in _PARAMETERS if name.endswith(end)), "")
        if owner:
            return plain_path([owner])
    return scope_of(node) or plain_path([node.name or f"{node.op_type}_{node.output[0]}"])
