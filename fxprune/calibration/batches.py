"""The calibration images as one set, held on the CPU: batches, splits, a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.calibration.augment import Augmentation
from fxprune.errors import CalibrationError, OptionError
from fxprune.graph.call import Inputs, is_batched

__all__ = ["CalibrationSet", "check_positive"]

_MOST_PIXELS = 2**20
"""Of the images that a network answers at once."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CalibrationSet:
    """The calibration images; iterating never consumes them, and the same seed gives the same batches.

    Attributes:
        inputs: All images as one batch, on the CPU.
        places: Where each image came in what the loader gave, counted from 0; of a dataset its index there. Empty
            where that is not known.
    """

    inputs: Inputs
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """Number of images."""
        return self.inputs.batch_size

    @property
    def pixels(self) -> int:
        """Height times width of an image; 1 for inputs without such dimensions."""
        return max((t.shape[-2] * t.shape[-1] for t in self.inputs.tensors() if t.ndim >= 4), default=1)

    def example(self, n: int = 1) -> Inputs:
        """The first `n` images, or all if there are fewer."""
        return self._narrow(0, n)

    def batches(self, batch_size: int) -> Iterator[Inputs]:
        """Every image once, in order; the last batch may be smaller, and all are where the images are large.

        Raises:
            OptionError: `batch_size` is below 1.
        """
        check_positive("batch_size", batch_size)
        batch_size = min(batch_size, max(1, _MOST_PIXELS // self.pixels))
        for start in range(0, self.size, batch_size):
            yield self._narrow(start, start + batch_size)

    def _narrow(self, start: int, stop: int) -> Inputs:
        return self.inputs.map(lambda tensor: tensor[start:stop])

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
        check_positive("batch_size", batch_size)
        if iterations < 0:
            raise OptionError(f"iterations is {iterations}: it counts batches, so give 0 or more.")
        batch_size = min(batch_size, self.size)
        # two generators: switching augmentation on must not change which images come together
        order = torch.Generator().manual_seed(seed)
        noise = torch.Generator().manual_seed(seed + 1)
        per_epoch = self.size // batch_size
        for iteration in range(iterations):
            if iteration % per_epoch == 0:
                permutation = torch.randperm(self.size, generator=order)
            start = iteration % per_epoch * batch_size
            batch = self.inputs.select(permutation[start : start + batch_size])
            yield batch if augment is None else augment(batch, noise)

    def split(self, fraction: float, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Two disjoint sets: the first holds `fraction` of the images, the second the rest; neither is empty.

        Raises:
            OptionError: `fraction` is not strictly between 0 and 1.
            CalibrationError: There is only one image.
        """
        if not 0.0 < fraction < 1.0:
            raise OptionError(f"fraction is {fraction}: give a number strictly between 0 and 1.")
        if self.size < 2:
            raise CalibrationError("One image cannot be split in two calibration sets: give two or more.")
        count = min(max(round(self.size * fraction), 1), self.size - 1)
        permutation = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        parts = torch.split(permutation, [count, self.size - count])
        first, second = (self._selected(part.sort().values) for part in parts)
        return first, second

    def _selected(self, index: Tensor) -> CalibrationSet:
        places = tuple(self.places[i] for i in index.tolist()) if self.places else ()
        return CalibrationSet(self.inputs.select(index), places)

    def joined(self, other: CalibrationSet) -> CalibrationSet:
        """The images of this set and then those of another one with the same structure."""
        mine, structure = pytree.tree_flatten((self.inputs.args, self.inputs.kwargs))
        theirs = pytree.tree_leaves((other.inputs.args, other.inputs.kwargs))
        both = [
            torch.cat([one, two]) if is_batched(one) else one for one, two in zip(mine, theirs, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(both, structure)
        return CalibrationSet(replace(self.inputs, args=args, kwargs=kwargs))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over structure, shapes, types and bytes: equal exactly when the images are."""
        leaves, structure = pytree.tree_flatten((self.inputs.args, self.inputs.kwargs))
        digest = hashlib.sha256(repr(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(repr(leaf).encode())
        return digest.hexdigest()


def check_positive(name: str, value: int) -> None:
    """Refuses a count of images below 1."""
    if value < 1:
        raise OptionError(f"{name} is {value}: it counts images, so give 1 or more.")
