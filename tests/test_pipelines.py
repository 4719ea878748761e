"""The recipes for pipelines: what stands in them runs."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import signature
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
    lay_out(tmp_path, images=6)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def lay_out(folder: Path, *, images: int) -> None:
    """Puts a network, its weights and images where the recipes look for them."""
    shutil.copy(ROOT / "tests" / "tiny.py", folder)
    (folder / "net.py").write_text("from tiny import tiny as build\n")
    save_file(tiny().state_dict(), folder / "W.safetensors")
    (folder / "images").mkdir()
    for index in range(images):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")


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


def test_olive_finds_the_pass_and_its_settings() -> None:
    known = json.loads(files("fxprune.integrations").joinpath("olive.json").read_text())["passes"]
    module, _, name = known["FxPrune"]["module_path"].rpartition(".")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    assert name in {
        node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.ClassDef)
    }
    cut = json.loads((RECIPES_OF / "olive.json").read_text())["passes"]["cut"]
    assert cut["type"] in known and json.dumps(cut) in (ROOT / "docs" / "pipelines.md").read_text()
    assert cut.keys() - {"type", "data_config"} <= signature(fxprune.compress).parameters.keys()


def test_without_olive_its_pass_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olive", None)
    monkeypatch.delitem(sys.modules, "fxprune.integrations.olive", raising=False)
    with pytest.raises(ImportError, match=r"needs Olive .*pip install olive-ai"):
        import_module("fxprune.integrations.olive")


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
