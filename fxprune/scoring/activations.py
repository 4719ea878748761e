"""Activations of the original network on the calibration images, computed once and kept within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.rows import Keeper, Rows, example_batch, tensors_in
from fxprune.errors import OptionError
from fxprune.graph.call import is_batched

__all__ = ["Activations", "bytes_per_image", "memory_of"]


def memory_of(node: fx.Node) -> int:
    """Memory that a node's value takes for the example batch."""
    return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors_in(node))


def bytes_per_image(gm: fx.GraphModule, names: Iterable[str]) -> int:
    """Memory that the values of some nodes take for one image."""
    batch = example_batch(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    return sum(memory_of(nodes[name]) // batch for name in set(names))


class Activations:
    """Values of some nodes for as many calibration images as the budget holds.

    Args:
        gm: The original network, with shapes, on `device`.
        names: Nodes to keep: inputs of the network, which may be numbers or hold several tensors, and those of `rows`.
        rows: Where the images lie in the values of nodes that have a batch dimension.
        calibration: The images.
        device: Where to run and keep.
        budget: Bytes; where all images do not fit, the first ones that do are used.
        batch_size: Images in one forward call.

    Raises:
        OptionError: Not even two images fit.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        names: Sequence[str],
        rows: Mapping[str, Rows],
        calibration: CalibrationSet,
        *,
        device: str,
        budget: int,
        batch_size: int = 64,
    ) -> None:
        size = bytes_per_image(gm, names)
        self.images = min(calibration.size, budget // max(1, size))
        if self.images < min(2, calibration.size):
            raise OptionError(
                f"a cache of {budget / 2**20:.0f} MiB does not hold two images' activations "
                f"({size / 2**20:.1f} MiB each); raise cache_bytes, or use smaller images"
            )
        self.bytes = size * self.images
        keeper = Keeper(gm, names)
        for images in CalibrationSet(calibration.example(self.images)).batches(batch_size):
            keeper.see(images.to(device))
        self._rows = {name: rows.get(name, Rows()) for name in names}
        self._values = {name: _joined(parts, self._rows[name]) for name, parts in keeper.kept.items()}

    def first(self, name: str, stop: int, start: int = 0) -> Any:
        """A copy of a node's value for the images from `start` to `stop`."""
        return self._of(name, lambda values: values[start:stop])

    def select(self, name: str, images: Tensor) -> Any:
        """A copy of a node's value for some images (int64 indices)."""
        return self._of(name, lambda values: values.index_select(0, images))

    def _of(self, name: str, chosen: Callable[[Tensor], Tensor]) -> Any:
        def copy(values: Tensor) -> Tensor:
            return (self._rows[name].joined(chosen(values)) if is_batched(values) else values).clone()

        return pytree.tree_map_only(Tensor, copy, self._values[name])


def _joined(parts: Sequence[Any], rows: Rows) -> Any:
    """The values of several batches as one, images first; what belongs to every image alike is the first batch's."""
    return pytree.tree_map(
        lambda *leaves: (
            torch.cat([rows.by_image(leaf) for leaf in leaves]) if is_batched(leaves[0]) else leaves[0]
        ),
        *parts,
    )
