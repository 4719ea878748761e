"""Feature mimicking: a student learns the teacher's features at the tap (MiR, eq. 5; PRACTISE, eq. 1 and 4)."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.calibration.augment import augmentation
from fxprune.errors import CalibrationError
from fxprune.graph.operators import arguments
from fxprune.graph.vocabulary import BATCH_NORM_FUNCTIONS, function_name
from fxprune.optimizers import optimizer_for
from fxprune.options import FitSettings
from fxprune.processes.group import is_main, share_buffers, share_of, sum_gradients, sum_over_ranks
from fxprune.progress import progress as told
from fxprune.recovery.comparison import Comparison
from fxprune.recovery.original import Original

__all__ = [
    "adaptable_norms",
    "fit_features",
    "fixed_norms",
    "optimise",
    "trainable_parameters",
]

logger = logging.getLogger(__name__)


def trainable_parameters(part: fx.GraphModule, whole: fx.GraphModule | None = None) -> list[nn.Parameter]:
    """Parameters that a part computes with; those that the whole network uses elsewhere too stay as they are."""
    uses = _uses(whole or part)
    return [p for p, count in _uses(part).items() if uses[p] == count and p.is_floating_point()]


def _uses(gm: fx.GraphModule) -> Counter[nn.Parameter]:
    """How often a graph computes with each of its parameters."""
    uses: Counter[nn.Parameter] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            uses.update(gm.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            value = attrgetter(str(node.target))(gm)
            if isinstance(value, nn.Parameter):
                uses[value] += len(node.users)
    return uses


def adaptable_norms(part: fx.GraphModule) -> list[_BatchNorm]:
    """Batch norms that can normalise by the batch: those with running statistics that are called once."""
    calls = Counter(str(node.target) for node in part.graph.nodes if node.op == "call_module")
    return [
        module
        for name, module in part.named_modules()
        if isinstance(module, _BatchNorm) and calls[name] == 1 and module.track_running_stats
    ]


def fixed_norms(part: fx.GraphModule) -> list[str]:
    """Nodes of batch norms that keep their running statistics whatever the mode: functions outside of modules."""
    functions = (
        n
        for n in part.graph.nodes
        if n.op == "call_function" and function_name(n.target) in BATCH_NORM_FUNCTIONS
    )
    return [n.name for n in functions if not arguments(part, n).get("training")]


@contextmanager
def _batch_norm_mode(part: fx.GraphModule, mode: str) -> Iterator[None]:
    """Lets batch norms normalise by the batch, or by their running statistics, for a while."""
    norms = adaptable_norms(part)
    before = [norm.training for norm in norms]
    try:
        for norm in norms:
            norm.train(mode == "train")
        yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.train(training)


def optimise(
    parameters: Sequence[nn.Parameter],
    losses: Iterable[Tensor],
    settings: FitSettings,
    *,
    where: str,
    shared: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Steps through an iterable of losses, each computed lazily with the parameters of that moment.

    Args:
        parameters: What to train.
        losses: Of one batch each.
        settings: Optimiser, rate and schedule.
        where: What is trained, for errors.
        shared: Whether each process has its weighted part of every loss, to be added up over all ranks.
        after_step: Called with the number of steps taken, after each.

    Raises:
        CalibrationError: The loss became infinite or NaN.
    """
    optimizer = optimizer_for(parameters, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    for iteration, loss in enumerate(losses):
        whole = sum_over_ranks(loss) if shared else loss
        if not bool(torch.isfinite(whole)):
            raise CalibrationError(
                f"the mimicking loss of {where} is {whole.item()} at iteration {iteration}; the images or the "
                f"weights are out of range, or a learning rate of {settings.learning_rate} is too high"
            )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * settings.rate(iteration) / settings.learning_rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if shared:
            sum_gradients(parameters)
        optimizer.step()
        if after_step is not None:
            after_step(iteration + 1)


def fit_features(
    comparison: Comparison,
    parameters: Sequence[nn.Parameter],
    original: Original,
    settings: FitSettings,
    *,
    progress: bool = False,
    title: str = "mimicking",
    shared: bool = False,
    look: Callable[[int], None] | None = None,
) -> None:
    """Trains some of the student's parameters until its features are the teacher's.

    The teacher is frozen and in evaluation mode. What lies behind the tap, the classifier, is not run at all.

    Args:
        comparison: Of the original network with the one to train.
        parameters: What to train; everything else stays.
        original: Its images, device and seed are used.
        settings: Optimiser, iterations, augmentation, mode of the batch norms.
        progress: Whether to draw a progress bar.
        title: Of the bar, and in errors.
        shared: Whether all ranks train this one network together (see `fxprune.processes.group`): each takes its
            part of every batch, and all end with the same parameters. With `batch_norm="eval"` the steps are those of
            a single process; with `"train"` each rank normalises by its own part, and running statistics are averaged
            at the end.
        look: Called with the number of steps taken, `settings.looks` times at equal distances and at the end, with the
            network in evaluation mode and alike on all ranks.

    Raises:
        CalibrationError: The loss became infinite or NaN.
        DistributedError: Another rank ended.
    """
    augment = augmentation(crop_flip=settings.augment, mix=settings.cutmix)
    size = settings.images_per_step(original.images.pixels)
    batches = original.images.stream(size, settings.iterations, original.seed, augment)

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            part, weight = share_of(batch) if shared else (batch, 1.0)
            loss = comparison.loss(part.to(original.device))
            yield loss * weight if shared else loss

    looked_at = {math.ceil(settings.iterations * (i + 1) / settings.looks) for i in range(settings.looks)}

    def after_step(step: int) -> None:
        tell(1)
        if look is not None and step in looked_at:
            if shared and settings.batch_norm == "train":
                share_buffers(comparison.student)
            with _batch_norm_mode(comparison.student, "eval"), torch.no_grad():
                look(step)

    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with (
            told(title, settings.iterations, "steps", show=progress and is_main()) as tell,
            _batch_norm_mode(comparison.student, settings.batch_norm),
            torch.enable_grad(),
        ):
            optimise(parameters, losses(), settings, where=title, shared=shared, after_step=after_step)
        if shared and settings.batch_norm == "train":
            share_buffers(comparison.student)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
