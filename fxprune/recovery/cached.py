"""The fast scorer: least squares first, then a few steps behind cached activations.

What lies before the first adaptor is the same in the original and in every candidate. So the original runs once over
the calibration images; a candidate begins at its *frontier*, the unchanged values that its changed part reads. Its PRE
adaptors start from a closed-form solution, and a short gradient fit of all its adaptors ends at the tap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from fxprune.graph.dense import OperatorIndex
from fxprune.graph.extract import between, descendants
from fxprune.graph.regions import Region, Side
from fxprune.options import FitSettings
from fxprune.recovery.activations import Activations
from fxprune.recovery.adaptors import AdaptorFit, Candidate
from fxprune.recovery.calibration import CalibrationSet
from fxprune.recovery.least_squares import start_pre_adaptors
from fxprune.recovery.mimic import feature_loss, optimise

__all__ = ["CachedScorer"]


class CachedScorer:
    """Fits the adaptors of many candidates of one network.

    Args:
        gm: The original, frozen, with shapes, on `device`.
        tap: Where features are compared.
        calibration: The images.
        settings: Of the gradient fit; augmentation does not apply to cached activations.
        device: Where to run.
        seed: Of the order of batches.
        cache_bytes: Budget of the cached activations.
        start_images: Images for the least squares, at most.
        loss_images: Images that the losses are taken over, at most.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        tap: Sequence[str],
        calibration: CalibrationSet,
        settings: FitSettings,
        *,
        device: str,
        seed: int,
        cache_bytes: int = 2 * 2**30,
        start_images: int = 64,
        loss_images: int = 256,
    ) -> None:
        self._gm = gm
        self._tap = tuple(tap)
        self._calibration = calibration
        self._settings = settings
        self._device = device
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._start_images = start_images
        self._loss_images = loss_images
        self._index = OperatorIndex(gm)
        self._cache: Activations | None = None
        self._held: frozenset[str] = frozenset()
        self.peak_bytes = 0

    def fit(self, regions: Sequence[Region]) -> AdaptorFit:
        """Fits the adaptors for dropping a set of regions, and measures the recovery loss."""
        return self._fit(regions, descend=True)

    def estimate(self, regions: Sequence[Region]) -> float:
        """Recovery loss with the closed-form adaptors alone: cheap, and right in its order."""
        return self._fit(regions, descend=False).loss

    @torch.no_grad()
    def _fit(self, regions: Sequence[Region], *, descend: bool) -> AdaptorFit:
        work = _Work(self._gm, Candidate(self._gm, regions, self._tap), self._index)
        cache = self._activations((*work.frontier, *work.targets.values(), *self._tap))
        count = min(self._loss_images, cache.images)
        before = work.loss(cache, self._tap, count) if descend else float("nan")
        self._start(work, cache)
        if descend:
            self._descend(work, cache)
        return AdaptorFit(work.candidate.maps(), work.loss(cache, self._tap, count), before)

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Runs the original once for everything that some candidates will need."""
        names: dict[str, None] = dict.fromkeys(self._tap)
        for regions in sets:
            work = _Work(self._gm, Candidate(self._gm, regions, self._tap), self._index)
            names.update(dict.fromkeys((*work.frontier, *work.targets.values())))
        self._activations(tuple(names))

    def _activations(self, names: Sequence[str]) -> Activations:
        if self._cache is None or not self._held.issuperset(names):
            self._cache = None  # free the old one before the new one grows
            self._cache = Activations(
                self._gm,
                list(dict.fromkeys(names)),
                self._calibration,
                device=self._device,
                budget=self._cache_bytes,
            )
            self._held = frozenset(names)
            self.peak_bytes = max(self.peak_bytes, self._cache.bytes)
        return self._cache

    def _start(self, work: _Work, cache: Activations) -> None:
        count = min(self._start_images, cache.images)
        inputs = [cache[name][:count].clone() for name in work.frontier]
        targets = {operator: cache[name][:count] for operator, name in work.targets.items()}
        start_pre_adaptors(work.part, inputs, targets)

    def _descend(self, work: _Work, cache: Activations) -> None:
        parameters = [adaptor.weight for adaptor in work.candidate.adaptors.values()]
        if not parameters or not self._settings.iterations:
            return
        generator = torch.Generator().manual_seed(self._seed)

        def losses() -> Iterator[Tensor]:
            batch = min(self._settings.batch_size, cache.images)
            order = torch.empty(0, dtype=torch.long)
            for _ in range(self._settings.iterations):
                if len(order) < batch:
                    order = torch.randperm(cache.images, generator=generator)
                chosen, order = order[:batch].to(self._device), order[batch:]
                features = work.part(*(cache[name].index_select(0, chosen) for name in work.frontier))
                yield feature_loss(features, [cache[name].index_select(0, chosen) for name in self._tap])

        title = ", ".join(region.label for region in work.candidate.regions)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            optimise(parameters, losses(), self._settings, where=title)
        for parameter in parameters:
            parameter.requires_grad_(False)


class _Work:
    """A candidate cut down to what its adaptors change."""

    def __init__(self, gm: fx.GraphModule, candidate: Candidate, index: OperatorIndex) -> None:
        self.candidate = candidate
        graph = candidate.graph.graph
        adaptors = candidate.adaptor_nodes()
        dropped = {name for region in candidate.regions for name in region.body}
        changed = descendants(candidate.graph, adaptors)
        changed |= descendants(candidate.graph, _below_cut(candidate))
        nodes = {node.name: node for node in graph.nodes}
        needed = _ancestors(nodes, candidate.tap)
        self.frontier = list(
            dict.fromkeys(
                source.name
                for node in graph.nodes
                if node.name in changed and node.name in needed and node.op != "output"
                for source in node.all_input_nodes
                if source.name not in changed
                and source.op != "get_attr"
                and source.meta.get("tensor_meta") is not None
            )
        )
        outside = [name for name in candidate.tap if name not in changed]
        self.frontier += [name for name in outside if name not in self.frontier]
        self.part = between(candidate.graph, self.frontier, list(candidate.tap))
        self.targets: Mapping[str, str] = {
            site.operator: index[site.operator].data[0]
            for site in candidate.adaptors
            if site.side is Side.PRE
            and index[site.operator].data[0] not in dropped - {r.exit for r in candidate.regions}
        }

    def loss(self, cache: Activations, tap: Sequence[str], images: int, batch_size: int = 64) -> float:
        """Mean squared error at the tap over the first cached images."""
        total = 0.0
        for start in range(0, images, batch_size):
            stop = min(start + batch_size, images)
            features = self.part(*(cache[name][start:stop].clone() for name in self.frontier))
            total += float(feature_loss(features, [cache[name][start:stop] for name in tap])) * (stop - start)
        return total / images


def _below_cut(candidate: Candidate) -> list[str]:
    """Users of the bypasses that read another value than in the original, now that the regions are gone."""
    names = {node.name: node for node in candidate.graph.graph.nodes}
    return [
        user.name
        for region in candidate.regions
        if region.bypass in names
        for user in names[region.bypass].users
        if user.op != "output"
    ]


def _ancestors(nodes: Mapping[str, fx.Node], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in found:
            found.add(name)
            stack.extend(source.name for source in nodes[name].all_input_nodes)
    return found
