"""On what something was measured."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from fxprune.deploy.latency import device_name

__all__ = ["versions"]


def versions(device: str) -> dict[str, str]:
    """Versions of the software, and the device as its driver names it."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device_name(device)}
    packages = ("fxprune", "onnxruntime", "onnxruntime-gpu", "onnx")
    return found | {d.name: d.version for name in packages for d in metadata.distributions(name=name)}
