"""What people call: `compress` and `sweep` read top to bottom as the drawing in docs/architecture.md does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, fx, nn

from fxprune.artifacts.loading import load_network
from fxprune.artifacts.own_class import own_class
from fxprune.artifacts.recipe import ORIGIN, PartOrigin
from fxprune.artifacts.saving import save_network
from fxprune.calibration.drawing import draw
from fxprune.errors import GraphError, OptionError
from fxprune.export.onnx_file import ExportRecord
from fxprune.export.onnx_file import export_onnx as _export
from fxprune.graph.call import Calls, input_names
from fxprune.graph.examples import example_for
from fxprune.measurements import LatencyComparison
from fxprune.measuring import fresh
from fxprune.memory import memory_explained
from fxprune.options import Backend, CompressSettings, Options, Settings, takes
from fxprune.pipeline.closing import close, close_sweep
from fxprune.pipeline.opening import HELD_BACK, open_job
from fxprune.pipeline.stages import as_asked, choose, repair, score, survey
from fxprune.precision.half import export_half
from fxprune.precision.int8 import export_int8
from fxprune.reports.compression import REPORT, CompressionReport
from fxprune.reports.sweep import SweepReport
from fxprune.timing import latency as timing
from fxprune.tracing.unwrap import unwrapped

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Unpack

__all__ = ["compress", "export_onnx", "in_own_class", "load", "measure", "report", "save", "sweep"]


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
    submodule: str | Sequence[str],
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Unpack[CompressSettings],
) -> nn.Module: ...
@takes(CompressSettings)
def compress(
    model: nn.Module | ExportedProgram,
    loader: Any,
    k: int | None = None,
    *,
    submodule: str | Sequence[str] | None = None,
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
        k: How many regions to cut; alternatively give `target_speedup`, `target_latency_ms`, `regions` or `plan`.
        submodule: Path of the part to compress, of a model that cannot be traced as a whole. With a backend of
            torch latencies, and a target, are those of the whole model on its own batches, and the report has both.
            Or paths of several parts, from all of which the regions are chosen as from one network. Each is fitted on
            what the original gives it, even where another part feeds it, its regions are called after their place in
            the whole, and losses are means over the parts of the error over the variance of what they return.
        evaluate: Called with a copy of the original, before any long work, and of the compressed network; returns a
            number, such as an accuracy. The report holds both.
        **settings: Fields of `fxprune.options.Options`, which tells what each means and what it is by default.

    Returns:
        A new graph module, in evaluation mode; with `submodule`, a copy of the whole model that holds it.
        `fxprune.report` tells what was done. With `out`, `fxprune.load` makes it again from the folder, which holds
        `model.pt2`, `model.safetensors`, `plan.json`, with `onnx` also `model.onnx` and `original.onnx`, with `fp16`
        and `int8` files in fewer bits, `report.html`, then `report.json` with the SHA-256 of each, and at last
        `recipe.json`.

    Raises:
        OptionError: A setting is out of range, or more regions were asked for than can be cut.
        TargetError: The latency target cannot be met.
        AgreementError: `min_agreement` is missed, by the network or in eight bits; the folder holds what was reached.
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
        plan = as_asked(job) if options.regions or options.plan else choose(job, score(job))
        recovered, plan = repair(job, plan)
        return close(job, plan, recovered)


@takes(Settings)
def sweep(
    model: nn.Module | ExportedProgram,
    loader: Any,
    *,
    submodule: str | Sequence[str] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Unpack[Settings],
) -> SweepReport:
    """Measures latency and recovery loss, with labels accuracy too, for every number of dropped regions.

    Nothing is mimicked: the losses are those of fitted and folded adaptors.

    Args:
        model: As for `compress`.
        loader: As for `compress`.
        submodule: As for `compress`.
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
            "pickling (torch.save of a whole network) loses it, fxprune.save and out= keep it"
        )
    return found


