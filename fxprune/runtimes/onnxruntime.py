"""The one file that opens onnxruntime sessions, and that refuses one which fell back to another device."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnxruntime as ort
import torch

from fxprune.errors import DeviceError, MeasurementError
from fxprune.runtimes.feeds import Array, Values, arrays

__all__ = [
    "bound_call",
    "conditions",
    "elsewhere",
    "nodes_by_provider",
    "open_session",
    "require_tensorrt",
    "run",
]

logger = logging.getLogger(__name__)

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cuda-heuristic": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# Of cuDNN's two ways to choose algorithms the first is onnxruntime's own; what it calls DEFAULT is the slow fallback.
_TOLD = {
    "cpu": {},
    "cuda": {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "1"},
    "cuda-heuristic": {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1"},
    "tensorrt": {},
}
_CUDA_ADVICE = 'install the runtime with its CUDA libraries: pip install "onnxruntime-gpu[cuda,cudnn]"'
_TENSORRT_ADVICE = 'pip install "tensorrt-cu13>=10.13,<11"'
# onnxruntime reports device discovery and every fallback on stderr, behind Python's back, and what run() raises too.
_LOG_ERRORS, _LOG_NONE = 3, 4


def open_session(
    path: str | os.PathLike[str],
    *,
    device: str,
    threads: int | None = None,
    half: bool = False,
    optimised: bool = True,
    optimised_to: Path | None = None,
) -> ort.InferenceSession:
    """Opens an ONNX file on a device, and nowhere else.

    Args:
        path: An ONNX network.
        device: `cpu`, `cuda`, `cuda-heuristic` or `tensorrt`.
        threads: Intra-operator threads; `None` leaves the choice to onnxruntime.
        half: Whether the network computes in float16. On the CPU its memory layout is then left as it is: optimising
            that ends the whole process for some vision transformers (seen with onnxruntime 1.31).
        optimised: Whether onnxruntime may rewrite the graph.
        optimised_to: Where it writes what it made of it.

    Raises:
        DeviceError: The device, its provider or one of its libraries is missing.
        MeasurementError: onnxruntime cannot load the network.
    """
    if device not in _PROVIDERS:
        raise DeviceError(f"onnxruntime cannot run on {device!r} here: choose one of {', '.join(_PROVIDERS)}")
    if device == "tensorrt":
        require_tensorrt()
    printed = "" if device == "cpu" else _require_cuda(_PROVIDERS[device])
    options = ort.SessionOptions()
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif half and device == "cpu":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if optimised_to is not None:
        options.optimized_model_filepath = os.fspath(optimised_to)
    options.log_severity_level = _LOG_ERRORS
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(
            os.fspath(path), options, providers=[(_PROVIDERS[device], _TOLD[device])]
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise MeasurementError(f"onnxruntime cannot load {os.fspath(path)} on {device}: {error}") from error
    used = session.get_providers()[0]
    if used != _PROVIDERS[device]:
        raise DeviceError(
            f"onnxruntime could not start {_PROVIDERS[device]} and fell back to {used}"
            f" for {os.fspath(path)}; a library of the card is missing or of the wrong version"
            f"{f' ({printed})' if printed else ''}: {_CUDA_ADVICE}"
        )
    _check_nodes(session, os.fspath(path))
    return session


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, dict[str, int]] | None:
    """How many nodes of each operator every provider was given; None where this onnxruntime does not say."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return None
    found: dict[str, Counter[str]] = {}
    for part in tell():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return {provider: dict(operators) for provider, operators in found.items()}


def _check_nodes(session: ort.InferenceSession, path: str) -> None:
    """Refuses a session whose provider got none of the network, and warns of nodes that others got."""
    used = session.get_providers()[0]
    nodes = nodes_by_provider(session)
    if not nodes or nodes.keys() == {used}:
        return
    others = elsewhere(nodes, used)
    if used not in nodes:
        raise DeviceError(f"{used} runs no node of {path}; onnxruntime gave {others}")
    logger.warning("%s does not run the whole of %s: onnxruntime gave %s", used, path, others)


