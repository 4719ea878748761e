"""Accuracy before and after, over image counts and seeds: CIFAR-10's test set, or photographs of unseen classes.

    python -m benchmarks.claims.accuracy --model resnet20 --k 3 --images 50,500 --seeds 3 [--recipe practise]
    python -m benchmarks.claims.accuracy --model mobilenet_v2 --k 2 --images 500 --seeds 1

The compressed network is also held to its native twin, the same network built without the blocks and given its weights:
outputs and latency must be the same, so that nothing of an adaptor is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from benchmarks.common import jobs, networks, options
from benchmarks.common.data import LabelledImages, predictions, share
from benchmarks.common.result_file import ResultFile
from benchmarks.common.tables import mean_and_spread, print_rows
from fxprune.errors import PostconditionError
from fxprune.options import Backend, Recipe
from fxprune.processes.threads import using_threads

__all__ = ["Case", "main", "max_abs_diff", "native_twin", "print_runs", "timed_before"]

BACKENDS: tuple[Backend, ...] = ("torch", "onnxruntime-cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the images it is measured on.

    Attributes:
        model: The trained original.
        native: Builds the same network without the blocks of the given labels, weights random.
        test: Labelled images that nothing was chosen by.
        timed: The batch whose latency is measured.
    """

    model: nn.Module
    native: Callable[[Sequence[str]], nn.Module]
    test: LabelledImages
    timed: Tensor

    @functools.cached_property
    def named(self) -> Tensor:
        """The classes `[N]` that the original names on the test images, found once."""
        return predictions(self.model, self.test.images)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the table and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    recipe = options.shortened(arguments.recipe, arguments.adaptor_iterations, arguments.mimic_iterations)
    test = networks.test_images(arguments.model, arguments.data)
    known = networks.MODELS[arguments.model]
    timed = test.images[: 1 if known.photographs else 64]
    with using_threads(arguments.threads):
        settings = options.settings_of(arguments, basis=("model", "k"), recipes=(recipe,))
        name = f"accuracy_{arguments.model}_k{arguments.k}_{recipe.name}"
        kept = options.result_file(arguments, name, settings)
        finished = []
        for count in arguments.images:
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                one = argparse.Namespace(**{**vars(arguments), "images": count, "random": False})
                subject = jobs.subject_for(one, seed)
                case = Case(subject.model, lambda labels: known.build(without=labels), test, timed)
                make = functools.partial(_run, case, subject.images, recipe, kept, arguments, seed)
                run = kept.once(f"{count}/{seed}", make)
                print(
                    f"{count} images, seed {seed}: {run['accuracy_after']:.2%} without {run['chosen']}",
                    flush=True,
                )
                finished.append(run)
    print_runs(finished)


