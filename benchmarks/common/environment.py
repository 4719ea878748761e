"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.timing.latency import device_name

__all__ = ["commit", "describe", "versions"]

ROOT = Path(__file__).resolve().parents[2]
MADE = ("benchmarks/results", "benchmarks/README.md")
"""What the benchmarks write themselves, and no figure depends on."""
DISTRIBUTIONS = ("torch", "torchvision", "onnx", "timm")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


def describe() -> dict[str, Any]:
    """Returns the machine, the versions, the date (UTC) and the commit, ready for JSON."""
    gpu = device_name("cuda") if torch.cuda.is_available() else None
    machine = {"cpu": device_name("cpu"), "cores": os.cpu_count(), "gpu": gpu, "system": platform.system()}
    return {
        "machine": machine,
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of what computes and measures, None for what is not installed."""
    found = {"fxprune": fxprune.__version__} | {name: _version(name) for name in DISTRIBUTIONS}
    return found | {"onnxruntime": next(filter(None, map(_version, RUNTIMES)), None)}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str | None:
    """Returns the commit, marked `+` if tracked files other than results differ; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    others = [f":(exclude){path}" for path in MADE]
    try:
        head = git("rev-parse", "--short", "HEAD")
        return (
            f"{head}+" if git("status", "--porcelain", "--untracked-files=no", "--", ".", *others) else head
        )
    except (OSError, subprocess.CalledProcessError):
        return None
