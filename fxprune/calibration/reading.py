"""What one batch of a loader means: which of its tensors the network is given, and whether they can be used.

A batch is read as follows, unless the user gives `input_fn`:

1. a tensor is the network's one input;
2. a tuple or list holds the input first; whatever follows (labels) is ignored, which is logged once;
3. a mapping whose keys are all inputs of the network becomes keyword arguments;
4. any other mapping must hold exactly one of `KNOWN_KEYS`, which becomes the one input.

What `input_fn(batch)` returns is taken literally: a tensor is the one input, a tuple the positional
arguments, a mapping the keyword arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import CalibrationError, FxpruneError
from fxprune.graph.call import Inputs

__all__ = ["KNOWN_KEYS", "check_batch", "read_batch"]

logger = logging.getLogger(__name__)

KNOWN_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x", "img")
"""Keys under which a batch that is a mapping may hold the images."""

_ADVICE = "pass input_fn=, from a batch to a tensor, a tuple (arguments) or a dict (keyword arguments)"


def read_batch(
    batch: object,
    index: int,
    *,
    names: Sequence[str] = (),
    input_fn: Callable[[Any], Any] | None = None,
) -> Inputs:
    """The network's inputs in one batch, by the rules of the module docstring.

    Args:
        batch: What the loader yielded.
        index: Its number, for messages; what is ignored is logged for batch 0 only.
        names: Names of the network's inputs.
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
        return _keyword(result)
    raise CalibrationError(
        f"input_fn returned {_kind(result)} for batch {index}: "
        "return a tensor, a tuple (the positional arguments) or a dict (the keyword arguments)."
    )


def _read_by_rules(batch: object, index: int, names: Sequence[str]) -> Inputs:
    if isinstance(batch, Tensor):
        return Inputs((batch,))
    if isinstance(batch, Mapping):
        return _read_mapping(batch, index, names)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        if len(batch) > 1 and index == 0:
            logger.info(
                "Batches have %d parts: the first is the input, the rest (labels) is ignored.", len(batch)
            )
        return _read_by_rules(batch[0], index, names)
    raise CalibrationError(f"Batch {index} is {_kind(batch)}, which holds no tensor of images: {_ADVICE}.")


def _read_mapping(batch: Mapping[Any, Any], index: int, names: Sequence[str]) -> Inputs:
    keys = list(batch)
    if keys and all(key in names for key in keys):
        return _keyword(batch)
    known = [key for key in KNOWN_KEYS if key in batch]
    if len(known) != 1 or not isinstance(batch[known[0]], Tensor):
        found = f"{len(known)} of the known keys" if len(known) != 1 else f"{_kind(batch[known[0]])} there"
        inputs = f" or all be inputs of the network ({', '.join(names)})" if names else ""
        raise CalibrationError(
            f"Batch {index} is a mapping with the keys {', '.join(map(repr, keys)) or '(none)'}, and "
            f"{found}: exactly one key must be one of {', '.join(KNOWN_KEYS)} and hold a tensor{inputs}. "
            f"Else {_ADVICE}."
        )
    if len(keys) > 1 and index == 0:
        logger.info("Batches are mappings: %r is the input, %s ignored.", known[0], set(keys) - {known[0]})
    return Inputs((batch[known[0]],))


def _keyword(batch: Mapping[Any, Any]) -> Inputs:
    # sorted: two mappings that differ in the order of their keys are the same inputs
    return Inputs((), {str(key): batch[key] for key in sorted(batch, key=str)})


def _kind(value: object) -> str:
    inside = f" of {type(value[0]).__name__}" if isinstance(value, (tuple, list)) and value else ""
    return f"a value of type {type(value).__name__}{inside}"


def check_batch(inputs: Inputs, index: int) -> None:
    """Refuse a batch that no network could learn from.

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
