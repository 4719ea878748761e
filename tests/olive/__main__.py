"""Runs the recipe for Olive as docs/pipelines.md tells it, by `olive run` itself: `python -m tests.olive`.

Olive comes from a package index, in an environment that reads everything else from the present one. Where it cannot be
had, the last line says why; anything that it makes wrongly is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch

import fxprune
from fxprune.runtimes import onnxruntime
from tests.environments import ROOT, CannotRunError, with_guests
from tests.test_pipelines import RECIPES_OF, lay_out

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Follows the recipe, and says what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.olive", description="run the pass for Olive in Olive"
    )
    parser.add_argument("--environment", type=Path, metavar="DIR", help="keep Olive's environment here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, project = Path(temporary), Path(temporary) / "project"
        try:
            environment = (given.environment or folder / "environment").resolve()
            python = with_guests(environment, HERE / "requirements.txt", beside_present=True)
        except CannotRunError as error:
            print(f"tests.olive: not run: {error}")
            return 0
        project.mkdir()
        lay_out(project, images=24)
        for name in ("olive.json", "olive_script.py"):
            shutil.copy(RECIPES_OF / name, project)
        variables = {
            **os.environ,
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
        }
        subprocess.run(["bash", "-ec", commands()], cwd=project, env=variables, check=True, timeout=900)
        judge(project)
    print("tests.olive: one file in eight bits, and it answers as the compressed network does")
    return 0


def commands() -> str:
    """What the document tells people to type."""
    (found,) = re.findall(
        r"```sh\n([^`]*olive run[^`]*)```", (ROOT / "docs" / "pipelines.md").read_text(), re.DOTALL
    )
    return str(found)


def judge(project: Path) -> None:
    """Whether the file in eight bits is the network that was cut."""
    (file,) = (project / "MODEL").rglob("*.onnx")
    kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert kinds["Conv"] == 10 - 2 * 2, kinds  # of the two blocks that went
    assert kinds["QuantizeLinear"] >= kinds["Conv"], kinds
    small = fxprune.load(project / "OUT")
    assert len(fxprune.report(small).plan.chosen) == 2
    # as bright as pictures are, for what lies outside the ranges of the calibration images is cut off
    x = (torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.45) / 0.225
    (answers,) = onnxruntime.run(onnxruntime.open_session(file, device="cpu"), [x])
    with torch.no_grad():
        expected = small(x).numpy()
    away = float(np.linalg.norm(answers - expected) / np.linalg.norm(expected))
    assert away < 0.2, away  # Olive's quantiser corrects no biases


if __name__ == "__main__":
    sys.exit(main())