def elsewhere(nodes: Mapping[str, Mapping[str, int]], provider: str) -> str:
    """What a provider was not given, in words; empty where it was given all nodes.

    Args:
        nodes: What `nodes_by_provider` found.
        provider: The one that was asked for.
    """
    total = sum(sum(operators.values()) for operators in nodes.values())
    return "; ".join(
        f"{sum(operators.values())} of {total} nodes to {other} ({', '.join(sorted(operators))})"
        for other, operators in nodes.items()
        if other != provider
    )


def conditions(session: ort.InferenceSession) -> dict[str, object]:
    """What onnxruntime was told, for a record, and which provider runs how many nodes of each operator."""
    provider = session.get_providers()[0]
    own = {"tf32": "allowed, TensorRT's default"} if provider == _PROVIDERS["tensorrt"] else {}
    return {
        "onnxruntime": ort.__version__,
        "provider": provider,
        "provider_options": session.get_provider_options()[provider],
        "graph_optimization": session.get_session_options().graph_optimization_level.name,
        "nodes": nodes_by_provider(session) or f"not recorded: onnxruntime {ort.__version__} does not say",
        **own,
    }


def require_tensorrt() -> None:
    """Loads TensorRT for onnxruntime, whose provider is made for one of its versions.

    Raises:
        DeviceError: It is not there, or another version.
    """
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        raise DeviceError(f"TensorRT is not installed ({error}): {_TENSORRT_ADVICE}") from error
    if not version.startswith("10."):
        raise DeviceError(f"TensorRT {version} is installed, and onnxruntime needs 10: {_TENSORRT_ADVICE}")


def _require_cuda(provider: str) -> str:
    """Loads the CUDA libraries for onnxruntime and returns what could not be loaded, in its own words."""
    if not torch.cuda.is_available():
        raise DeviceError(
            "no CUDA device was found: onnxruntime cannot run on cuda here; measure on the CPU instead"
        )
    # preload_dlls() prints the libraries that it cannot load instead of raising.
    with contextlib.redirect_stdout(io.StringIO()) as output:
        ort.preload_dlls()
    if provider not in ort.get_available_providers():
        raise DeviceError(
            f"the installed onnxruntime {ort.__version__} has no CUDA support ({provider}); "
            f"uninstall onnxruntime and {_CUDA_ADVICE}"
        )
    return " ".join(output.getvalue().split())


def run(session: ort.InferenceSession, inputs: Sequence[Values]) -> list[Array]:
    """Runs once, with inputs in the order of the network's own; outputs come in graph order.

    Raises:
        MeasurementError: The number, shapes or types of the inputs do not fit the network.
    """
    feeds, options = _feeds(session, inputs), ort.RunOptions()
    options.log_severity_level = _LOG_NONE
    try:
        outputs: list[Array] = session.run(None, feeds, options)
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise MeasurementError(f"onnxruntime failed while running the network: {error}") from error
    return outputs


def bound_call(session: ort.InferenceSession, inputs: Sequence[Values]) -> Callable[[], None]:
    """Binds inputs and outputs on the session's device: a call runs the network, without copies, and waits for its end.

    Raises:
        MeasurementError: The inputs do not fit the network; raised here or by the call.
    """
    device = "cpu" if session.get_providers()[0] == _PROVIDERS["cpu"] else "cuda"
    binding = session.io_binding()
    for name, array in _feeds(session, inputs).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def call() -> None:
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise MeasurementError(f"onnxruntime failed while running the network: {error}") from error

    return call


def _feeds(session: ort.InferenceSession, inputs: Sequence[Values]) -> dict[str, Array]:
    names = [entry.name for entry in session.get_inputs()]
    return dict(zip(names, arrays(inputs, names), strict=True))
