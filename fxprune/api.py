"""What people call: `compress` and `sweep` read top to bottom as the drawing in docs/architecture.md does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, fx, nn

from fxprune.errors import GraphError, OptionError
from fxprune.export.onnx_file import ExportRecord
from fxprune.export.onnx_file import export_onnx as _export
from fxprune.measurements import LatencyComparison
from fxprune.memory import memory_explained
from fxprune.options import Backend, CompressSettings, Options, Settings, takes
from fxprune.pipeline.closing import EXAMPLE, REPORT, close, close_sweep
from fxprune.pipeline.opening import open_job
from fxprune.pipeline.stages import as_asked, choose, repair, score, survey
from fxprune.reports.compression import CompressionReport
from fxprune.reports.sweep import SweepReport
from fxprune.timing import latency as timing
from fxprune.tracing.unwrap import unwrapped

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Unpack

__all__ = ["compress", "export_onnx", "measure", "report", "sweep"]


@overload
def compress(
    model: nn.Module | ExportedProgram,
    loader: Any,
    k: int | None = None,
    *,
    submodule: None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Unpack[CompressSettings],
) -> fx.GraphModule: ...
@overload
def compress(
    model: nn.Module,
    loader: Any,
    k: int | None = None,
    *,
    submodule: str,
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Unpack[CompressSettings],
) -> nn.Module: ...
@takes(CompressSettings)
def compress(
    model: nn.Module | ExportedProgram,
    loader: Any,
    k: int | None = None,
    *,
    submodule: str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Unpack[CompressSettings],
) -> nn.Module:
    """Makes a trained network faster by cutting regions out of it, with a handful of unlabelled images.

    Every region is scored by the feature error that remains after 1x1 adaptors were fitted around the cut, over the
    latency that the cut saves (PRACTISE, CVPR 2023, eq. 1 to 3). The best are cut, the adaptors are folded away, and
    the rest mimics the original's features before its final pooling (MiR, CVPR 2022, eq. 5).

    Args:
        model: The network, a traced graph of it, or an exported program; it is not changed.
        loader: The calibration images: a tensor `[N, C, H, W]`, a dataset, a data loader or any iterable of batches.
        k: How many regions to cut; alternatively give `target_speedup`, `target_latency_ms` or `regions`.
        submodule: Path of the part to compress, of a model that cannot be traced as a whole.
        evaluate: Called with a copy of the original, before any long work, and of the compressed network; returns a
            number, such as an accuracy. The report holds both.
        **settings: Fields of `fxprune.options.Options`, which tells what each means and what it is by default.

    Returns:
        A new graph module, in evaluation mode; with `submodule`, a copy of the whole model that holds it.
        `fxprune.report` tells what was done. With `out`, the folder holds `model.pt2`, `model.safetensors`, with
        `onnx` also `model.onnx` and `original.onnx`, `report.html`, and at last `report.json` with the SHA-256 of each.

    Raises:
        OptionError: A setting is out of range, or more regions were asked for than can be cut.
        TraceError: The network cannot be traced.
        CalibrationError: The images cannot be used.
        NoRegionError: Nothing can be cut; the message lists why.
        DeviceError: The device is not there.
        MeasurementError: The backend cannot run the network.
        ArtifactError, ExportError: The folder is in use, or a file cannot be written.
        OutOfMemoryError: Memory ran out.
    """
    options = Options.of(k, submodule, **settings)
    options.require_goal()
    with open_job(model, loader, options, evaluate) as job:
        plan = as_asked(job) if options.regions else choose(job, score(job))
        recovered, plan = repair(job, plan)
        return close(job, plan, recovered)


@takes(Settings)
def sweep(
    model: nn.Module | ExportedProgram,
    loader: Any,
    *,
    submodule: str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Unpack[Settings],
) -> SweepReport:
    """Measures latency and recovery loss, with labels accuracy too, for every number of dropped regions.

    Nothing is mimicked: the losses are those of fitted and folded adaptors.

    Args:
        model: As for `compress`.
        loader: As for `compress`.
        submodule: As for `compress`; latencies are those of the part.
        evaluate: Called with a copy of each network, the original first, then adaptors folded; returns its accuracy.
            `labels` is another way to have one.
        **settings: Fields of `fxprune.options.Options`; goals are none of them, and `exact` has no path to follow.

    Returns:
        One point for each k from 1 to the most regions that can be dropped. With `out`, the folder holds `sweep.svg`,
        where there are accuracies `sweep_accuracy.svg`, and at last `sweep.json`.

    Raises:
        FxpruneError: As `compress`.
    """
    options = Options.of(None, submodule, **settings)
    if evaluate is not None and options.labels is not None:
        raise OptionError("give labels or evaluate, not both: a sweep has one accuracy for each network")
    with open_job(model, loader, options, evaluate) as job:
        scores = score(job)
        return close_sweep(job, scores, survey(job, scores))


def report(gm: nn.Module) -> CompressionReport:
    """What `compress` did to a network.

    Raises:
        GraphError: The network does not come from `fxprune.compress`.
    """
    graphs = (module for module in gm.modules() if isinstance(module, fx.GraphModule))
    found = next((g.meta[REPORT] for g in graphs if REPORT in g.meta), None)
    if not isinstance(found, CompressionReport):
        raise GraphError(
            "this network carries no report: fxprune.compress attaches one to what it returns, and copies keep it; "
            "pickling (torch.save of a whole network) loses it, out= keeps it as report.json"
        )
    return found


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, **settings: Any
) -> ExportRecord:
    """Writes a network as one ONNX file, after running it in onnxruntime against torch.

    Args:
        model: Any module; a result of `compress` knows its example inputs.
        path: The file to write.
        example_inputs: A tensor, a tuple or a dict; dimension 0 is the batch and stays free.
        **settings: Of `fxprune.export.onnx_file.export_onnx`.

    Raises:
        OptionError: No example inputs were given and the model knows none.
        ExportError: The network has no ONNX form with a free batch size.
        ParityError: onnxruntime computes something else than torch; no file is written.
        OutOfMemoryError: Memory ran out.
    """
    if not os.fspath(path):
        raise OptionError("path is empty; it must name a file")
    model = unwrapped(model)
    if example_inputs is None:
        example = getattr(model, "meta", {}).get(EXAMPLE)
        if example is None:
            raise OptionError(
                "give example_inputs: this network knows none (torch.save of a whole network drops them)"
            )
        example_inputs = example.given
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    with memory_explained():
        return _export(model, path, inputs, **settings)


def measure(
    before: timing.Subject,
    after: timing.Subject,
    *,
    inputs: Sequence[Tensor] | Tensor,
    backend: Backend = "torch",
    device: str | None = None,
    settings: timing.TimingSettings | None = None,
) -> LatencyComparison:
    """Times two networks in turns, in one process.

    Args:
        before: The reference: a module, or a path to an ONNX file.
        after: The other one.
        inputs: One batch, positional.
        backend: `torch`, `onnxruntime-cpu` or `onnxruntime-cuda`.
        device: Of the `torch` backend.
        settings: How long to go on.

    Returns:
        Medians, spreads, and the ratio with its bootstrap interval.

    Raises:
        DeviceError: The device is not there; there is no fallback.
        MeasurementError: The backend cannot run one of the networks.
        OutOfMemoryError: Memory ran out.
    """
    if isinstance(inputs, Mapping):
        raise OptionError(f"inputs is a {type(inputs).__name__}: give the tensors in the order of forward")
    batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with memory_explained():
        return timing.compare(before, [after], batch, backend=backend, device=device, settings=settings)[0]
