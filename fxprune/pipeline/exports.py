"""The ONNX files of a job, and how those in fewer bits compare with the one in single precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from fxprune.artifacts.results import Results
from fxprune.backends import Backend
from fxprune.export.onnx_file import ExportRecord, export_onnx
from fxprune.export.parity import BATCH_SIZES
from fxprune.pipeline.clock import compare_files
from fxprune.pipeline.job import Job
from fxprune.pipeline.opening import HELD_BACK
from fxprune.precision.half import export_half
from fxprune.precision.int8 import export_int8
from fxprune.processes.group import on_main
from fxprune.reports.fewer_bits import FewerBits
from fxprune.submodules.parts import as_returned

__all__ = ["write_onnx"]

_SINGLE = ("model.onnx", "original.onnx")
# a CPU computes half precision in single
_TIMED_ON: Mapping[str, Backend] = {
    "model.fp16.onnx": "onnxruntime-cuda",
    "model.int8.onnx": "onnxruntime-cpu",
}


def write_onnx(
    job: Job, results: Results, small: fx.GraphModule, cuts: Sequence[str]
) -> Mapping[str, FewerBits]:
    """Writes both networks, the compressed one in fewer bits too where that was asked for.

    Returns:
        What is known of each file in fewer bits, by name.
    """
    options, images, held_back = job.options, job.original.images, job.held_back
    seven = images.example(max(BATCH_SIZES))
    made: dict[str, ExportRecord] = {}

    def write(name: str, export: Callable[..., ExportRecord], *given: Any, **settings: Any) -> None:
        network = as_returned(job.original.graph) if name == "original.onnx" else small

        def make(folder: Path) -> None:
            made[name] = export(network, folder / name, *given, **settings)
            if name in _SINGLE:
                results.notes.append(f"{name} {made[name].checked}")

        results.write(make)

    write("model.onnx", export_onnx, seven, cuts=cuts)
    write("original.onnx", export_onnx, seven)
    if options.fp16:
        write("model.fp16.onnx", export_half, seven, cuts=cuts)
    if options.int8:
        if held_back is None:
            held_back, images = images.split(HELD_BACK, options.seed)
        least = options.min_agreement
        write("model.int8.onnx", export_int8, images, held_back, min_agreement=least, cuts=cuts)
    fewer = [name for name in made if name not in _SINGLE]
    return on_main(
        lambda: {name: FewerBits(made[name], compare_files(job, name, _TIMED_ON[name])) for name in fewer}
    )
