"""The recipes for pipelines: what stands in them runs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

import fxprune
from fxprune.options import RECIPES
from fxprune.shell import cli
from tests.doubles import brief, count_latency
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parent.parent
RECIPES_OF = ROOT / "examples" / "pipelines"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the recipes expect it; nothing is timed, and fits take few steps."""
    count_latency(monkeypatch)
    monkeypatch.setitem(RECIPES, "fast", brief())
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tests" / "tiny.py", "tiny.py")
    Path("net.py").write_text("from tiny import tiny as build\n")
    save_file(tiny().state_dict(), "W.safetensors")
    Path("images").mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{index}.png")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command of the shell in this process, `> FILE` included."""
    words, _, file = command.partition(">")
    program, *arguments = shlex.split(words)
    assert program == "fxprune"
    assert cli.main(arguments) == 0
    if file:
        Path(file.strip()).write_text(capsys.readouterr().out)


def compressed(capsys: pytest.CaptureFixture[str]) -> Path:
    run(
        "fxprune compress net.py:build --weights W.safetensors --data images --size 32 --k 1 --out OUT",
        capsys,
    )
    return Path("OUT")


def test_the_workflow_compresses_and_measures(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workflow = yaml.safe_load((RECIPES_OF / "github_actions.yml").read_text())
    steps = workflow["jobs"]["compress"]["steps"]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("fxprune ")]
    assert len(commands) == 2
    for command in commands:
        run(command.replace("--min-agreement 0.9 ", "--min-agreement 0 "), capsys)
    kept = next(step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", ""))
    assert all(list(project.glob(pattern)) for pattern in kept.split())


def test_the_dvc_stage_makes_what_it_names(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = yaml.safe_load((RECIPES_OF / "dvc.yaml").read_text())["stages"]["compress"]
    assert all(Path(name).exists() for name in stage["deps"])
    run(stage["cmd"], capsys)
    made = [*stage["outs"], *(name for metric in stage["metrics"] for name in metric)]
    assert all(Path(name).is_file() for name in made)


def test_dvc_takes_the_stage(project: Path) -> None:
    pytest.importorskip("dvc")
    shutil.copy(RECIPES_OF / "dvc.yaml", "dvc.yaml")
    for command in ("init --no-scm -q", "stage list --name-only"):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compress"]


@pytest.mark.filterwarnings("ignore")  # what its own dependencies deprecate
def test_mlflow_holds_figures_and_networks(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    script: Any = module_from_spec(
        spec := spec_from_file_location("log_to_mlflow", RECIPES_OF / "log_to_mlflow.py")
    )
    spec.loader.exec_module(script)
    folder = compressed(capsys)
    kept = mlflow.get_run(script.log(folder))
    metrics = fxprune.report(fxprune.load(folder)).metrics
    assert {name: pytest.approx(value) for name, value in metrics.items()} == kept.data.metrics
    assert kept.data.params["cut"] == ", ".join(fxprune.report(fxprune.load(folder)).plan.chosen)
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(kept.info.run_id)}
    assert {"plan.json", "report.json", "report.html", "fxprune"} <= names


def test_the_dockerfile_is_linted() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    command = [hadolint, "--no-color", RECIPES_OF / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_metrics_are_numbers_that_are_known(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fxprune.report(fxprune.load(compressed(capsys)))
    assert report.metrics["cuts"] == 1
    assert report.metrics["latency_ratio"] == report.latency.ratio
    assert "top1_after" not in report.metrics
    assert all(type(value) is float for value in report.metrics.values())
