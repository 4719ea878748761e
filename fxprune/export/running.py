"""A network run once as it will be exported, and what is said where it cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ExportError
from fxprune.export.messages import innermost
from fxprune.graph.call import Inputs

__all__ = ["refusal", "run", "tensors_of"]

_ADVICE = (
    "Look for sizes written as constants (x.view(1, -1): use x.flatten(1)), for graphs that torch.export "
    "captured with a fixed batch (capture them with a dynamic one), and for operators that ONNX lacks"
)


def run(network: nn.Module, rows: Inputs) -> Any:
    """What the network returns; an `ExportError` where it fails, or returns what ONNX cannot."""
    try:
        with torch.no_grad():
            result = network(*rows.args, **rows.kwargs)
    except Exception as error:  # the user's network may raise anything
        raise refusal(network, f"it fails at batch size {rows.batch_size}: {innermost(error)}") from error
    for value in pytree.tree_leaves(result):
        if value is not None and not isinstance(value, Tensor):
            raise refusal(
                network,
                f"its output holds a value of type {type(value).__name__}, and ONNX files return tensors only",
                "Wrap the network in a module that returns its tensors, in a tuple, a list or a dict",
            )
    return result


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of what a network returned, in their order."""
    return [value for value in pytree.tree_leaves(result) if value is not None]


def refusal(network: nn.Module, reason: str, advice: str = _ADVICE) -> ExportError:
    """The error that says why a network cannot be exported."""
    what = f"{type(network).__name__} cannot be written as ONNX with a free batch size"
    return ExportError(f"{what}: {reason}. {advice}")
