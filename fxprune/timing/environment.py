"""On what something was measured."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch

from fxprune.timing.latency import device_name

__all__ = ["peak_memory", "versions"]


def peak_memory(device: str) -> int | None:
    """Most bytes held so far: by torch's allocator on CUDA, else by the process; None where the system does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(device: str) -> dict[str, str]:
    """Versions of the software, and the device as its driver names it."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device_name(device)}
    packages = ("fxprune", "onnxruntime", "onnxruntime-gpu", "openvino", "onnx")
    return found | {d.name: d.version for name in packages for d in metadata.distributions(name=name)}