def _run(
    case: Case, images: Tensor, recipe: Recipe, kept: ResultFile, arguments: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Compresses once and measures everything."""
    start = time.perf_counter()
    small = fxprune.compress(
        case.model,
        images,
        k=arguments.k,
        recipe=recipe,
        images=len(images),
        latency_batch=len(case.timed),
        seed=seed,
        progress=not arguments.quiet,
    )
    seconds = time.perf_counter() - start
    report = fxprune.report(small)
    chosen = list(report.plan.chosen)
    native = native_twin(case, small, chosen)
    named = predictions(small, case.test.images)
    return {
        "images": len(images),
        "seed": seed,
        "chosen": chosen,
        "accuracy_before": share(case.named == case.test.labels),
        "accuracy_after": share(named == case.test.labels),
        "agreement": share(named == case.named),
        "seconds": seconds,
        "durations": dict(report.durations),
        "peak_memory_bytes": report.peak_memory_bytes,  # of the process, with the test images in it
        "fold_error": report.fold_error,
        "recovery_losses": {s.region.label: s.recovery_loss for s in report.plan.scores},
        "savings": {s.region.label: s.cost.saving for s in report.plan.scores},
        "native_max_abs_diff": max_abs_diff(small, native, case.timed),
        "onnx_max_abs_diff": _onnx_max_abs_diff(small, case.timed),
        "latency": timed_before(kept.entries, chosen) or _latencies(case, small, native),
    }


def native_twin(case: Case, small: GraphModule, chosen: Sequence[str]) -> nn.Module:
    """Builds the network natively without the chosen blocks and gives it the compressed network's weights.

    Raises:
        PostconditionError: If the two do not have the same parameters: something of an adaptor is left.
    """
    native = case.native(chosen)
    try:
        native.load_state_dict(small.state_dict())
    except RuntimeError as error:
        raise PostconditionError(
            f"the compressed network is not the native one without {', '.join(chosen)}: {error}"
        ) from error
    return native.eval().to(memory_format=torch.channels_last)


def max_abs_diff(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    """Returns the largest absolute difference of two networks' outputs."""
    with torch.inference_mode():
        return float((a(images) - b(images)).abs().max())


def _onnx_max_abs_diff(small: GraphModule, images: Tensor) -> float:
    """Exports to a temporary file; returns how far ONNX Runtime and torch lie apart."""
    with tempfile.TemporaryDirectory() as folder:
        return float(fxprune.export_onnx(small, Path(folder) / "model.onnx", (images,)).max_abs_diff)


def timed_before(entries: Mapping[str, Any], chosen: Sequence[str]) -> Any:
    """Returns the latencies that an earlier run with the same plan measured, or None."""
    plan = sorted(chosen)
    return next((run["latency"] for run in entries.values() if sorted(run["chosen"]) == plan), None)


def _latencies(case: Case, small: GraphModule, native: nn.Module) -> dict[str, Any]:
    """Times the compressed network, interleaved with the original and with its native twin, per backend.

    The ratio to the original says what was gained; the one to the twin, that folded adaptors cost nothing. The twin is
    a graph too: what is compared are operators, not the calls of nested Python modules around them.
    """
    figures: dict[str, Any] = {}
    twin = symbolic_trace(native)
    for backend in BACKENDS:
        for name, reference in (("original", case.model), ("native", twin)):
            comparison = fxprune.measure(reference, small, inputs=(case.timed,), backend=backend)
            figures.setdefault(backend, {})[name] = dataclasses.asdict(comparison)
    return figures


def print_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Prints one row per image count: accuracy, agreement, time and choices over the seeds; then the latencies."""
    rows = []
    for count in sorted({run["images"] for run in runs}):
        group = [run for run in runs if run["images"] == count]
        plans = [", ".join(run["chosen"]) for run in group]
        row = {"images": count, "runs": len(group), "before": f"{group[0]['accuracy_before']:.2%}"}
        for name, factor, unit in (
            ("accuracy_after", 100, "%"),
            ("agreement", 100, "%"),
            ("seconds", 1, " s"),
        ):
            row[name] = _spread_text([factor * run[name] for run in group], unit)
        row["dropped"] = "; ".join(f"{plan} ({plans.count(plan)})" for plan in dict.fromkeys(plans))
        rows.append(row)
    accuracy = {"top-1 before": "before", "top-1 after": "accuracy_after", "agreement": "agreement"}
    counted = {"images": "images", "runs": "runs"}
    print_rows(rows, {**counted, **accuracy, "seconds": "seconds", "dropped (runs)": "dropped"})
    _print_latencies(runs)


def _print_latencies(runs: Sequence[Mapping[str, Any]]) -> None:
    """Prints one row per plan, backend and reference, and the worst differences over all runs."""
    rows = []
    for plan, latency in {tuple(sorted(run["chosen"])): run["latency"] for run in reversed(runs)}.items():
        for backend, references in latency.items():
            for name, figures in references.items():
                between = "{low:.3f} to {high:.3f}".format(**figures["interval"])
                ratio = f"{figures['ratio']:.3f}"
                rows.append(
                    {"without": plan, "backend": backend, "with": name, "ratio": ratio, "95 %": between}
                )
    titles = {"without": "without", "backend": "backend", "compared with": "with"}
    print_rows(rows, {**titles, "latency ratio": "ratio", "95 % interval": "95 %"})
    for key in ("fold_error", "native_max_abs_diff", "onnx_max_abs_diff"):
        print(f"worst {key}: {max(run[key] for run in runs):.2e}")


def _spread_text(values: Sequence[float], unit: str) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f} ± {spread:.2f}{unit}" if len(values) > 1 else f"{mean:.2f}{unit}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    shared = {name: options.NETWORK[name] for name in ("threads", "seed", "data", "out")}
    trial = {"recipe": "fast", "adaptor_iterations": None, "mimic_iterations": None}
    defaults = {"model": "resnet20", "k": 3, "seeds": 3, **trial, **shared}
    parser = options.parser("accuracy", __doc__, **defaults)
    parser.add_argument("--images", type=options.counts, default=(50, 500), help="default: 50,500")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = options.parse(parser, argv)
    if networks.MODELS[arguments.model].weights is None:
        parser.error(f"there are no trained weights of {arguments.model}")
    return arguments


if __name__ == "__main__":
    main()
