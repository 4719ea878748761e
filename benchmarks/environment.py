"""Where and with what a figure was measured, and writing it down."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fxprune.files import check_writable, write_text_atomic

__all__ = ["RESULTS", "commit", "describe", "kept", "versions", "write_result"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DISTRIBUTIONS = ("fxprune", "torch", "torchvision", "onnx")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


def describe() -> dict[str, Any]:
    """Return the machine, the versions, the date (UTC) and the commit, ready for JSON."""
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": _gpu(), "system": platform.system()},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def write_result(name: str, payload: Mapping[str, Any], seed: int | None) -> Path:
    """Write `benchmarks/results/NAME.json`, whole or not at all.

    Args:
        name: File name without its ending.
        payload: The figures, JSON-able.
        seed: What the run was seeded with; None where nothing is random.

    Returns:
        The file.

    Raises:
        ArtifactError: It cannot be written.
    """
    text = json.dumps({"environment": describe(), "seed": seed, **payload}, indent=1)
    file = check_writable(RESULTS) / f"{name}.json"
    write_text_atomic(file, text + "\n")
    return file


def kept(name: str, settings: Mapping[str, Any], what: str) -> Any:
    """Return what an earlier run of a benchmark finished under the same settings, or None; print which it is.

    Args:
        name: Of the result, see `write_result`.
        settings: What the figures depend on, as JSON gives them back.
        what: Key of the finished part, which has a length.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    if result.get("settings") != settings:
        print(f"{file.name}: kept under other settings, so all {what} start anew")
        return None
    print(f"{file.name}: {len(result[what])} finished {what} taken up")
    return result[what]


def versions() -> dict[str, str | None]:
    """Return the versions of what computes and measures, None for what is not installed."""
    found = {name: _version(name) for name in DISTRIBUTIONS}
    return found | {"onnxruntime": next(filter(None, map(_version, RUNTIMES)), None)}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the processor's name; `platform.processor()` is empty on most Linux systems."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit() -> str | None:
    """Return the commit, marked `+` if the working tree differs from it; None outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}+" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    finished = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return finished.stdout.strip()