def save(network: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Keeps a compressed network, trained further or not, so that `load` makes it again; see `compress` for the files.

    Args:
        network: What `compress` (for a model that was compressed with `submodule`, its part; with several, the model,
            of which the parts are kept) or `load` returned.
        folder: Created if need be; a network that it holds already is replaced.

    Raises:
        GraphError: The network does not say what was cut from it.
        ArtifactError: It cannot be captured by `torch.export`, or the folder cannot be written.
        OutOfMemoryError: Memory ran out.
    """
    with memory_explained():
        save_network(unwrapped(network), folder)


@overload
def load(folder: str | os.PathLike[str], factory: None = None) -> fx.GraphModule: ...
@overload
def load(folder: str | os.PathLike[str], factory: Callable[[], nn.Module] | nn.Module) -> nn.Module: ...
def load(
    folder: str | os.PathLike[str], factory: Callable[[], nn.Module] | nn.Module | None = None
) -> nn.Module:
    """Makes a compressed network again, to be trained or run; `report` tells of it as before. Nothing is unpickled.

    Args:
        folder: Where `save`, or `compress` with `out`, put it.
        factory: The original, with whatever weights, or a function that returns it; it is traced, cut by the plan, and
            given the weights. Without it the graph comes from `model.pt2`.

    Returns:
        A graph module in evaluation mode, with the same outputs as the one that was saved. Of a part of a model, named
        by `submodule` when it was compressed: with `factory` a copy of the whole model that holds it.

    Raises:
        ArtifactError: A file is missing, was changed, is newer or not provably harmless; the message names it.
        PreconditionError: The model lacks a block that was cut.
        TraceError: The model cannot be traced.
        OutOfMemoryError: Memory ran out.
    """
    with memory_explained():
        model = factory if factory is None or isinstance(factory, nn.Module) else factory()
        return load_network(folder, None if model is None else unwrapped(model))


def in_own_class(model: nn.Module, network: nn.Module) -> nn.Module:
    """A copy of a model with the cuts and the weights of its compressed graph, for tools that know the class alone.

    In the place of each block that was cut stands a `torch.nn.Identity`, or a `PassThrough` where the block is given
    more than one input; all else is the model's own code. Copy and graph are run, to see that they agree.

    Args:
        model: The original, with whatever weights; it is not changed.
        network: What `compress` or `load` returned for it, trained further or not.

    Returns:
        The copy, in evaluation mode.

    Raises:
        GraphError: `network` does not say what was cut from it, a cut is no whole module of the model, or the copy
            computes something else.
        OptionError: The model lacks a part that was compressed.
        TraceError: The model cannot be copied.
        OutOfMemoryError: Memory ran out.
    """
    with memory_explained():
        return own_class(unwrapped(model), unwrapped(network))


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    fp16: bool = False,
    int8: Any = None,
    **settings: Any,
) -> ExportRecord:
    """Writes a network as one ONNX file, after running it against torch in onnxruntime, and OpenVINO if installed.

    Args:
        model: Any module; a result of `compress` knows its example inputs.
        path: The file to write.
        example_inputs: A tensor, a tuple or a dict; dimension 0 is the batch and stays free.
        fp16: Compute in half precision, inputs and outputs as they are; `example_inputs` should then be real images,
            for nodes that exceed its range on them stay in single precision.
        int8: Calibration images, as `compress` takes them: compute in eight bits, in their ranges. A fifth, held back,
            tells how near the file comes to single precision; `example_inputs` are left out.
        **settings: Of `fxprune.export.onnx_file.export_onnx`, for `int8` of `fxprune.precision.int8.export_int8` too.

    Raises:
        OptionError: No example inputs were given and the model knows none; or settings contradict each other.
        AgreementError: `min_agreement` is missed in eight bits; no file is written.
        CalibrationError: The images cannot be used.
        ExportError: The network has no ONNX form with a free batch size, or convolutions that stay out of eight bits.
        ParityError: A runtime computes something else than torch; no file is written.
        OutOfMemoryError: Memory ran out.
    """
    if not os.fspath(path):
        raise OptionError("path is empty; it must name a file")
    model = unwrapped(model)
    done = getattr(model, "meta", {}).get(REPORT)
    settings = {"cuts": done.plan.chosen if done else (), **settings}
    if int8 is not None:
        if fp16 or example_inputs is not None:
            raise OptionError(
                "int8 goes neither with fp16 nor with example_inputs, for its images are examples"
            )
        with memory_explained():
            held_back, images = draw(int8, names=input_names(model)).split(HELD_BACK, seed=0)
            return export_int8(model, path, images, held_back, **settings)
    if example_inputs is None:
        example_inputs = _known_inputs(model)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    with memory_explained():
        return (export_half if fp16 else _export)(model, path, inputs, **settings)


def _known_inputs(model: nn.Module) -> Any:
    """Noise of the shapes that a result of `compress` takes."""
    origin = getattr(model, "meta", {}).get(ORIGIN)
    if isinstance(origin, PartOrigin):
        calls = Calls(example_for(model, origin.origin.plan.inputs).args).calls
        return calls[origin.origin.paths.index(origin.path)].given
    if origin is not None:
        return example_for(model, origin.plan.inputs).given
    part = any(isinstance(m, fx.GraphModule) and ORIGIN in m.meta for m in model.modules())
    reason = (
        "only the inputs of its compressed part are known, and not those of the whole model"
        if part
        else "this network knows none (torch.save of a whole network drops them)"
    )
    raise OptionError(f"give example_inputs: {reason}")


def measure(
    before: timing.Subject,
    after: timing.Subject,
    *,
    inputs: Sequence[Tensor] | Tensor,
    backend: Backend = "torch",
    device: str | None = None,
    settings: timing.TimingSettings | None = None,
    processes: int = 1,
) -> LatencyComparison:
    """Times two networks in turns.

    Args:
        before: The reference: a module, the path of an ONNX file, or whatever else names a network in the shell.
        after: The other one.
        inputs: One batch, positional.
        backend: What runs them; see `docs/measuring.md`.
        device: Of the backends of torch.
        settings: How long to go on.
        processes: In how many fresh processes, one after another; 1 is this one. In fresh ones torch
            takes names alone.

    Returns:
        Medians, spreads, and the ratio with its interval.

    Raises:
        DeviceError: The device is not there; there is no fallback.
        MeasurementError: The backend cannot run one of the networks.
        OutOfMemoryError: Memory ran out.
    """
    if isinstance(inputs, Mapping):
        raise OptionError(f"inputs is a {type(inputs).__name__}: give the tensors in the order of forward")
    batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with memory_explained():
        return fresh.compare(
            before,
            [after],
            batch,
            processes=processes,
            backend=backend,
            device=device,
            settings=settings,
        ).comparisons[0]
