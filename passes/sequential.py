"""Passes in a row, and the rows that fxprune itself runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.discovery.discovery import discover
from fxprune.discovery.planned import planned_regions
from fxprune.errors import FxpruneError, GraphError, PreconditionError
from fxprune.graph.examples import example_for
from fxprune.graph.regions import AdaptorSite, Region, every_call
from fxprune.graph.shapes import propagate_shapes
from fxprune.passes.base import FxPass
from fxprune.passes.canonicalize import Canonicalize
from fxprune.passes.drop_regions import DropRegions, dropped_labels
from fxprune.passes.fold_adaptors import FoldAdaptors
from fxprune.passes.insert_adaptors import InsertAdaptors
from fxprune.passes.store_weights import StoreWeights
from fxprune.plan import Plan

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
        regions: As for `DropRegions`; or a plan, whose blocks are looked for in the graph that the pass is given, after
            whatever other passes have made of it. A graph without shapes gets those that the plan's inputs give it.
        maps: The adaptor of each site, as for `InsertAdaptors`; by default the cut stays bare.
        fold: Whether to fold them, or to leave them in place.
    """

    def __init__(
        self,
        regions: Sequence[Region] | Plan,
        maps: Sequence[AdaptorSite] | Mapping[AdaptorSite, Tensor] = (),
        *,
        fold: bool = True,
    ) -> None:
        known: Sequence[Region] = () if isinstance(regions, Plan) else regions
        self._plan = regions if isinstance(regions, Plan) else None
        self._drop, self._count = DropRegions(known), len(every_call(known))
        self._maps, self._fold = maps, fold
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
        if self._plan is not None:
            regions = _regions_of(self._plan, graph_module)
            return Cut(regions, self._maps, fold=self._fold)(graph_module)
        if not self._drop.pending(graph_module):
            return PassResult(graph_module, False)
        return super().call(graph_module)


def _regions_of(plan: Plan, gm: fx.GraphModule) -> tuple[Region, ...]:
    """The regions of a graph that a plan means; none where all of them were dropped already."""
    if {cut.label for cut in plan.cuts} <= dropped_labels(gm):
        return ()
    try:
        if any("tensor_meta" not in node.meta for node in gm.graph.nodes):
            example = example_for(gm, plan.inputs)
            propagate_shapes(gm, example.args, example.kwargs)
        return planned_regions(plan, gm, discover(gm, kinds=plan.kinds))
    except FxpruneError as error:
        raise PreconditionError(f"Cut: {error}", nodes=error.nodes) from error
