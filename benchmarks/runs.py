"""What all accuracy benchmarks share: a run is one compression, measured, and is kept as soon as it ends."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from benchmarks import environment
from benchmarks.data import LabelledImages, predictions, share
from fxprune.errors import PostconditionError
from fxprune.options import RECIPES, Backend, Recipe
from fxprune.reports.tables import render

__all__ = [
    "Case",
    "Ledger",
    "add_arguments",
    "add_recipe_arguments",
    "latencies",
    "mean_and_spread",
    "print_table",
    "recipe_from",
    "run_case",
    "settings_of",
]

BACKENDS: tuple[Backend, ...] = ("torch", "onnxruntime-cpu")
# What changes neither the figures of a run nor which runs there are.
NEUTRAL = ("data", "images", "out", "quiet", "seed", "seeds")


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


class Ledger:
    """The finished runs of a benchmark, in `benchmarks/results/NAME.json`; a rerun takes up where it ended.

    Args:
        name: Of the result.
        settings: What the figures depend on; runs kept under other settings are not taken up.
        seed: The first seed, noted in the file.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int) -> None:
        self.name, self.settings, self.seed = name, dict(settings), seed
        self.runs: list[dict[str, Any]] = environment.kept(name, self.settings, "runs") or []

    def find(self, images: int, seed: int) -> dict[str, Any] | None:
        """Return the finished run with so many images and that seed, or None."""
        wanted = (images, seed)
        return next((run for run in self.runs if (run["images"], run["seed"]) == wanted), None)

    def timed(self, chosen: Sequence[str]) -> dict[str, Any] | None:
        """Return the latencies that an earlier run with the same plan measured, or None."""
        plan = sorted(chosen)
        return next((run["latency"] for run in self.runs if sorted(run["chosen"]) == plan), None)

    def add(self, run: Mapping[str, Any]) -> None:
        """Keep a run.

        Raises:
            ArtifactError: If the file cannot be written.
        """
        self.runs.append(dict(run))
        self.runs.sort(key=lambda run: (run["images"], run["seed"]))
        environment.write_result(self.name, {"settings": self.settings, "runs": self.runs}, self.seed)


