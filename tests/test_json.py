"""What `--json` prints, against the schema that comes with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from fxprune.export.onnx_file import export_onnx
from fxprune.options import RECIPES
from fxprune.shell import cli
from tests.doubles import brief, count_latency
from tests.tiny import images, tiny

SCHEMA = json.loads(files("fxprune.shell").joinpath("output.schema.json").read_text())
FACTORY = Path(__file__).parent / "tiny.py"


def validate(command: str, data: Any) -> None:
    """Fails unless the data is what a command prints, as described."""
    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{command}"}).validate(data)


def printed(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> Any:
    """What a command prints as JSON, once it is known to be as described."""
    assert cli.main([command, *arguments, "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    validate(command, data)
    return data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibration images, and two classes of labelled ones."""
    count_latency(monkeypatch)
    monkeypatch.setitem(RECIPES, "fast", brief())
    for index, name in enumerate(("0.png", "1.png", "a/0.png", "b/0.png", "c/0.png", "d/0.png", "e/0.png")):
        path = tmp_path / ("labelled" if "/" in name else "images") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {name for name, *_ in cli._COMMANDS} <= SCHEMA["$defs"].keys()
    for name, data in (("compress", {}), ("measure", {"backend": 1}), ("interval", {"low": 0, "high": 1})):
        with pytest.raises(jsonschema.ValidationError):
            validate(name, data)


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    data = printed(capsys, "inspect", f"{FACTORY}:tiny", "--size", "16")
    assert len(data["regions"]) == 4


def test_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "net.svg")
    data = printed(capsys, "draw", f"{FACTORY}:tiny", "--size", "16", "--out", file)
    assert (len(data["regions"]), data["out"]) == (4, file)


@pytest.mark.parametrize("labelled", [False, True])
def test_compress(folder: Path, labelled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{FACTORY}:tiny", "--data", str(folder / "images"), "--size", "16", "--k", "1"]
    if labelled:
        arguments += ["--labels", str(folder / "labelled"), "--fp16", "--int8"]
    out = folder / "compressed"
    data = printed(capsys, "compress", *arguments, "--out", str(out))
    assert len(data["plan"]["chosen"]) == 1 and len(data["plan"]["scores"]) == 4
    assert list(data["fewer_bits"]) == (["model.fp16.onnx", "model.int8.onnx"] if labelled else [])
    assert printed(capsys, "report", str(out)) == data


def test_sweep_and_its_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    arguments = [f"{FACTORY}:tiny", "--data", str(folder / "images"), "--size", "16", "--out", str(out)]
    data = printed(capsys, "sweep", *arguments)
    assert json.loads((out / "sweep.json").read_text()) == data


def test_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "tiny.onnx")
    export_onnx(tiny(), path, [images(2)], verify=False)
    asked = ("--rounds", "5", "--processes", "1", "--batch", "2", "--threads", "1")
    data = printed(capsys, "measure", path, path, path, *asked)
    assert data["processes"] == 1
    assert all(one["ratio_by_process"] == [one["ratio"]] for one in data["after"])
    assert [one["runs"] % 5 for one in data["after"]] == [0, 0]
    for one in (data["before"], *data["after"]):
        assert one["median_s"] <= one["p90_s"] <= one["p95_s"] <= one["p99_s"]
        assert one["images_per_s"] == pytest.approx(2 / one["median_s"])
    assert data["options"]["provider"] == "CPUExecutionProvider"
    assert data["options"]["graph_optimization"] == "ORT_ENABLE_ALL"
