"""The fast scorer: least squares first, then a short fit behind cached activations.

The original runs once over the calibration images; a candidate begins at its *frontier*, the unchanged values that its
changed part reads. Its PRE adaptors start from a closed-form solution, and a short fit of all its adaptors follows. In
its first half that compares at the *waist*, the first value behind all changes that everything goes through: it costs
less, for it runs a part of the network, and leads closer, for it has less between itself and its target. Where the tap
is what the network returns, as of one for segmentation, all steps compare right behind the changes.

A set of regions whose parts were fitted before begins where those ended: at the sum of what their adaptors change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxprune.calibration.rows import rows_of
from fxprune.discovery.dominance import flow_nodes
from fxprune.errors import GraphError
from fxprune.graph.operators import shape_of
from fxprune.graph.regions import Region
from fxprune.options import FitSettings
from fxprune.placement.dense import OperatorIndex
from fxprune.processes.threads import using_threads
from fxprune.recovery.adaptors import AdaptorFit, Candidate, adaptor_weights
from fxprune.recovery.features import feature_loss, relative_loss
from fxprune.recovery.original import Original
from fxprune.recovery.training import optimise
from fxprune.scoring.activations import Activations, bytes_per_image
from fxprune.scoring.changed_part import ChangedPart
from fxprune.scoring.least_squares import start_pre_adaptors

__all__ = ["CachedScorer"]

_DENSE_LOSS_PIXELS = 2**19
"""Pixels (height x width, of all images) that the losses of a network with a dense output are taken over."""


class CachedScorer:
    """Fits the adaptors of many candidates of one network, from one thread or several.

    Args:
        original: The network.
        settings: Of the gradient fit; augmentation does not apply to cached activations.
        cache_bytes: Budget of the cached activations; fits side by side may take a quarter of it more.
        start_images: Images for the least squares, at most; 0 leaves that out.
        loss_images: Images that the losses are taken over, at most; where the tap is what the network returns, a loss
            costs a run of nearly the whole network, and large images are fewer.
        at_waist: Share of a fit's steps that compare at the waist.

    Attributes:
        workers: Fits at once, at least one; on a GPU, which takes one operator after the other, no more.
        peak_bytes: The most that the cache held.
    """

    continues = True

    def __init__(
        self,
        original: Original,
        settings: FitSettings,
        *,
        cache_bytes: int = 2 * 2**30,
        start_images: int = 64,
        loss_images: int = 128,
        at_waist: float = 0.5,
    ) -> None:
        self._original = original
        self._gm, self._tap, self._device = original.graph, original.tap, original.device
        self._rows = rows_of(self._gm, original.images, self._device)
        loose = [name for name in self._tap if name not in self._rows]
        if loose:
            raise GraphError(
                f"dimension 0 of the tap {', '.join(loose)} does not grow with the batch, so it cannot be cached; name "
                "another tap, or use a recipe with scorer='end-to-end'",
                nodes=loose,
            )
        batch = original.images_per_step(settings)
        self._settings, self._cache_bytes = replace(settings, batch_size=batch), cache_bytes
        self._start_images, self._at_waist = start_images, at_waist
        dense = max(1, _DENSE_LOSS_PIXELS // original.images.pixels) if original.is_dense else loss_images
        self._loss_images = min(loss_images, dense)
        self._index = OperatorIndex(self._gm)
        self._cache: Activations | None = None
        self._held: frozenset[str] = frozenset()
        self._waists: frozenset[str] = frozenset()
        self._threads = torch.get_num_threads()
        # torch.fx numbers what it compiles by a global counter, and there is one cache
        self._building = threading.Lock()
        # every value of the network for a batch: what a backward pass reads, and then some
        fit = (
            bytes_per_image(self._gm, [n for n, node in flow_nodes(self._gm).items() if shape_of(node)])
            * batch
        )
        self.workers = max(1, cache_bytes // 4 // max(1, fit)) if self._device.startswith("cpu") else 1
        self.peak_bytes = 0

    @torch.no_grad()
    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Fits the adaptors for dropping a set of regions, and measures the recovery loss.

        From fits of parts of the set, half of the iterations do.
        """
        work, cache = self._work(regions)
        before = self._mean_loss(work, cache)
        self._adapt(work, cache, start, share=0.5 if start else 1.0)
        return AdaptorFit(work.candidate.maps(), self._mean_loss(work, cache), before)

    @torch.no_grad()
    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """Recovery loss after a quarter of the iterations: cheaper, and nearly as good in its order."""
        work, cache = self._work(regions)
        self._adapt(work, cache, start, share=0.25)
        return self._mean_loss(work, cache)

    def release(self) -> None:
        """Frees the cached activations."""
        self._cache = None

    def _part(self, regions: Sequence[Region]) -> ChangedPart:
        candidate = Candidate(self._gm, regions, self._tap)
        return ChangedPart(self._gm, candidate, self._index, self._rows, self._waists)

    def _work(self, regions: Sequence[Region]) -> tuple[ChangedPart, Activations]:
        with self._building:
            work = self._part(regions)
            return work, self._activations((*work.values, *self._tap))

    def _mean_loss(self, work: ChangedPart, cache: Activations) -> float:
        return work.loss(cache, self._tap, min(self._loss_images, cache.images))

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Runs the original once for everything that some candidates will need.

        The first sets announced, the single regions, also settle where later ones have their waists: another would not
        be in the cache.
        """
        names: dict[str, None] = dict.fromkeys(self._tap)
        waists: set[str] = set()
        for regions in sets:
            part = self._part(regions)  # one at a time: each has folded weights of its own
            names.update(dict.fromkeys(part.values))
            waists.update(part.waist)
        self._waists = self._waists or frozenset(waists)
        self._activations(tuple(names))

    def _activations(self, names: Sequence[str]) -> Activations:
        if self._cache is None or not self._held.issuperset(names):
            self._cache = None  # free the old one before the new one grows
            # on all threads, whichever of them asks first: rounding depends on their number
            with using_threads(self._threads):
                wanted, images = list(dict.fromkeys(names)), self._original.images
                self._cache = Activations(
                    self._gm, wanted, self._rows, images, device=self._device, budget=self._cache_bytes
                )
            self._held = frozenset(names)
            self.peak_bytes = max(self.peak_bytes, self._cache.bytes)
        return self._cache

    def _adapt(
        self, work: ChangedPart, cache: Activations, start: Sequence[AdaptorFit], *, share: float
    ) -> None:
        if start:
            work.candidate.begin_at(start)
        elif self._start_images:
            count = min(self._start_images, cache.images)
            inputs = [cache.first(name, count) for name in work.frontier]
            targets = {operator: cache.first(name, count) for operator, name in work.targets.items()}
            start_pre_adaptors(work.to_waist, inputs, targets)
        self._descend(work, cache, replace(self._settings, iterations=int(share * self._settings.iterations)))

    def _descend(self, work: ChangedPart, cache: Activations, settings: FitSettings) -> None:
        parameters = adaptor_weights(work.part)
        if not parameters or not settings.iterations:
            return
        generator = torch.Generator().manual_seed(self._original.seed)

        def losses() -> Iterator[Tensor]:
            batch = min(settings.batch_size, cache.images)
            order = torch.empty(0, dtype=torch.long)
            for iteration in range(settings.iterations):
                if len(order) < batch:
                    order = torch.randperm(cache.images, generator=generator)
                chosen, order = order[:batch].to(self._device), order[batch:]
                part, ends = work.part, self._tap
                if work.far or (work.waist and iteration < self._at_waist * settings.iterations):
                    part, ends = work.to_waist, work.waist
                features = part(*(cache.select(name, chosen) for name in work.frontier))
                wanted = [cache.select(name, chosen) for name in ends]
                yield relative_loss(features, wanted) if work.far else feature_loss(features, wanted)

        title = ", ".join(dict.fromkeys(region.label for region in work.candidate.regions))
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            optimise(parameters, losses(), settings, where=title)
        for parameter in parameters:
            parameter.requires_grad_(False)
