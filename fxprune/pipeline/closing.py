"""Closing a job: the report, the files, and the network as the caller asked for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from fxprune.artifacts.placing import in_place
from fxprune.artifacts.recipe import ORIGIN, Origin
from fxprune.artifacts.results import SWEEP_FILES, Results
from fxprune.artifacts.saving import FILES, close_folder, write_plan
from fxprune.discovery.planned import plan_of
from fxprune.errors import AgreementError, ArtifactError, ExportError, ParityError
from fxprune.export.artifact import save
from fxprune.files import write_text_atomic
from fxprune.graph.call import Inputs
from fxprune.graph.examples import describe
from fxprune.graph.weights import hash_weights
from fxprune.judging.answers import changes
from fxprune.judging.judge import Judgement
from fxprune.measurements import LatencyComparison
from fxprune.pipeline.clock import compare_networks, compare_parts
from fxprune.pipeline.exports import write_onnx
from fxprune.pipeline.job import Job
from fxprune.pipeline.stages import worst_fold_error
from fxprune.processes.group import is_main, on_main, same_everywhere
from fxprune.recovery.fidelity import overfitted
from fxprune.recovery.recover import Recovered
from fxprune.reports.compression import REPORT, CompressionReport
from fxprune.reports.layout import layout
from fxprune.reports.page import PAGE, page
from fxprune.reports.sweep import SweepPoint, SweepReport, left_out
from fxprune.selection.plans import BlockScore, DropPlan
from fxprune.submodules.parts import as_returned
from fxprune.timing.environment import peak_memory, versions

__all__ = ["close", "close_sweep"]

logger = logging.getLogger(__name__)

Figure = TypeVar("Figure")


def close(job: Job, plan: DropPlan, recovered: Recovered) -> nn.Module:
    """Writes the network where a folder was given, measures it, reports, and puts it where the caller asked for it.

    Raises:
        AgreementError: `min_agreement` is missed, by the network or in eight bits; the folder holds what was reached.
        ExportError: A file that was asked for cannot be written, a `ParityError` where one would be wrong; the folder
            holds all others.
    """
    small, example = as_returned(recovered.graph), job.original.images.example(2)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name in job.trainable)
    origin = _origin(job, plan, example)
    results = Results(job.folder if is_main() else None, "report.json", FILES)
    results.begin()
    results.write(lambda folder: save(small, folder, example_inputs=example))
    results.write(lambda folder: write_plan(folder, origin))
    with job.stage("measurement"):
        latency = on_main(lambda: compare_networks(job, [small])[0])
        part = on_main(lambda: compare_parts(job, small))
    with job.stage("evaluation"):
        judged = job.judge(small)
    report = replace(_report(job, plan, recovered, latency, judged), part_latency=part)
    if job.options.onnx:
        report = replace(report, fewer_bits=write_onnx(job, results, small, plan.chosen))
    shown = _ended(report, results)
    results.write(lambda folder: write_text_atomic(folder / PAGE, page(shown)))
    report = _ended(report, results)
    results.end(report.to_json())
    results.write(lambda folder: close_folder(folder, small, origin))
    _require_agreement(job, report)
    failures = same_everywhere([str(error) for error in results.failures])
    if failures and job.options.onnx:
        message = f"{'; '.join(failures)}. {job.folder} holds what could be written"
        wrong = [error for error in results.failures if isinstance(error, (AgreementError, ParityError))]
        raise wrong[0].saying(message) if wrong else ExportError(message)
    small.meta.update({REPORT: report, ORIGIN: origin})
    return small if job.parts is None else in_place(job.model, job.parts, small)


def _origin(job: Job, plan: DropPlan, example: Inputs) -> Origin:
    options = job.options
    made = plan_of(plan.regions, options.kinds, describe(example))
    return Origin(made, options.front_end, options.submodule, hash_weights(job.original.graph))


def close_sweep(job: Job, scores: tuple[BlockScore, ...], points: tuple[SweepPoint, ...]) -> SweepReport:
    """The report of a sweep; it and its plots are written where a folder was given."""
    results = Results(job.folder if is_main() else None, SWEEP_FILES[0], SWEEP_FILES[1:])
    results.begin()
    report = SweepReport(
        points=points,
        scores=scores,
        accuracy=job.judged.figure,
        labelled=None if job.judged.accuracy is None else job.judged.accuracy.images,
        entropy=job.entropy,
        settings=job.settings(),
        durations=job.stage.seconds,
        versions=versions(job.original.device),
        notes=(*job.notes, *left_out(scores)),
    )
    for name, plot in report.plots().items():
        results.write(_text_writer(name, plot))
    report = replace(report, files=results.hashes())
    results.end(report.to_json())
    if results.failures:
        raise ArtifactError("; ".join(map(str, results.failures)))
    return report


def _text_writer(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: write_text_atomic(folder / name, text)


def _ended(report: CompressionReport, results: Results) -> CompressionReport:
    """The report with what could not be written, and what is known of what was."""
    notes = (*results.notes, *map(str, results.failures))
    notes, files = same_everywhere((notes, results.hashes()))
    return replace(report, notes=(*report.notes, *notes), files=files)


def _report(
    job: Job, plan: DropPlan, recovered: Recovered, latency: LatencyComparison, judged: Judgement
) -> CompressionReport:
    fold_error = recovered.fold_error
    doubts = [note for note in (overfitted(recovered.after), _unsaved(job)) if note is not None]
    for doubt in doubts:
        logger.warning("%s", doubt)
    images = (job.original.images, job.held_back, job.original.device)
    classes = on_main(lambda: changes(job.original.graph, recovered.graph, *images))
    return CompressionReport(
        plan=plan,
        latency=latency,
        rejections=job.discovery.rejections,
        fidelity_before=recovered.before,
        fidelity_after=recovered.after,
        mimicking=recovered.mimicking,
        entropy=job.entropy,
        fold_error=worst_fold_error(job, plan) if fold_error is None else fold_error,
        parameters=(_count(job.original.graph), _count(recovered.graph)),
        accuracy=_pair(job.judged.accuracy, judged.accuracy),
        evaluation=_pair(job.judged.evaluation, judged.evaluation),
        peak_memory_bytes=peak_memory(job.original.device),
        settings=job.settings(),
        seed=job.options.seed,
        durations=job.stage.seconds,
        versions=versions(job.original.device),
        notes=(*job.notes, *recovered.notes, *doubts),
        layout=layout(job.original.graph, job.discovery),
        changed=classes if job.parts is None else None,  # the rows of a part are not the loader's
    )


def _unsaved(job: Job) -> str | None:
    """What the owner of a model with Hugging Face's methods should know; a graph of the whole has none of them."""
    if job.parts is None or not hasattr(job.model, "from_pretrained"):
        return None
    return (
        "after save_pretrained, from_pretrained builds all layers of the config, and those that were cut get random "
        "weights: keep the state_dict and load it into the model that compress returned, or use the files of out="
    )


def _pair(before: Figure | None, after: Figure | None) -> dict[str, Figure] | None:
    return None if before is None or after is None else {"before": before, "after": after}


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _require_agreement(job: Job, report: CompressionReport) -> None:
    wanted, reached = job.options.min_agreement, report.held_back_agreement
    if wanted is not None and reached is not None and reached < wanted:
        kept = "" if job.folder is None else f"; {job.folder} holds that network"
        raise AgreementError(
            f"min_agreement is {wanted}, but without {', '.join(report.plan.chosen)} the network agrees "
            f"with the original on {reached:.3f} of the held-back images; cut less, or give more images{kept}"
        )
