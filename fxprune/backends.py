"""What networks are timed in, by name."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["BACKENDS", "Backend", "runs_modules"]

Backend = Literal[
    "torch",
    "torch-channels-last",
    "torch-bf16",
    "torch-compile",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-cuda-heuristic",
    "tensorrt",
    "openvino",
]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def runs_modules(backend: str) -> bool:
    """Whether it is torch, in one of its ways, and not a runtime of ONNX files."""
    return backend.partition("-")[0] == "torch"
