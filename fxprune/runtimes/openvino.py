"""OpenVINO on the CPU, for those who have installed it: the same functions as of onnxruntime."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from fxprune.errors import DeviceError, MeasurementError
from fxprune.runtimes.feeds import Array, Values, arrays

__all__ = ["Session", "bound_call", "conditions", "open_session", "require", "run"]

Session: TypeAlias = Any
"""A compiled model; the library is not always there to name its type."""

_TOLD = {
    "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 on processors that have it
    "NUM_STREAMS": 1,
    "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_CPU_PINNING": False,  # it would take the caller's thread along
}
_THREADS = "INFERENCE_NUM_THREADS"


def require() -> ModuleType:
    """The library.

    Raises:
        DeviceError: It is not there.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise DeviceError(f"OpenVINO is not installed ({error}): pip install openvino") from error


def open_session(path: str | os.PathLike[str], *, threads: int) -> Session:
    """Compiles an ONNX file, as it is, for answers of single batches in single precision.

    Args:
        path: An ONNX network.
        threads: How many work on a call.

    Raises:
        DeviceError: OpenVINO is not installed.
        MeasurementError: It cannot read or compile the network.
    """
    library = require()
    try:
        return library.Core().compile_model(os.fspath(path), "CPU", {**_TOLD, _THREADS: threads})
    except Exception as error:  # OpenVINO raises RuntimeError, and what its readers raise
        raise MeasurementError(f"OpenVINO cannot load {os.fspath(path)}: {_gist(error)}") from error


def conditions(session: Session) -> dict[str, object]:
    """What OpenVINO was told, for a record."""
    return {
        "openvino": require().get_version(),
        "provider": ", ".join(session.get_property("EXECUTION_DEVICES")),
        "provider_options": {name: _plain(session.get_property(name)) for name in (*_TOLD, _THREADS)},
    }


def run(session: Session, inputs: Sequence[Values]) -> list[Array]:
    """Runs once, with inputs in the order of the network's own; outputs come in graph order.

    Raises:
        MeasurementError: The number, shapes or types of the inputs do not fit the network.
    """
    request = _loaded(session, inputs)
    _infer(request)
    return [np.array(request.get_output_tensor(place).data) for place in range(len(session.outputs))]


def bound_call(session: Session, inputs: Sequence[Values]) -> Callable[[], None]:
    """Binds inputs: a call runs the network, without copies, and waits for its end.

    Raises:
        MeasurementError: The inputs do not fit the network; raised here or by the call.
    """
    request = _loaded(session, inputs)
    return lambda: _infer(request)


def _loaded(session: Session, inputs: Sequence[Values]) -> Any:
    """A request that reads the inputs where they lie."""
    values = arrays(inputs, [entry.any_name for entry in session.inputs])
    request = session.create_infer_request()
    try:
        for place, value in enumerate(values):
            request.set_input_tensor(place, require().Tensor(value, shared_memory=True))
    except RuntimeError as error:
        raise MeasurementError(f"OpenVINO failed while running the network: {_gist(error)}") from error
    return request


def _infer(request: Any) -> None:
    try:
        request.infer()
    except RuntimeError as error:
        raise MeasurementError(f"OpenVINO failed while running the network: {_gist(error)}") from error


def _plain(value: Any) -> Any:
    """A property as JSON takes it; types of numbers by name."""
    return value if isinstance(value, (bool, int, float, str)) else value.to_string()


def _gist(error: Exception) -> str:
    """What OpenVINO says, without the lines of its own source that lead there."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Exception from "))
