"""Batch norms and dropout that a graph holds as functions, made modules again.

torch.export writes modules as operators, and the evaluation mode into them as a constant; so does torch.fx with the
functions that a forward calls. As modules they can normalise by the batch, `train()` and `eval()` reach them, and they
stand where the original's stood, so that state dicts keep their keys.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import chain, count
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxprune.graph import operators as ops
from fxprune.graph import vocabulary

__all__ = ["restore_modules"]

_BATCH_NORMS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d
}  # fmt: skip
"""By the dimensions of the input."""
_DROPOUTS: dict[str, type[_DropoutNd]] = {
    "dropout": nn.Dropout, "dropout1d": nn.Dropout1d, "dropout2d": nn.Dropout2d, "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout, "feature_alpha_dropout": nn.FeatureAlphaDropout,
}  # fmt: skip
_FEATURE_DROPOUTS: dict[int, type[_DropoutNd]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def restore_modules(gm: fx.GraphModule) -> None:
    """Lets modules compute what batch norms and dropout in evaluation mode compute as functions.

    Left alone: what is in training mode; batch norms whose weights are computed, or whose statistics are missing, have
    unusual names or lie in a module with other tensors; inputs whose number of dimensions is not known.

    Args:
        gm: Rewritten in place, but for its code.
    """
    for node in list(gm.graph.nodes):
        values = _values(node) if node.op == "call_function" else []
        path = _module_for(gm, node) if values else None
        if path is None:
            continue
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(path, (_data(node),))
        call.meta = dict(values[0].meta)
        for value in values:
            value.replace_all_uses_with(call)
        for gone in (*node.users, node):
            gm.graph.erase_node(gone)
    for node in gm.graph.find_nodes(op="get_attr"):
        if not node.users:
            gm.graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return vocabulary.function_name(node.target).rstrip("_")


def _values(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold a function's value: itself, or reads of the first of several; none if others are read."""
    if _name(node) not in vocabulary.BATCH_NORM_FUNCTIONS - {"batch_norm"}:
        return [node]
    read = [user for user in node.users if user.users]
    return read if all(user.target is operator.getitem and user.args[1] == 0 for user in read) else []


def _data(node: fx.Node) -> fx.Node:
    data = ops.argument(node, 0, "input")
    assert isinstance(data, fx.Node)
    return data


def _module_for(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Path of the module that computes what a function does, made where there is none; None to leave the function."""
    name = _name(node)
    if name not in (*vocabulary.BATCH_NORM_FUNCTIONS, *_DROPOUTS, "feature_dropout"):
        return None
    given, dimensions = ops.arguments(gm, node), _dimensions(_data(node))
    if not given or given.get("training", given.get("train")):
        return None
    if name in vocabulary.BATCH_NORM_FUNCTIONS:
        return _place_batch_norm(gm, given, _BATCH_NORMS.get(dimensions))
    kind = _FEATURE_DROPOUTS.get(dimensions) if name == "feature_dropout" else _DROPOUTS[name]
    if kind is None:
        return None
    inplace = given.get("inplace", vocabulary.works_in_place(node.target))
    return _place_dropout(gm, ops.module_path(node), kind(given["p"], inplace).eval())


def _dimensions(node: fx.Node) -> int:
    """How many dimensions a node's tensor has, by our shapes or by those of torch.export; 0 if that is not known."""
    value = node.meta.get("val")
    return len(ops.shape_of(node) or (value.shape if isinstance(value, Tensor) else ()))


def _place_batch_norm(
    gm: fx.GraphModule, given: Mapping[str, Any], kind: type[_BatchNorm] | None
) -> str | None:
    """Puts a batch norm where its statistics are, once for all calls; None where it would not be what was there."""
    read = {name: given[name] for name in _TENSORS if given.get(name) is not None}
    if kind is None or any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in read.values()):
        return None
    tensors = {name: attrgetter(str(source.target))(gm) for name, source in read.items()}
    path = str(read["running_mean"].target).rpartition(".")[0]
    usual = [read[name].target == f"{path}.{name}" for name in _TENSORS[2:]]
    usual += [isinstance(tensor, nn.Parameter) == (name in _TENSORS[:2]) for name, tensor in tensors.items()]
    if not path or not all(usual):
        return None
    # a momentum of None, which averages over all batches, was written as 0
    norm = kind(len(tensors["running_mean"]), given["eps"], given["momentum"] or None).eval()
    norm.affine = "weight" in tensors
    for name in _TENSORS:
        setattr(norm, name, tensors.get(name))
    there = gm.get_submodule(path)
    if type(there) is not nn.Module:
        same = type(there) is kind and (there.eps, there.momentum) == (norm.eps, norm.momentum)
        return path if same and _agree(there, norm, _TENSORS) else None
    held = [*there._parameters, *there._buffers]
    if not _agree(there, norm, [name for name in held if name != "num_batches_tracked"]):
        return None
    norm._buffers.update(there._buffers)
    norm._non_persistent_buffers_set = there._non_persistent_buffers_set
    norm._modules = there._modules
    gm.set_submodule(path, norm)
    return path


def _agree(one: nn.Module, other: nn.Module, names: Iterable[str]) -> bool:
    """Whether two modules hold the very same tensors under some names."""
    return all(getattr(one, name, None) is getattr(other, name, None) for name in names)


def _place_dropout(gm: fx.GraphModule, path: str, dropout: _DropoutNd) -> str:
    """Puts dropout where the original's module was, else beside what called the function."""
    beside = (f"{path}.dropout{i or ''}".removeprefix(".") for i in count())
    for place in chain([path] if path else [], beside):
        try:
            there = gm.get_submodule(place)
        except AttributeError:
            gm.add_submodule(place, dropout)
            return place
        if type(there) is type(dropout) and (there.p, there.inplace) == (dropout.p, dropout.inplace):
            return place
    raise AssertionError("there is always a free name")
