"""The paper's losses of several regions at once: its fits, side by side, on the batches that they share.

With one seed every fit of PRACTISE sees the same batches, and what lies before its first adaptor is what the original
computes. So the original runs once a step, and each fit goes on from there. The losses are those of `EndToEndScorer`
but for rounding; the time is not, so nobody should take the paper's time from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxprune.calibration.augment import augmentation
from fxprune.calibration.rows import rows_of
from fxprune.graph.regions import Region
from fxprune.options import FitSettings
from fxprune.pipeline.job import Job
from fxprune.placement.dense import OperatorIndex
from fxprune.recovery.adaptors import Candidate, adaptor_weights
from fxprune.recovery.features import FeatureReader, feature_loss, mean_feature_loss
from fxprune.scoring.changed_part import ChangedPart

__all__ = ["losses_side_by_side"]


class _Fit:
    """The adaptors of one candidate, and their optimiser."""

    def __init__(self, job: Job, region: Region, index: OperatorIndex, settings: FitSettings) -> None:
        candidate = Candidate(job.original.graph, [region], job.original.tap)
        self.student = FeatureReader(candidate.graph, candidate.tap)
        rows = rows_of(job.original.graph, job.original.images, job.original.device)
        changed = ChangedPart(job.original.graph, candidate, index, rows)
        self.part, self.frontier = changed.part, changed.frontier
        self._settings = settings
        parameters = [weight.requires_grad_() for weight in adaptor_weights(self.part)]
        self._optimizer = (
            torch.optim.SGD(
                parameters,
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )
            if parameters
            else None
        )

    def step(self, iteration: int, inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate(iteration)
        self._optimizer.zero_grad(set_to_none=True)
        feature_loss(self.part(*inputs), wanted).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


def losses_side_by_side(job: Job, regions: Sequence[Region], settings: FitSettings) -> dict[str, float]:
    """Fits the adaptors of each region as PRACTISE does, all at once.

    Args:
        job: The compression.
        regions: Each is a candidate of its own.
        settings: Of each fit: SGD, batch norm in evaluation mode.

    Returns:
        Recovery loss by label, over all calibration images.
    """
    assert settings.optimizer == "sgd" and settings.batch_norm == "eval"
    one = job.original
    index = OperatorIndex(one.graph)
    fits = {region.label: _Fit(job, region, index, settings) for region in regions}
    names = list(dict.fromkeys(name for fit in fits.values() for name in (*fit.frontier, *one.tap)))
    original = FeatureReader(one.graph, names)
    size = settings.images_per_step(one.images.pixels)
    augment = augmentation(crop_flip=settings.augment, mix=settings.cutmix)
    for iteration, batch in enumerate(one.images.stream(size, settings.iterations, one.seed, augment)):
        with torch.no_grad():
            values = dict(zip(names, original(batch.to(one.device)), strict=True))
        for fit in fits.values():
            fit.step(iteration, [values[n] for n in fit.frontier], [values[n] for n in one.tap])
    teacher = FeatureReader(one.graph, one.tap)
    return {
        label: mean_feature_loss(teacher, fit.student, one.images, device=one.device)
        for label, fit in fits.items()
    }
