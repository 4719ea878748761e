"""How long networks take, side by side: the one file that knows how torch and the runtimes are timed.

All networks of a comparison live in one process and take turns in a drawn order, round by round
(`rounds.py`), so that whatever slows the machine slows all of them; `fresh.py` does so in several processes, one after
another. Times are seconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
import tempfile
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.backends import BACKENDS, runs_modules
from fxprune.errors import DeviceError, ExportError, MeasurementError, OptionError
from fxprune.export.onnx_file import export_onnx
from fxprune.measurements import Latency, LatencyComparison
from fxprune.memory import memory_returned
from fxprune.processes.threads import using_threads
from fxprune.progress import progress
from fxprune.runtimes import onnxruntime, openvino
from fxprune.timing.card import card_state
from fxprune.timing.collector import collector_paused
from fxprune.timing.modules import Ready, module_call
from fxprune.timing.rounds import (
    Clock,
    Contestant,
    Samples,
    TimingSettings,
    by_round,
    race,
    ratio_over_processes,
    warm_up,
)

__all__ = [
    "Subject",
    "TimingSettings",
    "as_file",
    "compare",
    "compared",
    "device_name",
    "device_of",
    "labels",
    "prepare",
    "take_samples",
]

Subject: TypeAlias = "nn.Module | str | os.PathLike[str]"


def compare(
    before: Subject,
    candidates: Sequence[Subject],
    inputs: Sequence[Tensor],
    *,
    backend: str = "torch",
    device: str | None = None,
    settings: TimingSettings | None = None,
    show_progress: bool = False,
) -> tuple[LatencyComparison, ...]:
    """Times a network against candidates, alternately, until the ratios are known well enough.

    Args:
        before: The reference: a module, or the path of an ONNX file where `backend` runs those.
        candidates: What to compare with it, likewise. Modules are not changed.
        inputs: The tensors of one call, batch first.
        backend: One of `backends.BACKENDS`; modules are exported for all but those of torch.
        device: `cpu` or `cuda[:N]` for torch (`cpu` by default); implied by the others.
        settings: When to stop; the defaults if `None`.
        show_progress: Whether a bar is drawn.

    Returns:
        One comparison per candidate, in their order.

    Raises:
        DeviceError: CUDA or OpenVINO is asked for and absent.
        MeasurementError: A network cannot be prepared or run on the backend.
        OptionError: The backend is unknown, contradicts the device, or there are no inputs.
    """
    settings = settings or TimingSettings()
    if not candidates:
        return ()
    subjects = [before, *candidates]
    samples = take_samples(subjects, inputs, backend, device, settings, show_progress=show_progress)
    return compared([samples], inputs, settings)


def take_samples(
    subjects: Sequence[Subject],
    inputs: Sequence[Tensor],
    backend: str,
    device: str | None,
    settings: TimingSettings,
    *,
    show_progress: bool = False,
) -> Samples:
    """What networks take in this process, the reference first; arguments and errors are those of `compare`."""
    place = device_of(backend, device)
    if not inputs:
        raise OptionError("compare() needs the input tensors of one call, none were given")
    gc.collect()
    with using_threads(settings.threads), collector_paused(), memory_returned(), torch.inference_mode():
        contestants, conditions = [], []
        for label, subject in zip(labels(subjects), subjects, strict=True):
            named, ready = prepare(subject, label, inputs, backend, place)
            contestants.append(Contestant(named, ready.call))
            conditions.append(ready.conditions)
        clock: Clock = partial(_cuda_clock, place) if place.type == "cuda" else _wall_clock
        warm_up(contestants, clock, settings.warmup)
        before = card_state(place) if place.type == "cuda" else None
        with progress("latency, at most", settings.max_seconds, "s", show=show_progress) as tell:
            race(contestants, clock, settings, lambda share: tell(share * settings.max_seconds))
        return Samples(
            backend,
            device_name(place),
            torch.get_num_threads() if place.type == "cpu" else 0,
            tuple(one.repeats for one in contestants),
            tuple(tuple(one.samples) for one in contestants),
            tuple(conditions),
            None if before is None else {"before": before, "after": card_state(place)},
        )


def labels(subjects: Sequence[Subject]) -> list[str]:
    """What the networks of a comparison are called where they have no name, the reference first."""
    return [f"candidate {i}" if i else "before" for i in range(len(subjects))]


def device_name(device: str | torch.device) -> str:
    """The processor or graphics card as its driver names it.

    Raises:
        DeviceError: It is a CUDA device, and absent.
    """
    place = torch.device(device)
    if place.type == "cuda":
        _require_cuda(place)
        return torch.cuda.get_device_name(place)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine() or "unknown processor"


def compared(
    processes: Sequence[Samples], inputs: Sequence[Tensor], settings: TimingSettings
) -> tuple[LatencyComparison, ...]:
    """What several processes, or one, measured of the same networks: one comparison per candidate, in their order."""
    first = processes[0]
    latencies = [
        _latency([(one.seconds[i], one.repeats[i]) for one in processes], first, tuple(inputs[0].shape))
        for i in range(len(first.seconds))
    ]
    found = []
    for after, *ratios in zip(latencies[1:], *(by_round(one.seconds) for one in processes), strict=True):
        ratio, interval = ratio_over_processes(ratios, settings)
        medians = tuple(float(np.median(one)) for one in ratios) if len(processes) > 1 else ()
        found.append(LatencyComparison(latencies[0], after, ratio, interval, by_process=medians))
    return tuple(found)


def device_of(backend: str, device: str | None = None) -> torch.device:
    """The device of a backend; the two must not contradict each other.

    Raises:
        DeviceError: It, or a library that the backend needs, is not there.
        OptionError: One of them is unknown, or they contradict each other.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    bound = not runs_modules(backend)
    implied = "cuda" if backend.startswith(("onnxruntime-cuda", "tensorrt")) else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device or implied):
        raise OptionError(f"device={device!r} is unknown: give cpu, cuda or cuda:N")
    place = torch.device(device or implied)
    if bound and place.type != implied:
        raise OptionError(f"backend={backend!r} runs on {implied}, which contradicts device={device!r}")
    if bound and place.index not in (None, 0):
        raise OptionError(f"backend={backend!r} runs on the first device only, not on device={device!r}")
    if backend == "openvino":
        openvino.require()
    if place.type == "cpu":
        return torch.device("cpu")
    _require_cuda(place)
    if backend == "tensorrt":
        onnxruntime.require_tensorrt()
    return torch.device("cuda", place.index or 0)


