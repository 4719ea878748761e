"""A comparison in several fresh processes, one after another: `python -m fxprune.measuring.fresh FOLDER` is one.

A process asks for memory and chooses algorithms once, so that repeating calls within it says nothing of how much luck
that was.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxprune.backends import runs_modules
from fxprune.errors import OptionError
from fxprune.measurements import LatencyComparison
from fxprune.measuring import asking
from fxprune.records import restored
from fxprune.sources.examples import positional_network
from fxprune.sources.networks import absolute
from fxprune.timing import latency
from fxprune.timing.rounds import Samples, TimingSettings

__all__ = ["Measured", "compare", "keep_inputs", "kept_inputs", "names_for", "network"]

_INPUTS = "inputs.safetensors"


class Measured(NamedTuple):
    """What was measured, and how.

    Attributes:
        comparisons: One for each candidate.
        processes: What each process took, networks in the order of the question.
    """

    comparisons: tuple[LatencyComparison, ...]
    processes: tuple[Samples, ...]


def compare(
    before: latency.Subject,
    candidates: Sequence[latency.Subject],
    inputs: Sequence[Tensor],
    *,
    processes: int,
    backend: str,
    device: str | None = None,
    settings: TimingSettings | None = None,
) -> Measured:
    """Times a network against candidates as `latency.compare` does, in so many processes.

    Args:
        before: A module, or what names one in the shell. Runtimes of ONNX files are given such a file as it is,
            whatever else is exported; torch is given what `load_model` reads.
        candidates: Likewise.
        inputs: As for `latency.compare`.
        processes: How many; 1 is this one, more are fresh ones, in each of which all networks take turns.
        backend: As for `latency.compare`; in fresh processes torch takes names alone, for modules would have to be
            pickled.
        device: Likewise.
        settings: Likewise, for each process.

    Raises:
        MeasurementError: As `latency.compare`; or a process died.
        DeviceError, OptionError: As `latency.compare`.
        SourceError, ArtifactError: A name names no network.
    """
    if processes < 1:
        raise OptionError(f"processes is {processes}; it must be 1 or more")
    place = str(latency.device_of(backend, device))
    settings = settings or TimingSettings()
    subjects, measured = [before, *candidates], []
    if processes == 1:
        networks = [network(subject, backend) for subject in subjects]
        samples = latency.take_samples(networks, inputs, backend, place, settings)
        return Measured(latency.compared([samples], inputs, settings), (samples,))
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="fxprune-") as name:
        folder = Path(name)
        names = names_for(subjects, inputs, backend, folder)
        keep_inputs(inputs, folder)
        for number in range(processes):
            question = {
                "networks": names,
                "backend": backend,
                "device": place,
                "settings": asdict(replace(settings, seed=settings.seed + number)),
            }
            answer = asking.ask(folder, question, __name__, f"process {number + 1} of {processes}")
            measured.append(restored(Samples, answer))
    return Measured(latency.compared(measured, inputs, settings), tuple(measured))


def network(subject: latency.Subject, backend: str) -> latency.Subject:
    """A module, or the ONNX file itself for a runtime of such files."""
    if isinstance(subject, nn.Module):
        return subject
    spec = os.fspath(subject)
    return spec if spec.endswith(".onnx") and not runs_modules(backend) else positional_network(spec)


def names_for(
    subjects: Sequence[latency.Subject], inputs: Sequence[Tensor], backend: str, folder: Path
) -> list[str]:
    """What another process finds the networks by: ONNX files for a runtime of such, else names."""
    if not runs_modules(backend):
        return [
            str(latency.as_file(network(subject, backend), label, inputs, folder).resolve())
            for label, subject in zip(latency.labels(subjects), subjects, strict=True)
        ]
    if any(isinstance(subject, nn.Module) for subject in subjects):
        raise OptionError(
            f"backend={backend!r} times modules where they are, in this process: leave processes out, or name networks "
            "as the shell does, such as file.py:factory or a folder that fxprune.save wrote"
        )
    return [absolute(os.fspath(cast("str", subject))) for subject in subjects]


def keep_inputs(inputs: Sequence[Tensor], folder: Path) -> None:
    """Leaves the inputs in a folder, for the process that works there."""
    save_file({str(i): _own(x) for i, x in enumerate(inputs)}, folder / _INPUTS)


def kept_inputs(folder: Path) -> list[Tensor]:
    """What `keep_inputs` left."""
    tensors = load_file(folder / _INPUTS)
    return [tensors[str(i)] for i in range(len(tensors))]


def _own(tensor: Tensor) -> Tensor:
    """Its values in memory of their own, as safetensors takes them."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _samples(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    backend = question["backend"]
    networks = [network(name, backend) for name in question["networks"]]
    settings = TimingSettings(**question["settings"])
    return asdict(latency.take_samples(networks, kept_inputs(folder), backend, question["device"], settings))


if __name__ == "__main__":
    asking.answer(Path(sys.argv[1]), _samples)
