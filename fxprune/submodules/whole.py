"""The model around a part: what it takes as a whole, with the part or another one in its place; parts likewise."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import CalibrationError
from fxprune.graph.call import Inputs, is_batched
from fxprune.graph.extract import share
from fxprune.graph.weights import hash_weights
from fxprune.submodules.capture import is_list_of_tensors, named
from fxprune.submodules.parts import Parts
from fxprune.submodules.replacement import put_in_place
from fxprune.tracing.evaluation import evaluation_copy

__all__ = ["Whole", "whole_around"]


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A model some parts of which are being compressed.

    Attributes:
        model: A private copy, frozen, on the device where it is timed.
        parts: Of it.
        batch: What the model is called with, to be timed.
        images: How many images that is.
        identity: Tells the model from others around the same parts.
    """

    model: nn.Module
    parts: Parts
    batch: Inputs
    images: int
    identity: str

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the images, the first input, as one batch."""
        lists = _lists_in(self.batch)
        return (self.images, *lists[0][0].shape) if lists else tuple(self.batch.tensors()[0].shape)

    def around(self, network: fx.GraphModule) -> nn.Module:
        """The model with parts, joined in one network, in their places; both share their weights with it."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        whole = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        parts = self.parts.split(share(network)).items()
        for (path, part), call in zip(parts, self.parts.example.calls, strict=True):
            put_in_place(whole, path, part, call)
        return whole


def whole_around(
    model: nn.Module, parts: Parts, taken: Inputs, images: int, device: torch.device | str
) -> Whole:
    """A copy of a model, to be timed with one part or another, once it was seen to run.

    Args:
        model: It is not changed.
        parts: Of it.
        taken: A batch that it takes.
        images: How many images to time the model with. Those of the batch are repeated in turns: the entries of a list
            of tensors, the rows of any other tensor.
        device: Where to time it.

    Raises:
        CalibrationError: It does not run on so many images.
    """
    private = evaluation_copy(model).requires_grad_(False).to(device)
    lists = _lists_in(taken)
    given = len(lists[0]) if lists else taken.batch_size
    try:
        batch = _resized(taken, given, images).to(device)
        with torch.no_grad():
            private(*batch.args, **batch.kwargs)
    except Exception as error:
        raise CalibrationError(
            f"the model around {named(list(parts.graphs))} could not be timed, for it failed on {images} images made "
            f"of a batch of {given}: {type(error).__name__}: {error}. latency_batch={given} takes the batch as it is"
        ) from error
    identity = f"{type(model).__name__} {hash_weights(model)}"
    return Whole(private, replace(parts, example=parts.example.to(device)), batch, images, identity)


def _lists_in(batch: Inputs) -> list[list[Tensor]]:
    return [value for value in (*batch.args, *batch.kwargs.values()) if is_list_of_tensors(value)]


def _resized(batch: Inputs, given: int, wanted: int) -> Inputs:
    if given == wanted:
        return batch
    rows = [i % given for i in range(wanted)]

    def resized(value: Any) -> Any:
        if is_list_of_tensors(value):
            return [value[row] for row in rows]
        return pytree.tree_map_only(is_batched, lambda tensor: tensor[rows], value)

    kwargs = {name: resized(value) for name, value in batch.kwargs.items()}
    return Inputs(tuple(resized(value) for value in batch.args), kwargs)
