"""Calibration images: the few unlabelled inputs that all later stages run on, drawn once, held on the CPU.

How a batch is read is told in `fxprune.calibration.reading`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.calibration.batches import CalibrationSet, check_positive
from fxprune.calibration.loading import RESIZE, iterate, narrow
from fxprune.calibration.reading import NO_NAMES, check_batch, read_batch
from fxprune.errors import CalibrationError
from fxprune.graph.call import Inputs, is_batched

__all__ = ["draw"]

logger = logging.getLogger(__name__)

STREAMED = 20
"""`draw` looks at no more than `STREAMED * limit` images of a loader whose length it cannot use."""


def draw(
    loader: object,
    *,
    limit: int = 500,
    seed: int = 0,
    input_fn: Callable[[Any], Any] | None = None,
    names: Mapping[str, bool] = NO_NAMES,
) -> CalibrationSet:
    """Draws the calibration images from a loader, which is iterated once.

    Where there are more than `limit` images, the first ones would often be of one class, so the draw is random. Of a
    `Dataset`, and of a `DataLoader` that goes through one in order or shuffled, `limit` indices are drawn and no other
    image is loaded. A tensor and any other iterable of batches go through a reservoir (Vitter's algorithm R), which
    keeps `limit` images and one batch in memory, and stops after `STREAMED * limit` images.

    Neither the draw nor its order depends on the batch size or on the global random state, unless the loader's own
    transforms or sampler do.

    Args:
        loader: Batches; or all images as one tensor [N, C, H, W]; or a `Dataset`.
        limit: Images to draw, or all if there are fewer.
        seed: Fixes the draw.
        input_fn: The user's reading of a batch; see `fxprune.calibration.reading`.
        names: The network's inputs by name, and whether each is required.

    Raises:
        OptionError: `limit` is below 1.
        CalibrationError: The loader is not one, is empty or fails, or a batch cannot be used; the message
            names it.
    """
    check_positive("limit", limit)
    reservoir = _Reservoir(limit, seed)
    source, indices = narrow(loader, limit, seed)
    for index, batch in iterate(source):
        inputs = read_batch(batch, index, names=names, input_fn=input_fn)
        check_batch(inputs, index)
        reservoir.add(inputs, index)
        if reservoir.seen >= STREAMED * limit:
            logger.info("Stopped reading the loader after %d images.", reservoir.seen)
            break
    return reservoir.finish(indices)


class _Reservoir:
    """Keeps a uniform sample of the images seen, whatever batches they come in."""

    def __init__(self, limit: int, seed: int) -> None:
        self.seen = 0
        self._limit = limit
        self._random = random.Random(seed)
        self._samples: list[list[Tensor]] = []
        self._places: list[int] = []
        self._first: Inputs | None = None

    def add(self, inputs: Inputs, index: int) -> None:
        self._first = self._first or inputs
        _check_alike(self._first, inputs, index)
        chosen: dict[int, int] = {}
        for row in range(inputs.batch_size):
            slot = self.seen if self.seen < self._limit else self._random.randrange(self.seen + 1)
            if slot < self._limit:
                chosen[slot] = row
            self.seen += 1
        tensors = inputs.tensors()
        for slot, row in chosen.items():
            # cloned: a view would keep its whole batch alive, and some loaders reuse their buffers
            self._samples[slot : slot + 1] = [[tensor[row].detach().cpu().clone() for tensor in tensors]]
            self._places[slot : slot + 1] = [self.seen - inputs.batch_size + row]

    def finish(self, indices: Sequence[int] | None) -> CalibrationSet:
        """The images and their places; `indices`, where given, are those of all that were added, in a dataset."""
        if self._first is None:
            raise CalibrationError(
                "The loader yields no batch: give at least one image (an iterator that was used before is "
                "exhausted; give the loader itself)."
            )
        if self.seen > len(self._samples):
            logger.info("Drew %d calibration images out of %d.", len(self._samples), self.seen)
        columns = zip(*self._samples, strict=True)
        inputs = self._first.map(lambda _: torch.stack(next(columns))).to("cpu")
        places = self._places if indices is None else [indices[place] for place in self._places]
        return CalibrationSet(inputs, tuple(places))


def _check_alike(first: Inputs, inputs: Inputs, index: int) -> None:
    expected_leaves, structure = pytree.tree_flatten((first.args, first.kwargs))
    leaves, own_structure = pytree.tree_flatten((inputs.args, inputs.kwargs))
    pairs = list(zip(expected_leaves, leaves, strict=False))
    alike = all(is_batched(expected) == is_batched(leaf) for expected, leaf in pairs)
    if structure != own_structure or not alike:
        raise CalibrationError(
            f"Batch {index} is built differently from batch 0: all batches must have the same parts and keys."
        )
    for expected, leaf in pairs:
        if not is_batched(expected):
            if repr(leaf) != repr(expected):
                raise CalibrationError(
                    f"Batch {index} holds {leaf!r} where batch 0 holds {expected!r}: what has no batch dimension must "
                    "be the same for all images; leave it out with input_fn=."
                )
        elif leaf.shape[1:] != expected.shape[1:]:
            raise CalibrationError(
                f"Images of mixed sizes: batch {index} holds {tuple(leaf.shape[1:])}, batch 0 "
                f"{tuple(expected.shape[1:])}. {RESIZE}"
            )
        elif leaf.dtype != expected.dtype:
            raise CalibrationError(
                f"Batch {index} holds {leaf.dtype}, batch 0 {expected.dtype}: convert all images to one type."
            )
