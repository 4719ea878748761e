"""Which values of a network have a batch dimension, and where in it an image's entries lie: seen, never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import CalibrationSet
from fxprune.discovery.dominance import flow_nodes
from fxprune.errors import GraphError
from fxprune.graph.call import Inputs, bind
from fxprune.graph.extract import share
from fxprune.graph.operators import shape_of
from fxprune.graph.shapes import propagate_shapes

__all__ = ["Keeper", "Rows", "example_batch", "rows_of", "tensors_in"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the entries of one image lie in dimension 0 of a value.

    Attributes:
        each: How many there are.
        apart: Whether they lie a batch apart, as after `torch.cat([left, right])`, and not side by side.
    """

    each: int = 1
    apart: bool = False

    def by_image(self, values: Tensor) -> Tensor:
        """A value as `[images, each, ...]`."""
        if self.apart:
            return values.reshape(self.each, -1, *values.shape[1:]).transpose(0, 1)
        return values.reshape(-1, self.each, *values.shape[1:])

    def joined(self, values: Tensor) -> Tensor:
        """What `by_image` made of a value, as it was."""
        return (values.transpose(0, 1) if self.apart else values).flatten(0, 1)


class Keeper(fx.Interpreter):
    """Runs a graph batch by batch and copies out the values of some nodes.

    Args:
        gm: The graph.
        names: The nodes.

    Attributes:
        kept: The values of each node, one for each batch.
    """

    def __init__(self, gm: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(gm)
        self._gm = gm
        self.kept: dict[str, list[Any]] = {name: [] for name in names}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; kept as a copy, for a later in-place operator may change it."""
        value = super().run_node(n)
        if n.name in self.kept:
            self.kept[n.name].append(pytree.tree_map_only(Tensor, torch.clone, value))
        return value

    @torch.no_grad()
    def see(self, inputs: Inputs) -> None:
        """Runs one batch."""
        self.run(*bind(self._gm, inputs.args, inputs.kwargs), enable_io_processing=False)


def tensors_in(node: fx.Node) -> list[Any]:
    """Shapes and types of the tensors that a node's value is or holds."""
    meta = node.meta.get("tensor_meta")
    return [meta] if hasattr(meta, "shape") else [one for one in meta or () if one is not None]


def example_batch(gm: fx.GraphModule) -> int:
    """Batch size of the example that the graph's shapes come from."""
    inputs = (tensor for node in gm.graph.find_nodes(op="placeholder") for tensor in tensors_in(node))
    return next((int(tensor.shape[0]) for tensor in inputs if tensor.shape), 1)


def rows_of(gm: fx.GraphModule, images: CalibrationSet, device: str) -> dict[str, Rows]:
    """The values that have a batch dimension: dimension 0 grows as the batch does when it is one image larger.

    A constant never does, whatever its shape. Where an image has several entries, two small batches that begin alike
    tell where they lie; a value of neither order is left out.

    Args:
        gm: The network, with shapes, on `device`.
        images: Of which a few are run.
        device: Where.

    Raises:
        GraphError: The network takes batches of one size only.
    """
    batch = example_batch(gm)
    larger = share(gm)
    inputs = images.inputs.select(torch.arange(batch + 1) % images.size).to(device)
    try:
        propagate_shapes(larger, inputs.args, inputs.kwargs)
    except GraphError as error:
        raise GraphError(
            f"the network runs on {batch} images at once but not on {batch + 1}, and they come in batches of several "
            f"sizes: let it take any ({error})"
        ) from error
    grown = {node.name: shape_of(node) for node in larger.graph.nodes}
    found: dict[str, Rows] = {}
    for name, node in flow_nodes(gm).items():
        before, after = shape_of(node), grown[name]
        if before and after and before[1:] == after[1:]:
            each = after[0] - before[0]
            if each > 0 and before[0] == each * batch:
                found[name] = Rows(each)
    return _ordered(gm, found, images, device)


def _ordered(
    gm: fx.GraphModule, found: Mapping[str, Rows], images: CalibrationSet, device: str
) -> dict[str, Rows]:
    several = [name for name, rows in found.items() if rows.each > 1]
    if not several or images.size == 1:
        return dict(found)
    keeper, count = Keeper(gm, several), min(3, images.size)
    for size in (count - 1, count):
        keeper.see(images.example(size).to(device))
    ordered = dict(found)
    for name, (fewer, more) in keeper.kept.items():
        orders = (Rows(found[name].each), Rows(found[name].each, apart=True))
        same = (o for o in orders if _close(o.by_image(more)[: count - 1], o.by_image(fewer)))
        order = next(same, None)
        if order is None:
            del ordered[name]
        else:
            ordered[name] = order
    return ordered


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
