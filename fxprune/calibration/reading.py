"""What one batch of a loader means: which of its tensors the network is given, and whether they can be used.

A batch is read as follows, unless the user gives `input_fn`:

1. a tensor is the network's one input;
2. a tuple or list holds the inputs first, as many as `forward` requires, by themselves or as a tuple of their own;
   whatever follows (labels) is ignored;
3. a mapping that holds all required inputs of the network becomes keyword arguments;
4. any other mapping must hold exactly one of `KNOWN_KEYS`, which becomes the one input.

Labels (`LABEL_KEYS`) are never passed on, for a network that is given them may end in its loss, unless `forward`
requires them. What is ignored is logged once.

What `input_fn(batch)` returns is taken literally: a tensor is the one input, a tuple the positional
arguments, a mapping the keyword arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import CalibrationError, FxpruneError
from fxprune.graph.call import Inputs

__all__ = ["KNOWN_KEYS", "LABEL_KEYS", "NO_NAMES", "check_batch", "read_batch", "read_keywords"]

logger = logging.getLogger(__name__)

KNOWN_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x", "img")
"""Keys under which a batch that is a mapping may hold the images."""

LABEL_KEYS = frozenset(
    ("label", "labels", "label_ids", "class_labels", "mask_labels", "target", "targets", "return_loss")
)
"""Keys under which a batch that is a mapping holds what the network should answer."""

NO_NAMES: Mapping[str, bool] = MappingProxyType({})
"""Of a network whose inputs are not known."""

_ADVICE = "pass input_fn=, from a batch to a tensor, a tuple (arguments) or a dict (keyword arguments)"


def read_batch(
    batch: object,
    index: int,
    *,
    names: Mapping[str, bool] = NO_NAMES,
    input_fn: Callable[[Any], Any] | None = None,
) -> Inputs:
    """The network's inputs in one batch, by the rules of the module docstring.

    Args:
        batch: What the loader yielded.
        index: Its number, for messages; what is ignored is logged for batch 0 only.
        names: The network's inputs by name, and whether each is required.
        input_fn: The user's own reading, which replaces the rules.

    Raises:
        CalibrationError: The batch cannot be read, or `input_fn` failed.
    """
    if input_fn is None:
        return _read_by_rules(batch, index, names)
    try:
        result = input_fn(batch)
    except FxpruneError:
        raise
    except Exception as error:
        gist = f"{type(error).__name__}: {error}"
        raise CalibrationError(f"input_fn failed on batch {index}: {gist}") from error
    if isinstance(result, Tensor):
        result = (result,)
    if isinstance(result, tuple):
        return Inputs(result)
    if isinstance(result, Mapping):
        return _keyword(result, names)
    raise CalibrationError(
        f"input_fn returned {_kind(result)} for batch {index}: "
        "return a tensor, a tuple (the positional arguments) or a dict (the keyword arguments)."
    )


def _read_by_rules(batch: object, index: int, names: Mapping[str, bool]) -> Inputs:
    if isinstance(batch, Mapping):
        return _read_mapping(batch, index, names)
    required = [name for name, needed in names.items() if needed]
    if isinstance(batch, Tensor) and len(required) < 2:
        return Inputs((batch,))
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else ()
    nested = (tuple, list, Mapping) if len(required) > 1 else Mapping
    if parts and isinstance(parts[0], nested):
        _note_rest(parts, 1, index)
        return _read_by_rules(parts[0], index, names)
    count = max(1, len(required))
    if len(parts) >= count and all(isinstance(part, Tensor) for part in parts[:count]):
        _note_rest(parts, count, index)
        return Inputs(parts[:count])
    if len(required) > 1:
        wanted = ", ".join(required)
        raise CalibrationError(f"Batch {index} is {_kind(batch)}, and the network takes {wanted}: {_ADVICE}.")
    if parts and isinstance(parts[0], (tuple, list)) and parts[0] and isinstance(parts[0][0], Tensor):
        raise CalibrationError(
            f"Batch {index} begins with a list of tensors, as those of detectors do: compress a part of the detector, "
            f"such as its backbone, with submodule=. Else {_ADVICE}."
        )
    raise CalibrationError(f"Batch {index} is {_kind(batch)}, which holds no tensor of images: {_ADVICE}.")


def _note_rest(parts: Sequence[Any], count: int, index: int) -> None:
    if len(parts) > count and index == 0:
        what = "first is the input" if count == 1 else f"first {count} are the inputs"
        logger.info("Batches have %d parts: the %s, the rest (labels) is ignored.", len(parts), what)


def read_keywords(batch: Mapping[Any, Any], index: int, names: Mapping[str, bool]) -> Inputs | None:
    """Those entries of a mapping that a network takes by name; None where they are not what it requires."""
    taken = {key: batch[key] for key in batch if key in names and (key not in LABEL_KEYS or names[key])}
    complete = all(name in taken for name, needed in names.items() if needed)
    if not complete or not any(isinstance(value, Tensor) for value in taken.values()):
        return None
    _note_left(batch, taken, index)
    return _keyword(taken, names)


def _note_left(batch: Mapping[Any, Any], taken: Collection[Any], index: int) -> None:
    left = [str(key) for key in batch if key not in taken]
    if left and index == 0:
        logger.info(
            "Batches are mappings: %s passed on, %s ignored.", ", ".join(map(str, taken)), ", ".join(left)
        )


def _read_mapping(batch: Mapping[Any, Any], index: int, names: Mapping[str, bool]) -> Inputs:
    keywords = read_keywords(batch, index, names)
    if keywords is not None:
        return keywords
    known = [key for key in KNOWN_KEYS if key in batch]
    if len(known) != 1 or not isinstance(batch[known[0]], Tensor):
        found = f"{len(known)} of the known keys" if len(known) != 1 else f"{_kind(batch[known[0]])} there"
        inputs = f" or all be inputs of the network ({', '.join(names)})" if names else ""
        keys = ", ".join(map(repr, batch)) or "(none)"
        raise CalibrationError(
            f"Batch {index} is a mapping with the keys {keys}, and {found}: exactly one key must be one of "
            f"{', '.join(KNOWN_KEYS)} and hold a tensor{inputs}. Else {_ADVICE}."
        )
    _note_left(batch, known, index)
    return Inputs((batch[known[0]],))


def _keyword(batch: Mapping[Any, Any], names: Mapping[str, bool]) -> Inputs:
    # two mappings that differ in the order of their keys are the same inputs; in the order of `forward` the graph takes
    # them by position too
    keys = [*(name for name in names if name in batch), *sorted(batch.keys() - names.keys(), key=str)]
    return Inputs((), {str(key): batch[key] for key in keys})


def _kind(value: object) -> str:
    inside = f" of {type(value[0]).__name__}" if isinstance(value, (tuple, list)) and value else ""
    return f"a value of type {type(value).__name__}{inside}"


def check_batch(inputs: Inputs, index: int) -> None:
    """Refuses a batch that no network could learn from.

    Raises:
        CalibrationError: There are no images, they are not floating-point or not finite, or the tensors
            disagree on how many there are.
    """
    tensors = inputs.tensors()
    if not tensors:
        raise CalibrationError(f"Batch {index} holds no tensor with a batch dimension: {_ADVICE}.")
    if any(tensor.is_meta or tensor.layout is not torch.strided for tensor in tensors):
        raise CalibrationError(
            f"Batch {index} holds a sparse tensor or one on the meta device: give plain tensors with values."
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CalibrationError(
            f"Batch {index} is empty (shape {shapes}): leave such batches out of the loader."
        )
    sizes = [len(tensor) for tensor in tensors]
    if len(set(sizes)) > 1:
        raise CalibrationError(
            f"The tensors of batch {index} hold {', '.join(map(str, sizes))} images: dimension 0 must be the batch."
        )
    # arguments have an order, keywords have none: there any floating tensor may be the images
    candidates = tensors[:1] if inputs.args else tensors
    if not any(tensor.is_floating_point() for tensor in candidates):
        raise CalibrationError(
            f"Batch {index} holds {candidates[0].dtype}, not floating-point images: convert and normalise "
            "them as for training (8-bit images: .float() / 255, minus mean, over standard deviation)."
        )
    if inputs.args and tensors[0].ndim < 2:
        raise CalibrationError(
            f"Batch {index} has shape {tuple(tensors[0].shape)}: images need a batch dimension and at least one more."
        )
    for tensor in tensors:
        rows = (~torch.isfinite(tensor.reshape(sizes[0], -1))).any(dim=1).nonzero().flatten().tolist()
        if rows:
            raise CalibrationError(
                f"Batch {index} holds NaN or infinite values (image {', '.join(map(str, rows[:5]))} "
                "of the batch): find the image or the transform that makes them."
            )
