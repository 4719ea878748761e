"""Activations of the original network on the calibration images, computed once and kept within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.calibration.batches import CalibrationSet
from fxprune.errors import OptionError
from fxprune.graph.call import bind
from fxprune.graph.operators import shape_of, tensor_meta

__all__ = ["Activations", "bytes_of", "bytes_per_image", "example_batch", "rows_per_image"]


def example_batch(gm: fx.GraphModule) -> int:
    """Batch size of the example that the graph's shapes come from."""
    shapes = (shape_of(node) for node in gm.graph.find_nodes(op="placeholder"))
    return next((shape[0] for shape in shapes if shape), 1)


def rows_per_image(node: fx.Node, batch: int) -> int:
    """Entries of dimension 0 that one image takes; 0 where dimension 0 does not grow with the batch."""
    shape = shape_of(node)
    return 0 if not shape or shape[0] % batch else shape[0] // batch


def bytes_of(node: fx.Node) -> int:
    """Memory that a node's value takes for the example batch."""
    size: int = prod(shape_of(node) or ()) * tensor_meta(node).dtype.itemsize
    return size


def bytes_per_image(gm: fx.GraphModule, names: Iterable[str]) -> int:
    """Memory that the values of some nodes take for one image."""
    batch = example_batch(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    return sum(bytes_of(nodes[name]) // batch for name in set(names))


class _Keeper(fx.Interpreter):
    """Runs a graph batch by batch and copies out the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(gm)
        self.kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.kept:
            # a copy: a later in-place operator may change the original
            self.kept[n.name].append(value.detach().clone())
        return value


class Activations:
    """Values of some nodes for as many calibration images as the budget holds.

    Args:
        gm: The original network, with shapes, on `device`.
        names: Nodes to keep; dimension 0 of each must grow with the batch.
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
        batch = example_batch(gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        self._rows = {name: rows_per_image(nodes[name], batch) for name in names}
        keeper = _Keeper(gm, names)
        with torch.no_grad():
            for images in CalibrationSet(calibration.example(self.images)).batches(batch_size):
                inputs = images.to(device)
                keeper.run(*bind(gm, inputs.args, inputs.kwargs), enable_io_processing=False)
        self._values = {name: torch.cat(parts) for name, parts in keeper.kept.items()}

    def first(self, name: str, stop: int, start: int = 0) -> Tensor:
        """A copy of a node's values for the images from `start` to `stop`."""
        rows = self._rows[name]
        return self._values[name][start * rows : stop * rows].clone()

    def select(self, name: str, images: Tensor) -> Tensor:
        """A copy of a node's values for some images (int64 indices)."""
        rows, values = self._rows[name], self._values[name]
        if rows == 1:
            return values.index_select(0, images)
        return values.view(self.images, rows, *values.shape[1:]).index_select(0, images).flatten(0, 1)
