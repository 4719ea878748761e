"""How long networks take, side by side: the one file that knows torch timing and onnxruntime timing.

All networks of a comparison live in one process and take turns in a drawn order, round by round
(`rounds.py`), so that whatever slows the machine slows all of them. Times are seconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import DeviceError, ExportError, MeasurementError, OptionError
from fxprune.export import serving
from fxprune.export.onnx_file import export_onnx
from fxprune.measurements import Latency, LatencyComparison
from fxprune.options import Backend
from fxprune.processes.threads import using_threads
from fxprune.progress import progress
from fxprune.timing.collector import collector_paused
from fxprune.timing.rounds import Clock, Contestant, TimingSettings, race, ratios_by_round, warm_up
from fxprune.tracing.evaluation import evaluation_copy

__all__ = ["BACKENDS", "Subject", "TimingSettings", "compare", "device_name"]

BACKENDS = get_args(Backend)
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
    """Time a network against candidates, alternately, until the ratios are known well enough.

    Args:
        before: The reference: a module, or the path of an ONNX file where `backend` is an onnxruntime one.
        candidates: What to compare with it, likewise. Modules are not changed.
        inputs: The tensors of one call, batch first.
        backend: One of `BACKENDS`; modules are exported for the onnxruntime ones.
        device: `cpu` or `cuda[:N]` for torch (`cpu` by default); implied by the onnxruntime backends.
        settings: When to stop; the defaults if `None`.
        show_progress: Whether a bar is drawn.

    Returns:
        One comparison per candidate, in their order.

    Raises:
        DeviceError: CUDA is asked for and absent.
        MeasurementError: A network cannot be prepared or run on the backend.
        OptionError: The backend is unknown, contradicts the device, or there are no inputs.
    """
    settings = settings or TimingSettings()
    place = _device_of(backend, device)
    if not inputs:
        raise OptionError("compare() needs the input tensors of one call, none were given")
    if not candidates:
        return ()
    gc.collect()
    with using_threads(settings.threads), collector_paused(), torch.inference_mode():
        threads = torch.get_num_threads() if place.type == "cpu" else 0
        contestants = [
            _prepare(subject, f"candidate {i}" if i else "before", inputs, backend, place)
            for i, subject in enumerate([before, *candidates])
        ]
        clock: Clock = partial(_cuda_clock, place) if place.type == "cuda" else _wall_clock
        warm_up(contestants, clock, settings.warmup)
        with progress("latency, at most", settings.max_seconds, "s", show=show_progress) as tell:
            intervals = race(contestants, clock, settings, lambda share: tell(share * settings.max_seconds))
    reference, *others = _latencies(contestants, backend, device_name(place), tuple(inputs[0].shape), threads)
    return tuple(
        LatencyComparison(reference, after, float(np.median(ratios)), interval)
        for after, ratios, interval in zip(others, ratios_by_round(contestants), intervals, strict=True)
    )


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


def _device_of(backend: str, device: str | None) -> torch.device:
    """The device of a backend; the two must not contradict each other."""
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    bound = backend != "torch"
    implied = backend.removeprefix("onnxruntime-") if bound else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device or implied):
        raise OptionError(f"device={device!r} is unknown: give cpu, cuda or cuda:N")
    place = torch.device(device or implied)
    if bound and place.type != implied:
        raise OptionError(f"backend={backend!r} runs on {implied}, which contradicts device={device!r}")
    if bound and place.index not in (None, 0):
        raise OptionError(f"backend={backend!r} runs on the first device only, not on device={device!r}")
    if place.type == "cpu":
        return torch.device("cpu")
    _require_cuda(place)
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


def _prepare(
    subject: Subject, label: str, inputs: Sequence[Tensor], backend: str, place: torch.device
) -> Contestant:
    """Make a network ready to be called without arguments, with everything in place on the device."""
    if not isinstance(subject, nn.Module):
        label = f"{label} ({os.fspath(subject)})"
        if backend == "torch":
            raise MeasurementError(
                f"{label} is a file, and torch times modules only: choose an onnxruntime backend"
            )
        if not Path(subject).is_file():
            raise MeasurementError(f"{label} does not exist: name an ONNX file")
        return Contestant(label, _session_call(subject, inputs, place))
    if backend == "torch":
        return Contestant(label, _module_call(subject, inputs, place))
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        path = Path(folder) / "network.onnx"
        try:
            # The exporter traces with autograd's own view counting, which inference mode switches off.
            with torch.inference_mode(False):
                export_onnx(subject, path, [x.clone() for x in inputs], verify=False)
        except ExportError as error:
            raise MeasurementError(f"{label} cannot be timed in onnxruntime: {error}") from error
        return Contestant(label, _session_call(path, inputs, place))


def _module_call(module: nn.Module, inputs: Sequence[Tensor], place: torch.device) -> Callable[[], None]:
    tensors = [*module.parameters(), *module.buffers()]
    ready = all(x.device == place for x in tensors) and not any(m.training for m in module.modules())
    network = module if ready else evaluation_copy(module).requires_grad_(False).to(place)
    return partial(network, *(x.to(place) for x in inputs))


def _session_call(
    path: str | os.PathLike[str], inputs: Sequence[Tensor], place: torch.device
) -> Callable[[], None]:
    half = any(x.dtype == torch.float16 for x in inputs)
    session = serving.open_session(path, device=place.type, threads=torch.get_num_threads(), half=half)
    return serving.bound_call(session, inputs)


def _wall_clock(call: Callable[[], None], repeats: int) -> float:
    return timeit.timeit(call, number=repeats) / repeats


def _cuda_clock(place: torch.device, call: Callable[[], None], repeats: int) -> float:
    """Time on the card itself; nothing else may still be running there, and the end is waited for."""
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


def _latencies(
    contestants: Sequence[Contestant], backend: str, device: str, shape: tuple[int, ...], threads: int
) -> Iterator[Latency]:
    for one in contestants:
        quantiles = np.percentile(one.samples, range(0, 101, 5)).tolist()
        quarter, median, three_quarters, p90, p95 = (quantiles[i] for i in (5, 10, 15, 18, 19))
        p99 = float(np.percentile(one.samples, 99))
        spread, runs = three_quarters - quarter, len(one.samples) * one.repeats
        yield Latency(backend, device, shape, threads, median, p95, spread, runs, tuple(quantiles), p90, p99)