def _require_cuda(place: torch.device) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{place} was asked for, and no CUDA device was found (torch {torch.__version__}): "
            "measure on the CPU, or install a CUDA build of torch on a machine with an NVIDIA card"
        )
    if (place.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"{place} was asked for, and this machine has {torch.cuda.device_count()} CUDA device(s)"
        )


def prepare(
    subject: Subject, label: str, inputs: Sequence[Tensor], backend: str, place: torch.device
) -> tuple[str, Ready]:
    """What a network is called in errors, and how it is called with everything in place on the device.

    Raises:
        DeviceError: The backend is not there.
        MeasurementError: It cannot run the network.
    """
    if runs_modules(backend):
        if not isinstance(subject, nn.Module):
            raise MeasurementError(
                f"{label} ({os.fspath(subject)}) is a file, and torch times modules only: choose another backend"
            )
        try:
            return label, module_call(subject, inputs, backend, place)
        except MeasurementError as error:
            raise MeasurementError(f"{label} cannot be timed as {backend}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        path = as_file(subject, label, inputs, Path(folder))
        named = label if isinstance(subject, nn.Module) else f"{label} ({path})"
        return named, _session_call(path, inputs, backend)


def as_file(subject: Subject, label: str, inputs: Sequence[Tensor], folder: Path) -> Path:
    """The ONNX file of a network: a module is written into the folder.

    Raises:
        MeasurementError: There is none.
    """
    if not isinstance(subject, nn.Module):
        if not Path(subject).is_file():
            raise MeasurementError(f"{label} ({os.fspath(subject)}) does not exist: name an ONNX file")
        return Path(subject)
    path = folder / f"{label}.onnx"
    try:
        # The exporter traces with autograd's own view counting, which inference mode switches off.
        with torch.inference_mode(False):
            export_onnx(subject, path, [x.clone() for x in inputs], verify=False)
    except ExportError as error:
        raise MeasurementError(f"{label} cannot be timed as ONNX: {error}") from error
    return path


def _session_call(path: str | os.PathLike[str], inputs: Sequence[Tensor], backend: str) -> Ready:
    threads = torch.get_num_threads()
    if backend == "openvino":
        compiled = openvino.open_session(path, threads=threads)
        return Ready(openvino.bound_call(compiled, inputs), openvino.conditions(compiled))
    half = any(x.dtype == torch.float16 for x in inputs)
    session = onnxruntime.open_session(
        path, device=backend.removeprefix("onnxruntime-"), threads=threads, half=half
    )
    return Ready(onnxruntime.bound_call(session, inputs), onnxruntime.conditions(session))


def _wall_clock(call: Callable[[], object], repeats: int) -> float:
    return timeit.timeit(call, number=repeats) / repeats


def _cuda_clock(place: torch.device, call: Callable[[], object], repeats: int) -> float:
    """Times on the card itself; nothing else may still be running there, and the end is waited for."""
    make = cast("Callable[..., torch.cuda.Event]", torch.cuda.Event)
    start, end = make(enable_timing=True), make(enable_timing=True)
    with torch.cuda.device(place):
        torch.cuda.synchronize(place)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def _latency(
    timed: Sequence[tuple[Sequence[float], int]], measured: Samples, shape: tuple[int, ...]
) -> Latency:
    """The seconds of one network in all processes, each with the calls that made a sample."""
    seconds = np.concatenate([samples for samples, _ in timed])
    quantiles = np.percentile(seconds, range(0, 101, 5)).tolist()
    quarter, median, three_quarters, p90, p95 = (quantiles[i] for i in (5, 10, 15, 18, 19))
    return Latency(
        measured.backend,
        measured.device,
        shape,
        measured.threads,
        median,
        p95,
        iqr_s=three_quarters - quarter,
        runs=sum(len(samples) * repeats for samples, repeats in timed),
        quantiles_s=tuple(quantiles),
        p90_s=p90,
        p99_s=float(np.percentile(seconds, 99)),
    )