def add_arguments(parser: argparse.ArgumentParser, *, k: int) -> None:
    """Add the options that every accuracy benchmark has."""
    parser.add_argument("--k", type=int, default=k, help="blocks to drop (default: %(default)s)")
    add_recipe_arguments(parser)
    parser.add_argument("--data", help="folder of the data; else FXPRUNE_DATA, else ../shared/data")
    parser.add_argument("--out", help="name of the result file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `recipe_from` reads."""
    parser.add_argument("--recipe", default="fast", choices=sorted(RECIPES), help="default: %(default)s")
    parser.add_argument("--adaptor-iterations", type=int, help="fewer than the recipe's, for a quick trial")
    parser.add_argument("--mimic-iterations", type=int, help="fewer than the recipe's, for a quick trial")


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe that the options name, with their iteration counts."""
    recipe = RECIPES[arguments.recipe]
    for stage in ("adaptor", "mimic"):
        iterations = getattr(arguments, f"{stage}_iterations")
        if iterations is not None:
            fitting = dataclasses.replace(getattr(recipe, stage), iterations=iterations)
            recipe = dataclasses.replace(recipe, **{stage: fitting})
    return recipe


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the figures of a run depend on, and what the recipe they name amounts to."""
    given = {key: value for key, value in vars(arguments).items() if key not in NEUTRAL}
    settings = given | {
        "recipe_settings": _plain(recipe_from(arguments)),
        "threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }
    # Through JSON, because that is how kept settings come back: tuples as lists.
    return json.loads(json.dumps(settings, default=str))  # type: ignore[no-any-return]


def run_case(
    case: Case, calibration: Tensor, ledger: Ledger, arguments: argparse.Namespace, *, seed: int
) -> dict[str, Any]:
    """Compress once and measure everything, or take up the run that is kept already.

    Args:
        case: The network and its test images.
        calibration: Images `[N, C, H, W]` to compress with.
        ledger: Where finished runs are kept.
        arguments: See `add_arguments`.
        seed: Of the compression.

    Returns:
        The figures of the run, JSON-able.
    """
    if kept := ledger.find(len(calibration), seed):
        return kept
    start = time.perf_counter()
    small = fxprune.compress(
        case.model,
        calibration,
        k=arguments.k,
        recipe=recipe_from(arguments),
        images=len(calibration),
        latency_batch=len(case.timed),
        seed=seed,
        progress=not arguments.quiet,
    )
    seconds = time.perf_counter() - start
    report = fxprune.report(small)
    chosen = list(report.plan.chosen)
    native = native_twin(case, small, chosen)
    named = predictions(small, case.test.images)
    run = {
        "images": len(calibration),
        "seed": seed,
        "commit": environment.commit(),
        "chosen": chosen,
        "accuracy_before": share(case.named == case.test.labels),
        "accuracy_after": share(named == case.test.labels),
        "agreement": share(named == case.named),
        "seconds": seconds,
        "durations": dict(report.durations),
        "peak_memory_bytes": report.peak_memory_bytes,  # of the process, with the test images in it
        "fold_error": report.fold_error,
        "recovery_losses": {s.region.label: s.recovery_loss for s in report.plan.scores},
        "savings": {s.region.label: s.latency.saving for s in report.plan.scores},
        "native_max_abs_diff": max_abs_diff(small, native, case.timed),
        "onnx_max_abs_diff": onnx_max_abs_diff(small, case.timed),
        "latency": ledger.timed(chosen) or latencies(case, small, native),
    }
    ledger.add(run)
    return run


def native_twin(case: Case, small: GraphModule, chosen: Sequence[str]) -> nn.Module:
    """Build the network natively without the chosen blocks and give it the compressed network's weights.

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
    """Return the largest absolute difference of two networks' outputs."""
    with torch.inference_mode():
        return float((a(images) - b(images)).abs().max())


def onnx_max_abs_diff(small: GraphModule, images: Tensor) -> float:
    """Export to a temporary file; return how far ONNX Runtime and torch lie apart."""
    with tempfile.TemporaryDirectory() as folder:
        return float(fxprune.export_onnx(small, Path(folder) / "model.onnx", (images,)).max_abs_diff)


def latencies(case: Case, small: GraphModule, native: nn.Module) -> dict[str, Any]:
    """Time the compressed network, interleaved with the original and with its native twin, per backend.

    The ratio to the original says what was gained; the one to the twin, that folded adaptors cost nothing. The twin is
    a graph too: what is compared are operators, not the calls of nested Python modules around them.
    """
    figures: dict[str, Any] = {}
    twin = symbolic_trace(native)
    for backend in BACKENDS:
        for name, reference in (("original", case.model), ("native", twin)):
            comparison = fxprune.measure(reference, small, inputs=(case.timed,), backend=backend)
            figures.setdefault(backend, {})[name] = _plain(comparison)
    return figures


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per image count: accuracy, agreement, time and choices over the seeds."""
    headers = ("images", "runs", "top-1 before", "top-1 after", "agreement", "seconds", "dropped (runs)")
    rows = []
    for count in sorted({run["images"] for run in runs}):
        group = [run for run in runs if run["images"] == count]
        plans = [", ".join(run["chosen"]) for run in group]
        rows.append(
            (
                str(count),
                str(len(group)),
                f"{group[0]['accuracy_before']:.2%}",
                _spread_text([100 * run["accuracy_after"] for run in group], "%"),
                _spread_text([100 * run["agreement"] for run in group], "%"),
                _spread_text([run["seconds"] for run in group], " s"),
                "; ".join(f"{plan} ({plans.count(plan)})" for plan in dict.fromkeys(plans)),
            )
        )
    print(render(headers, rows))
    _print_latencies(runs)


def _print_latencies(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per plan, backend and reference, and the worst differences over all runs."""
    rows = []
    for plan in dict.fromkeys(tuple(sorted(run["chosen"])) for run in runs):
        latency = next(run["latency"] for run in runs if tuple(sorted(run["chosen"])) == plan)
        for backend, references in latency.items():
            for name, figures in references.items():
                interval = figures["interval"]
                between = f"{interval['low']:.3f} to {interval['high']:.3f}"
                rows.append((", ".join(plan), backend, name, f"{figures['ratio']:.3f}", between))
    print(render(("without", "backend", "compared with", "latency ratio", "95 % interval"), rows))
    for key in ("fold_error", "native_max_abs_diff", "onnx_max_abs_diff"):
        print(f"worst {key}: {max(run[key] for run in runs):.2e}")


def _spread_text(values: Sequence[float], unit: str) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f} ± {spread:.2f}{unit}" if len(values) > 1 else f"{mean:.2f}{unit}"


def _plain(record: Any) -> Any:
    return dataclasses.asdict(record)
