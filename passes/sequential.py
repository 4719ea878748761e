"""Passes in a row, and the rows that fxprune itself runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import FxpruneError, GraphError
from fxprune.graph.regions import AdaptorSite, Region
from fxprune.passes.base import FxPass
from fxprune.passes.canonicalize import Canonicalize
from fxprune.passes.drop_regions import DropRegions
from fxprune.passes.fold_adaptors import FoldAdaptors
from fxprune.passes.insert_adaptors import InsertAdaptors
from fxprune.passes.store_weights import StoreWeights

__all__ = ["Cut", "Prepare", "Sequential"]


class Sequential(FxPass):
    """Runs passes one after the other, as one; it changed the graph if any of them did.

    An error keeps its type, and says which pass it came from and which had run before.

    Args:
        *passes: In this order; each checks its own part of the contract.
    """

    def __init__(self, *passes: FxPass) -> None:
        self.passes = passes

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs all of them."""
        modified = False
        done: list[str] = []
        for step in self.passes:
            name = type(step).__name__
            try:
                modified |= step(graph_module).modified
            except FxpruneError as error:
                after = f" after {', '.join(done)}" if done else ""
                raise error.within(f"{type(self).__name__}, in {name}{after}") from error
            done.append(name)
        return PassResult(graph_module, modified)

    def _finish(self, graph_module: fx.GraphModule) -> None:
        """Each pass has linted and recompiled what it changed."""


class Prepare(Sequential):
    """What `compress` does to a graph before it looks for regions: `Canonicalize`, `StoreWeights`."""

    def __init__(self) -> None:
        super().__init__(Canonicalize(), StoreWeights())


class Cut(Sequential):
    """Cuts regions out, and closes the gap with adaptors: `DropRegions`, `InsertAdaptors`, `FoldAdaptors`.

    Where all regions are gone already, nothing happens; where some are, it refuses: adaptors would fold in twice.

    Args:
        regions: As for `DropRegions`; those of a plan are its `regions`.
        maps: The adaptor of each site, as for `InsertAdaptors`; by default the cut stays bare.
        fold: Whether to fold them, or to leave them in place.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        maps: Sequence[AdaptorSite] | Mapping[AdaptorSite, Tensor] = (),
        *,
        fold: bool = True,
    ) -> None:
        self._drop, self._count = DropRegions(regions), len(regions)
        super().__init__(self._drop, InsertAdaptors(maps), *([FoldAdaptors()] if fold else []))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Either all regions are still there, or none."""
        left = [region.label for region in self._drop.pending(graph_module)]
        if 0 < len(left) < self._count:
            raise GraphError(
                f"of {self._count} regions only {', '.join(left)} are still there; cut these alone"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs all of them, once."""
        if not self._drop.pending(graph_module):
            return PassResult(graph_module, False)
        return super().call(graph_module)
