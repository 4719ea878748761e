"""A question to a fresh process, and its answer: the two share a folder with JSON, and one that dies is named."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxprune import errors
from fxprune.errors import FxpruneError, MeasurementError
from fxprune.files import write_text_atomic
from fxprune.memory import memory_explained

__all__ = ["answer", "ask", "leave"]

logger = logging.getLogger(__name__)

_QUESTION, _ANSWER = "question.json", "answer.json"


def ask(folder: Path, question: dict[str, Any], module: str, which: str) -> Any:
    """Starts a process, waits for its end and reads what it left.

    Args:
        folder: What it works in.
        question: Plain data.
        module: What it runs; its main calls `answer`.
        which: What it is called in errors.

    Raises:
        MeasurementError: It died.
        FxpruneError: It said so.
    """
    (folder / _ANSWER).unlink(missing_ok=True)
    (folder / _QUESTION).write_text(json.dumps(question))
    logger.info("measuring in %s", which)
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # the same packages as here
    ended = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
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
    found = json.loads((folder / _ANSWER).read_text())
    if "error" in found:
        kind = getattr(errors, found["error"])
        raise kind(f"{which} that measured failed: {found['message']}")
    return found


def answer(folder: Path, work: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the question in a folder.

    Args:
        folder: Where it lies.
        work: Is given the folder and the question, and returns plain data.
    """
    try:
        with memory_explained():
            found = work(folder, json.loads((folder / _QUESTION).read_text()))
    except FxpruneError as error:
        leave(folder, error)
    else:
        write_text_atomic(folder / _ANSWER, json.dumps(found))


def leave(folder: Path, error: FxpruneError) -> None:
    """Leaves an error as the answer."""
    said = {"error": type(error).__name__, "message": str(error)}
    write_text_atomic(folder / _ANSWER, json.dumps(said))


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended by signal {-code}"
