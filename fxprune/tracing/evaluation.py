"""Evaluation mode, of the graphs of torch.export too, which refuse `eval()`."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.tracing.unwrap import copy_memo

__all__ = ["evaluation_copy", "to_evaluation"]

Module = TypeVar("Module", bound=nn.Module)


def to_evaluation(model: Module) -> Module:
    """Puts a model into evaluation mode, in place.

    Graphs of torch.export carry the mode as constants, and hang methods that raise over `eval` and `train`. These are
    taken off: the two work as on any module, and change nothing that the graph computes.
    """
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            vars(module).pop("eval", None)
            vars(module).pop("train", None)
    return model.eval()


def evaluation_copy(model: Module) -> Module:
    """A deep copy in evaluation mode; the original is left as it is.

    Raises:
        TraceError: The model cannot be copied.
    """
    try:
        duplicate = copy.deepcopy(model, copy_memo(model))
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), so it could not be kept unchanged"
        ) from error
    return to_evaluation(duplicate)
