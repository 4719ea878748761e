"""Evaluation mode, of the graphs of torch.export too, which refuse `eval()`."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError

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
    # deepcopy refuses tensors with a history: activations that a forward kept, and weights that a hook of
    # torch.nn.utils.prune computed; they are copied without it
    kept = pytree.tree_leaves([vars(module) for module in model.modules()])
    memo = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), so it could not be kept unchanged"
        ) from error
    return to_evaluation(duplicate)
