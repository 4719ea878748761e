"""Activations of the original network on the calibration images, computed once and kept within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import OptionError
from fxprune.graph.operators import shape_of, tensor_meta
from fxprune.graph.shapes import bind
from fxprune.recovery.calibration import CalibrationSet

__all__ = ["Activations", "bytes_per_image"]


def bytes_per_image(gm: fx.GraphModule, names: Iterable[str]) -> int:
    """Memory that the values of some nodes take for one image."""
    nodes = {node.name: node for node in gm.graph.nodes}
    total = 0
    for name in set(names):
        shape = shape_of(nodes[name]) or ()
        total += prod(shape) // max(1, shape[0] if shape else 1) * tensor_meta(nodes[name]).dtype.itemsize
    return total


class _Keeper(fx.Interpreter):
    """Runs a graph batch by batch and copies out the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(gm)
        self._names = set(names)
        self.kept: dict[str, list[Tensor]] = {name: [] for name in self._names}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.kept[n.name].append(
                value.detach().clone()
            )  # a later in-place operator may change the original
        return value


class Activations:
    """Values of some nodes for as many calibration images as the budget holds.

    Args:
        gm: The original network, on `device`.
        names: Nodes to keep.
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
        keeper = _Keeper(gm, names)
        with torch.no_grad():
            for batch in calibration.batches(batch_size):
                left = self.images - sum(t.shape[0] for t in next(iter(keeper.kept.values()), []))
                if left <= 0:
                    break
                inputs = (
                    batch.to(device)
                    if batch.batch_size <= left
                    else batch.select(torch.arange(left)).to(device)
                )
                keeper.run(*bind(gm, inputs.args, inputs.kwargs), enable_io_processing=False)
        self._values = {name: torch.cat(parts) for name, parts in keeper.kept.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The values of a node, `[images, ...]`."""
        return self._values[name]
