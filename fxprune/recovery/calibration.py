"""Calibration images: the few unlabelled inputs that all later stages run on, drawn once, held on the CPU.

How a batch is read is told in `fxprune.recovery.inputs`.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.errors import CalibrationError, OptionError
from fxprune.recovery.inputs import Inputs, check_batch, is_batched, read_batch
from fxprune.recovery.loading import RESIZE, iterate, narrow

__all__ = ["CalibrationSet", "Inputs", "draw"]

logger = logging.getLogger(__name__)

STREAMED = 20
"""`draw` looks at no more than `STREAMED * limit` images of a loader whose length it cannot use."""

Augmentation = Callable[[Inputs, torch.Generator], Inputs]


class CalibrationSet:
    """The calibration images; iterating never consumes them, and the same seed gives the same batches.

    Args:
        inputs: All images as one batch, on the CPU.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._size = inputs.batch_size

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"CalibrationSet({self._size} x {[tuple(t.shape[1:]) for t in self._inputs.tensors()]})"

    @property
    def size(self) -> int:
        """Number of images."""
        return self._size

    @property
    def inputs(self) -> Inputs:
        """All images as one batch."""
        return self._inputs

    @property
    def pixels(self) -> int:
        """Height times width of an image; 1 for inputs without such dimensions."""
        return max((t.shape[-2] * t.shape[-1] for t in self._inputs.tensors() if t.ndim >= 4), default=1)

    def example(self, n: int = 1) -> Inputs:
        """The first `n` images, or all if there are fewer."""
        return self._narrow(0, n)

    def batches(self, batch_size: int) -> Iterator[Inputs]:
        """Every image once, in order; the last batch may be smaller.

        Raises:
            OptionError: `batch_size` is below 1.
        """
        _check_positive("batch_size", batch_size)
        for start in range(0, self._size, batch_size):
            yield self._narrow(start, start + batch_size)

    def _narrow(self, start: int, stop: int) -> Inputs:
        return self._inputs.map(lambda tensor: tensor[start:stop])

    def stream(
        self, batch_size: int, iterations: int, seed: int, augment: Augmentation | None = None
    ) -> Iterator[Inputs]:
        """`iterations` batches of `min(batch_size, size)` images, reshuffled every epoch.

        The incomplete batch at the end of an epoch is dropped, so that every batch has the same shape.

        Args:
            batch_size: Images in a batch.
            iterations: Batches in all.
            seed: Fixes order and augmentation; the global random state is neither read nor changed.
            augment: Applied to each batch with a generator of its own.

        Raises:
            OptionError: `batch_size` is below 1 or `iterations` negative.
        """
        _check_positive("batch_size", batch_size)
        if iterations < 0:
            raise OptionError(f"iterations is {iterations}: it counts batches, so give 0 or more.")
        batch_size = min(batch_size, self._size)
        # two generators: switching augmentation on must not change which images come together
        order = torch.Generator().manual_seed(seed)
        noise = torch.Generator().manual_seed(seed + 1)
        per_epoch = self._size // batch_size
        for iteration in range(iterations):
            if iteration % per_epoch == 0:
                permutation = torch.randperm(self._size, generator=order)
            start = iteration % per_epoch * batch_size
            batch = self._inputs.select(permutation[start : start + batch_size])
            yield batch if augment is None else augment(batch, noise)

    def split(self, fraction: float, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Two disjoint sets: the first holds `fraction` of the images, the second the rest; neither is empty.

        Raises:
            OptionError: `fraction` is not strictly between 0 and 1.
            CalibrationError: There is only one image.
        """
        if not 0.0 < fraction < 1.0:
            raise OptionError(f"fraction is {fraction}: give a number strictly between 0 and 1.")
        if self._size < 2:
            raise CalibrationError(
                "One calibration image cannot be split in two sets: give at least two images."
            )
        count = min(max(round(self._size * fraction), 1), self._size - 1)
        permutation = torch.randperm(self._size, generator=torch.Generator().manual_seed(seed))
        first, second = permutation[:count].sort().values, permutation[count:].sort().values
        return CalibrationSet(self._inputs.select(first)), CalibrationSet(self._inputs.select(second))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over structure, shapes, types and bytes: equal exactly when the images are."""
        leaves, structure = pytree.tree_flatten((self._inputs.args, self._inputs.kwargs))
        digest = hashlib.sha256(repr(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(repr(leaf).encode())
        return digest.hexdigest()


def draw(
    loader: object,
    *,
    limit: int = 500,
    seed: int = 0,
    input_fn: Callable[[Any], Any] | None = None,
    names: Sequence[str] = (),
) -> CalibrationSet:
    """Draw the calibration images from a loader, which is iterated once.

    Where there are more than `limit` images, the first ones would often be of one class, so the draw is
    random:

    1. a `Dataset`, and a `DataLoader` over one that goes through it in order or shuffled: `limit` indices
       are drawn first and no other image is loaded;
    2. a tensor, and any other iterable of batches: reservoir sampling (Vitter's algorithm R), which keeps
       `limit` images and one batch in memory, and stops after `STREAMED * limit` images.

    Neither the draw nor its order depends on the batch size or on the global random state, unless the
    loader's own transforms or sampler do.

    Args:
        loader: Batches; or all images as one tensor [N, C, H, W]; or a `Dataset`.
        limit: Images to draw, or all if there are fewer.
        seed: Fixes the draw.
        input_fn: The user's reading of a batch; see `fxprune.recovery.inputs`.
        names: Names of the network's inputs, for batches that are mappings.

    Raises:
        OptionError: `limit` is below 1.
        CalibrationError: The loader is not one, is empty or fails, or a batch cannot be used; the message
            names it.
    """
    _check_positive("limit", limit)
    reservoir = _Reservoir(limit, seed)
    for index, batch in iterate(narrow(loader, limit, seed)):
        inputs = read_batch(batch, index, names=names, input_fn=input_fn)
        check_batch(inputs, index)
        reservoir.add(inputs, index)
        if reservoir.seen >= STREAMED * limit:
            logger.info("Stopped reading the loader after %d images.", reservoir.seen)
            break
    return reservoir.finish()


class _Reservoir:
    """Keeps a uniform sample of the images seen, whatever batches they come in."""

    def __init__(self, limit: int, seed: int) -> None:
        self.seen = 0
        self._limit = limit
        self._random = random.Random(seed)
        self._samples: list[list[Tensor]] = []
        self._leaves: list[Any] = []
        self._structure: pytree.TreeSpec | None = None

    def add(self, inputs: Inputs, index: int) -> None:
        leaves, structure = pytree.tree_flatten((inputs.args, inputs.kwargs))
        if self._structure is None:
            self._leaves, self._structure = leaves, structure
        _check_alike(self._leaves, leaves, index, same_structure=structure == self._structure)
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

    def finish(self) -> CalibrationSet:
        if self._structure is None:
            raise CalibrationError(
                "The loader yields no batch: give at least one image (an iterator that was used before is "
                "exhausted; give the loader itself)."
            )
        if self.seen > len(self._samples):
            logger.info("Drew %d calibration images out of %d.", len(self._samples), self.seen)
        columns = iter(range(len(self._samples[0])))
        leaves = [self._stack(next(columns)) if is_batched(leaf) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return CalibrationSet(Inputs(args, kwargs).to("cpu"))

    def _stack(self, column: int) -> Tensor:
        return torch.stack([sample[column] for sample in self._samples])


_CONSTANT = "what has no batch dimension must be the same for all images; leave it out with input_fn=."


def _check_alike(first: Sequence[Any], leaves: Sequence[Any], index: int, *, same_structure: bool) -> None:
    pairs = list(zip(first, leaves, strict=False))
    if not same_structure or any(is_batched(expected) != is_batched(leaf) for expected, leaf in pairs):
        raise CalibrationError(
            f"Batch {index} is built differently from batch 0: all batches must have the same parts and keys."
        )
    for expected, leaf in pairs:
        if not is_batched(expected):
            if repr(leaf) != repr(expected):
                raise CalibrationError(
                    f"Batch {index} holds {leaf!r} where batch 0 holds {expected!r}: {_CONSTANT}"
                )
            continue
        if leaf.shape[1:] != expected.shape[1:]:
            raise CalibrationError(
                f"Images of mixed sizes: batch {index} holds {tuple(leaf.shape[1:])}, batch 0 "
                f"{tuple(expected.shape[1:])}. {RESIZE}"
            )
        if leaf.dtype != expected.dtype:
            raise CalibrationError(
                f"Batch {index} holds {leaf.dtype}, batch 0 {expected.dtype}: convert all images to one type."
            )


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{name} is {value}: it counts images, so give 1 or more.")
