"""The same comparison in several fresh processes, one after another: `python -m fxprune.timing.fresh FOLDER` is one.

A process asks for memory and chooses algorithms once, so that repeating calls within it says nothing of how much luck
that was. The processes share a folder with the question and the answers, as JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxprune import errors
from fxprune.errors import FxpruneError, MeasurementError, OptionError
from fxprune.files import write_text_atomic
from fxprune.measurements import LatencyComparison
from fxprune.memory import memory_explained
from fxprune.records import restored
from fxprune.timing import latency
from fxprune.timing.rounds import Samples, TimingSettings

__all__ = ["compare"]

_logger = logging.getLogger(__name__)

_QUESTION, _INPUTS, _ANSWER = "question.json", "inputs.safetensors", "answer.json"


def compare(
    before: latency.Subject,
    candidates: Sequence[latency.Subject],
    inputs: Sequence[Tensor],
    *,
    processes: int,
    backend: str,
    device: str | None = None,
    settings: TimingSettings | None = None,
) -> tuple[LatencyComparison, ...]:
    """Time a network against candidates as `latency.compare` does, in so many processes.

    Args:
        before: As for `latency.compare`.
        candidates: Likewise.
        inputs: Likewise.
        processes: How many; 1 is this one, more are fresh ones, in each of which all networks take turns.
        backend: Likewise; in fresh processes not `torch`, whose modules would have to be pickled.
        device: Likewise.
        settings: Likewise, for each process.

    Raises:
        MeasurementError: As `latency.compare`; or a process died.
        DeviceError, OptionError: As `latency.compare`.
    """
    if processes < 1:
        raise OptionError(f"processes is {processes}; it must be 1 or more")
    if processes == 1:
        return latency.compare(before, candidates, inputs, backend=backend, device=device, settings=settings)
    if backend == "torch":
        raise OptionError(
            f"processes={processes}: torch times modules where they are, in this process; leave processes out, or name "
            "another backend"
        )
    latency.device_of(backend, device)
    settings = settings or TimingSettings()
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    measured = []
    with tempfile.TemporaryDirectory(prefix="fxprune-") as name:
        folder = Path(name)
        subjects = [before, *candidates]
        files = [
            latency.as_file(subject, f"candidate {i}" if i else "before", inputs, folder).resolve()
            for i, subject in enumerate(subjects)
        ]
        save_file({str(i): _own(x) for i, x in enumerate(inputs)}, folder / _INPUTS)
        for number in range(processes):
            question = {
                "files": list(map(str, files)),
                "backend": backend,
                "settings": asdict(replace(settings, seed=settings.seed + number)),
            }
            (folder / _QUESTION).write_text(json.dumps(question))
            measured.append(_ask(folder, f"process {number + 1} of {processes}"))
    return latency.compared(measured, inputs, settings)


def _ask(folder: Path, which: str) -> Samples:
    """Starts a process, waits for its end and reads what it left."""
    (folder / _ANSWER).unlink(missing_ok=True)
    _logger.info("measuring in %s", which)
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # the same packages as here
    ended = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if not (folder / _ANSWER).is_file():
        said = ended.stderr.strip().splitlines()
        raise MeasurementError(
            f"{which} that measured died, {_how(ended.returncode)}"
            + (f": {said[-1]}" if said else "; it said nothing")
            + ". Measure again with less beside it, smaller batches, or another backend"
        )
    answer = json.loads((folder / _ANSWER).read_text())
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        raise kind(f"{which} that measured failed: {answer['message']}")
    return restored(Samples, answer)


def _own(tensor: Tensor) -> Tensor:
    """Its values in memory of their own, as safetensors takes them."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended by signal {-code}"


def _answer(folder: Path) -> dict[str, Any]:
    question = json.loads((folder / _QUESTION).read_text())
    tensors = load_file(folder / _INPUTS)
    inputs = [tensors[str(i)] for i in range(len(tensors))]
    settings = TimingSettings(**question["settings"])
    try:
        with memory_explained():
            return asdict(
                latency.take_samples(question["files"], inputs, question["backend"], None, settings)
            )
    except FxpruneError as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    at = Path(sys.argv[1])
    write_text_atomic(at / _ANSWER, json.dumps(_answer(at)))
