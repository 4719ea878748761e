from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

import fxprune
import fxprune.api  # before any test patches what it imports
from fxprune.errors import (
    AgreementError,
    CalibrationError,
    DeviceError,
    ExportError,
    MeasurementError,
    NoRegionError,
    ParityError,
    SourceError,
    TargetError,
)
from fxprune.graph.regions import Discovery, Kind, Reason, Region, Rejection
from fxprune.measurements import Interval, Latency, LatencyComparison
from fxprune.measuring import fresh
from fxprune.processes.threads import default_threads
from fxprune.reports import tables
from fxprune.reports.call import SHELL_COMMAND
from fxprune.shell import arguments, cli, images
from fxprune.sources import networks
from fxprune.timing.rounds import Samples


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 1)
        self.shortcut = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x) + self.shortcut(x)


DISCOVERY = Discovery(
    (
        Region(
            "x",
            "add",
            "shortcut",
            ("branch", "shortcut", "add"),
            Kind.PROJECTION,
            "branch",
            ("branch",),
            (1, 3, 8, 8),
            "f32",
        ),
        Region(
            "x",
            "add",
            "x",
            ("branch", "shortcut", "add"),
            Kind.IDENTITY,
            "whole",
            ("branch", "shortcut"),
            (1, 3, 8, 8),
            "f32",
        ),
    ),
    (Rejection("x", "add", Reason.SHAPE, ("add",), "8 channels meet 3", "stem"),),
)


class Recorder:
    """Stands in for one of the package's functions and keeps how it was called."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        self.calls.append(args)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch):
    def put(name: str, result: Any, where: Any = fxprune) -> Recorder:
        recorder = Recorder(result)
        monkeypatch.setattr(where, name, recorder, raising=False)
        return recorder

    return put


@pytest.fixture
def traced(replace) -> Recorder:
    replace("load_model", Residual(), networks)
    return replace("trace", torch.fx.symbolic_trace(Residual()))


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fxprune.shell import cli; code = cli.main(['--help']);"
        "print([m for m in ('torch', 'onnx', 'torchvision', 'onnxruntime') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compress" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["compress", "m", "--data", "d"],
        ["compress", "m", "--data", "d", "--k", "0"],
        ["compress", "m", "--data", "d", "--k", "-3"],
        ["compress", "m", "--data", "d", "--k", "2", "--target-speedup", "1.3"],
        ["compress", "m", "--k", "2"],
        ["compress", "m", "--data", "d", "--k", "2", "--mean", "1,2"],
        ["inspect", "m", "--kinds", "round"],
        ["inspect", "m", "--input-shape", "1,0"],
        ["measure", "a.onnx"],
        ["measure", "a.onnx", "b.onnx", "--backend", "openvino,abacus"],
        ["sweep", "m"],
        ["sweep", "m", "--data", "d", "--k", "2"],
        ["sweep", "m", "--data", "d", "--selection", "exact"],
        ["sweep", "m", "--data", "d", "--cache-mib", "0"],
    ],
)
def test_wrong_usage_gives_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "--threads", "abc"], "'abc' is not a whole number"),
        (["demo", "--threads", "99999999999"], "99999999999 does not lie between 1 and 2147483647"),
        (["demo", "--seed", "99999999999999999999"], "does not lie between 0 and"),
        (["inspect", "m", "--input-shape", "1,x"], "'x' is not a whole number"),
        (["inspect", "m", "--input-shape", "1,0"], "0 does not lie between 1 and"),
        (["inspect", "m", "--input-shape", "99999999999,99999999999,1,1"], "does not lie between"),
        (["inspect", "m", "--input-shape", "1,3,99999,99999"], "more than 268435456 values"),
        (["inspect", "m", "--size", "100000"], "100000 does not lie between 1 and 4096"),
        (["sweep", "m", "--data", "d", "--mean", "1,2"], "'1,2' is not three numbers"),
        (["sweep", "m", "--data", "d", "--std", "a,b,c"], "'a,b,c' is not three numbers"),
        (["sweep", "m", "--data", ""], "--data: the path is empty"),
        (["sweep", "m", "--data", "d", "--labels", ""], "--labels: the path is empty"),
        (["sweep", "m", "--data", "d", "--out", ""], "--out: the path is empty"),
        (["compress", "m", "--k", "1", "--data", "d", "--out", ""], "--out: the path is empty"),
        (["demo", "--out", ""], "--out: the path is empty"),
        (["inspect", "m", "--weights", ""], "--weights: the path is empty"),
    ],
)
def test_wrong_values_are_named_in_plain_words(argv: list[str], words: str, capsys) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and "_positive" not in err


@pytest.mark.parametrize("option", ["--mean", "--std"])
@pytest.mark.parametrize("value", ["nan,1,1", "1,inf,1"])
def test_means_and_deviations_are_finite(option: str, value: str, traced, replace, photos, capsys) -> None:
    compress = replace("compress", None)
    argv = ["compress", "m", "--k", "1", "--data", str(photos), "--size", "8", option, value]
    assert cli.main(argv) == 2
    assert "three finite numbers" in capsys.readouterr().err and compress.calls == []


def test_the_version_stands_in_one_place(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fxprune {fxprune.__version__}\n"
    root = Path(__file__).parent.parent
    assert 'attr = "fxprune._version.__version__"' in (root / "pyproject.toml").read_text()
    package = sorted(Path(fxprune.__file__).parent.rglob("*.py"))
    files = [*package, root / "pyproject.toml", root / "setup.cfg"]
    quoted = [path.name for path in files if f'"{fxprune.__version__}"' in path.read_text()]
    assert quoted == ["_version.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what torch brings on Linux")
@pytest.mark.parametrize(
    ("users", "seen"),
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
    ],
)
def test_waiting_threads_rest_unless_the_user_says_otherwise(users: dict[str, str], seen: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    code = (
        "import os, sys; from fxprune.shell import cli; cli.main(['--version']); assert 'torch' not in sys.modules;"
        f"print(*(os.environ.get(name) for name in {names}))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | users, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == seen


def test_patterns_to_ignore_leave_the_model_alone(traced, replace) -> None:
    discover = replace("discover", DISCOVERY)
    assert cli.main(["inspect", "--ignore", "a*,b", "--ignore", "c", "m", "--size", "8"]) == 0
    assert discover.kwargs["ignore"] == ("a*", "b", "c")


def test_what_a_factory_prints_is_no_result(tmp_path: Path, replace, capsys) -> None:
    path = tmp_path / "noisy.py"
    path.write_text(
        "from torch import nn\nprint('importing')\ndef build():\n    print('building')\n    return nn.ReLU()\n"
    )
    replace("trace", torch.fx.symbolic_trace(Residual()))
    replace("discover", DISCOVERY)
    assert cli.main(["inspect", f"{path}:build", "--size", "8", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["regions"]) == 2
    assert captured.err == "importing\nbuilding\n"


def test_inspect_prints_regions_totals_and_rejections(traced, replace, capsys) -> None:
    discover = replace("discover", DISCOVERY)
    argv = ["inspect", "m", "--size", "8", "--kinds", "identity,projection", "--ignore", "a*,b"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert traced.args[1].shape == (1, 3, 8, 8)
    assert traced.kwargs == {"front_end": "auto"}
    assert discover.kwargs == {"kinds": ("identity", "projection"), "ignore": ("a*", "b")}
    assert "m: 2 droppable regions (1 projection, 1 identity), 21 parameters in all" in out
    rows = [line.split() for line in out.splitlines()]
    # beside a projection shortcut only the branch goes: 3 * 3 weights and 3 biases
    assert ["branch", "projection", "1x3x8x8", "1", "12"] in rows
    assert ["whole", "identity", "1x3x8x8", "2", "21"] in rows
    assert "stem" in out and "entry and exit differ in shape" in out and "8 channels meet 3" in out


def test_inspect_json_holds_the_same(traced, replace, capsys) -> None:
    replace("discover", DISCOVERY)
    assert cli.main(["inspect", "m", "--input-shape", "2,3,8,8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert traced.args[1].shape == (2, 3, 8, 8)
    assert data["counts"] == {"projection": 1, "identity": 1}
    assert [region["parameters_saved"] for region in data["regions"]] == [12, 21]
    assert data["rejections"][0]["reason"] == Reason.SHAPE.value


def test_inspect_counts_the_parameters_of_exported_graphs(replace, capsys) -> None:
    gm = torch.export.export(Residual(), (torch.zeros(1, 3, 8, 8),)).module()
    convolutions = [
        node.name for node in gm.graph.nodes if "conv" in node.name and node.op == "call_function"
    ]
    body = (*convolutions, "add")
    region = Region("x", "add", "x", body, Kind.IDENTITY, "whole", (), (1, 3, 8, 8), "f32")
    replace("load_model", Residual(), networks)
    replace("trace", gm)
    replace("discover", Discovery((region,), ()))
    assert cli.main(["inspect", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"][0]["parameters_saved"] == 21


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((20, 20, 3), index, dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


class Report:
    def to_json(self) -> str:
        return '{"k": 2}'

    def __str__(self) -> str:
        return "two regions were cut"


def test_compress_hands_everything_on_and_writes_all(traced, replace, photos, tmp_path, capsys) -> None:
    small = torch.fx.symbolic_trace(Residual())
    compress, report = replace("compress", small), replace("report", Report())
    out = tmp_path / "out"
    argv = [
        "compress",
        "m",
        "--data",
        str(photos),
        "--k",
        "2",
        "--out",
        str(out),
        "--size",
        "8",
        "--seed",
        "7",
    ]
    argv += ["--images", "2", "--recipe", "practise", "--tap", "relu_3", "--ignore", "stem", "--no-progress"]
    argv += ["--cache-mib", "64"]
    assert cli.main(argv) == 0
    network, loader = compress.args
    assert isinstance(network, Residual) and traced.calls == []
    assert len(loader.paths) == 2 and next(iter(loader)).shape == (2, 3, 8, 8)
    assert compress.kwargs == {
        "k": 2,
        "target_speedup": None,
        "target_latency_ms": None,
        "min_agreement": None,
        "recipe": "practise",
        "criterion": "recovery",
        "cost": "latency",
        "selection": None,
        "backend": "torch",
        "device": None,
        "kinds": ("identity",),
        "ignore": ("stem",),
        "tap": "relu_3",
        "front_end": "auto",
        "images": 2,
        "labels": None,
        "latency_batch": None,
        "cache_bytes": 64 * 2**20,
        "submodule": None,
        "seed": 7,
        "threads": None,
        "out": str(out),
        "onnx": True,
        "fp16": False,
        "int8": False,
        "progress": False,
    }
    assert report.args == (small,)
    assert list(out.iterdir()) == []  # fxprune.compress writes everything itself
    assert capsys.readouterr().out == "two regions were cut\n"


def test_what_was_typed_is_known_while_it_runs(traced, monkeypatch, replace, photos) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(fxprune, "compress", lambda *_, **__: seen.append(SHELL_COMMAND.get()))
    replace("report", Report())
    assert cli.main(["compress", "m", "--k", "1", "--data", str(photos), "--size", "8", "--tap", "a b"]) == 0
    assert seen == [f"fxprune compress m --k 1 --data {photos} --size 8 --tap 'a b'"]
    assert SHELL_COMMAND.get() is None


def test_compress_json_without_out_writes_nothing(traced, replace, photos, tmp_path, capsys) -> None:
    replace("compress", traced.result)
    replace("report", Report())
    argv = ["compress", "m", "--data", str(photos), "--target-speedup", "1.3", "--size", "8", "--json"]
    assert cli.main([*argv, "--no-progress"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"k": 2}
    assert "skipped 1 image files" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize("command", [["compress", "--k", "1"], ["sweep"]], ids=["compress", "sweep"])
def test_labelled_images_are_prepared_like_the_others(
    command: list[str], traced, replace, photos, tmp_path
) -> None:
    verb = replace(command[0], traced.result if command[0] == "compress" else Report())
    replace("report", Report())
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        # of the same grey as the calibration image of that name
        picture = np.full((20, 20, 3), number, dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "labelled" / name / "0.png")
    (photos / "bad.png").unlink()
    argv = [
        "m",
        "--data",
        str(photos),
        "--labels",
        str(tmp_path / "labelled"),
        "--size",
        "8",
        "--no-progress",
    ]
    assert cli.main([*command, *argv, "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6"]) == 0
    loader = verb.args[1]
    ((pictures, labels),) = verb.kwargs["labels"]
    assert labels.tolist() == [0, 1]
    (calibration,) = loader
    by_name = {path.stem: picture for path, picture in zip(loader.paths, calibration, strict=True)}
    assert torch.equal(pictures, torch.stack([by_name["0"], by_name["1"]]))


def test_labels_without_folders_of_classes_are_wrong_usage(traced, replace, photos, capsys) -> None:
    compress = replace("compress", None)
    argv = ["compress", "m", "--k", "1", "--data", str(photos), "--labels", str(photos), "--size", "8"]
    assert cli.main(argv) == 2
    assert "holds no labelled images" in capsys.readouterr().err and compress.calls == []


@pytest.mark.parametrize(
    "given", [["--submodule", "body,head"], ["--submodule", "body", "--submodule", "head"]]
)
def test_several_submodules_are_named_with_commas_or_one_by_one(
    given: list[str], traced, replace, photos
) -> None:
    compress = replace("compress", Residual())
    replace("report", Report())
    argv = ["compress", "m", "--data", str(photos), "--k", "1", "--size", "8", "--no-progress", *given]
    assert cli.main(argv) == 0
    assert compress.kwargs["submodule"] == ["body", "head"]


def test_a_submodule_is_not_traced_here(traced, replace, photos) -> None:
    compress = replace("compress", Residual())
    replace("report", Report())
    argv = [
        "compress",
        "m",
        "--data",
        str(photos),
        "--k",
        "1",
        "--size",
        "8",
        "--submodule",
        "body",
        "--no-progress",
    ]
    assert cli.main(argv) == 0
    assert traced.calls == []
    assert isinstance(compress.args[0], Residual) and compress.kwargs["submodule"] == ["body"]


def test_only_the_first_process_prints_and_writes(
    traced, replace, photos, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("fxprune.processes.group.is_main", lambda: False)
    compress = replace("compress", traced.result)
    replace("report", Report())
    sweep = replace("sweep", Report())
    rest = ["m", "--data", str(photos), "--size", "8", "--out", str(tmp_path / "out")]
    assert cli.main(["compress", "--k", "1", *rest]) == 0
    assert cli.main(["sweep", *rest]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert compress.kwargs["progress"] is False and sweep.kwargs["progress"] is False


@pytest.mark.parametrize("main", [False, True])
def test_only_the_first_process_warns(
    main: bool, traced, monkeypatch, photos, caplog: pytest.LogCaptureFixture
) -> None:
    def compress(*args: object, **kwargs: object) -> object:
        logging.getLogger("fxprune.recovery").warning("mimicking was undone")
        logging.getLogger("fxprune.recovery").error("a disk broke")
        return traced.result

    monkeypatch.setattr("fxprune.processes.group.is_main", lambda: main)
    monkeypatch.setattr(fxprune, "compress", compress)
    monkeypatch.setattr(fxprune, "report", lambda gm: Report())
    assert cli.main(["compress", "m", "--k", "1", "--data", str(photos), "--size", "8"]) == 0
    assert ("mimicking was undone" in caplog.text) == main
    assert "a disk broke" in caplog.text
    assert logging.getLogger("fxprune").level == logging.NOTSET


def test_named_regions_are_a_goal_of_their_own(traced, replace, photos, capsys) -> None:
    compress, _ = replace("compress", torch.fx.symbolic_trace(Residual())), replace("report", Report())
    argv = [
        "compress",
        "m",
        "--data",
        str(photos),
        "--size",
        "8",
        "--no-progress",
        "--regions",
        "body.1,body.3",
    ]
    assert cli.main(argv) == 0
    assert compress.kwargs["regions"] == ["body.1", "body.3"] and compress.kwargs["k"] is None
    assert cli.main([*argv, "--k", "2"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_plan_is_a_goal_too(traced, replace, photos, capsys) -> None:
    compress = replace("compress", traced.result)
    replace("report", Report())
    argv = ["compress", "m", "--data", str(photos), "--size", "8", "--no-progress", "--plan", "plan.json"]
    assert cli.main(argv) == 0
    assert compress.kwargs["plan"] == "plan.json" and "regions" not in compress.kwargs
    assert cli.main([*argv, "--k", "1"]) == 2


def test_sweep_hands_everything_on(traced, replace, photos, tmp_path, capsys) -> None:
    sweep = replace("sweep", Report())
    out = tmp_path / "out"
    argv = ["sweep", "m", "--data", str(photos), "--size", "8", "--out", str(out), "--images", "2"]
    argv += ["--selection", "independent", "--kinds", "identity,sequential", "--threads", "1"]
    assert cli.main([*argv, "--no-progress"]) == 0
    model, loader = sweep.args
    assert isinstance(model, Residual) and len(loader.paths) == 2
    assert sweep.kwargs == {
        "recipe": "fast",
        "criterion": "recovery",
        "cost": "latency",
        "submodule": None,
        "selection": "independent",
        "backend": "torch",
        "device": None,
        "kinds": ("identity", "sequential"),
        "tap": None,
        "front_end": "auto",
        "images": 2,
        "labels": None,
        "latency_batch": None,
        "cache_bytes": 2 * 2**30,
        "ignore": (),
        "seed": 0,
        "threads": 1,
        "out": str(out),
        "progress": False,
    }
    assert capsys.readouterr().out == "two regions were cut\n"
    assert cli.main([*argv, "--json", "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out) == {"k": 2}


def test_settings_of_sweep_and_compress_are_their_keywords() -> None:
    parser = cli._parser()
    for command, function in (("compress", fxprune.compress), ("sweep", fxprune.sweep)):
        args = parser.parse_args(
            [command, "m", "--data", "d", *(["--k", "1"] if command == "compress" else [])]
        )
        given = cli._asked_for(args, True).keys()
        assert given <= inspect.signature(function).parameters.keys()


def test_an_unwritable_folder_is_found_before_anything_else(
    traced, replace, photos, tmp_path, capsys
) -> None:
    (tmp_path / "file").write_text("")
    compress = replace("compress", None)
    argv = ["compress", "m", "--data", str(photos), "--k", "1", "--out", str(tmp_path / "file")]
    assert cli.main(argv) == 1
    assert compress.calls == [] and traced.calls == []
    assert capsys.readouterr().err.startswith("fxprune: error: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoRegionError("nothing\nto drop"), 1),
        (fxprune.errors.OptionError("k is 9"), 2),
        (SourceError("there is no such file"), 2),
        (CalibrationError("an image is not finite"), 2),
        (TargetError("1.5 is out of reach"), 3),
        (AgreementError("min_agreement is 0.9"), 4),
        (ExportError("no ONNX form"), 1),
        (ParityError("onnxruntime disagrees", max_abs_diff=1.0, tolerance=0.1), 5),
        (OSError(28, "No space left on device"), 1),
        (MemoryError(), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_and_a_code(traced, replace, capsys, error: BaseException, code: int) -> None:
    replace("discover", error)
    assert cli.main(["inspect", "m"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_memory_that_ran_out_brings_advice(traced, replace, capsys) -> None:
    replace("discover", MemoryError())
    assert cli.main(["inspect", "m"]) == 6
    err = capsys.readouterr().err
    assert all(option in err for option in ("--cache-mib", "--images", "--latency-batch", "scores are kept"))


def test_verbose_shows_where_an_error_comes_from(traced, replace, caplog) -> None:
    replace("discover", NoRegionError("nothing to drop"))
    assert cli.main(["inspect", "m", "--verbose"]) == 1
    assert caplog.records[-1].exc_info is not None


QUIET = """
import logging, sys, warnings
import fxprune
from fxprune.shell import cli
from fxprune.sources import networks
from tests.test_cli import DISCOVERY, Residual

def discover(gm, **rest):
    logging.getLogger("fxprune").warning("a log")
    warnings.warn("a warning")
    if "fail" in sys.argv:
        raise fxprune.FxpruneError("an error")
    return DISCOVERY

networks.load_model = lambda *_: Residual()
fxprune.discover = discover
sys.exit(cli.main(["inspect", "m", "--size", "8", "--json", *sys.argv[1:2]]))
"""


@pytest.mark.parametrize(("flag", "outcome"), [("--quiet", ""), ("--quiet", "fail"), ("--json", "")])
def test_standard_output_holds_the_result_and_a_quiet_command_says_nothing_else(
    flag: str, outcome: str
) -> None:
    command = [sys.executable, "-c", QUIET, flag, outcome]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    said = [words for words in ("a log", "a warning", "an error") if words in done.stderr]
    if outcome:
        assert (done.returncode, done.stdout, said) == (1, "", ["an error"])
        assert done.stderr == "fxprune: error: an error\n"
    else:
        assert len(json.loads(done.stdout)["regions"]) == 2
        assert said == ([] if flag == "--quiet" else ["a log", "a warning"])
        assert done.stderr or flag != "--json"


def test_quiet_draws_no_bars_and_skips_in_silence(traced, replace, photos, capsys) -> None:
    compress, _ = replace("compress", traced.result), replace("report", Report())
    assert cli.main(["compress", "m", "--k", "1", "--data", str(photos), "--size", "8", "--quiet"]) == 0
    assert compress.kwargs["progress"] is False
    assert capsys.readouterr().err == ""


def test_unknown_networks_are_reported(capsys) -> None:
    assert cli.main(["inspect", "torchvision:resnet43"]) == 2
    assert "resnet34" in capsys.readouterr().err


def timing(median: float) -> Latency:
    times = {"median_s": median, "p90_s": median * 1.05, "p95_s": median * 1.1, "p99_s": median * 1.2}
    return Latency("onnxruntime-cpu", "Some CPU", (4, 3, 8, 8), 2, iqr_s=median / 50, runs=30, **times)


def write_onnx(path: Path, *shape: object) -> str:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    node = helper.make_node("Identity", ["x"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [output])), path)
    return str(path)


def compared(ratio: float, low: float, high: float) -> LatencyComparison:
    medians = (ratio - 0.05, ratio, ratio + 0.05)
    return LatencyComparison(
        timing(0.004), timing(0.004 * ratio), ratio, Interval(low, high), by_process=medians
    )


@pytest.fixture
def timed(replace) -> Recorder:
    results = (compared(0.75, 0.74, 0.76), compared(1.5, 1.4, 1.6), compared(0.99, 0.9, 1.01))
    told = {"provider": "CPUExecutionProvider", "nodes": {"CPUExecutionProvider": {"Conv": 2}}}
    samples = Samples("onnxruntime-cpu", "Some CPU", 2, (1,) * 4, ((0.004,),) * 4, (told,) * 4)
    return replace("compare", fresh.Measured(results, (samples,) * 3), fresh)


def test_measure_prints_percentiles_throughput_and_a_verdict(timed, tmp_path, capsys) -> None:
    files = [write_onnx(tmp_path / f"{name}.onnx", "batch", 3, 8, 8) for name in "abcd"]
    assert cli.main(["measure", *files, "--batch", "4", "--rounds", "9", "--threads", "2"]) == 0
    assert timed.args[:2] == (files[0], files[1:]) and timed.args[2][0].shape == (4, 3, 8, 8)
    assert (timed.kwargs["backend"], timed.kwargs["processes"]) == ("onnxruntime-cpu", 3)
    settings = timed.kwargs["settings"]
    assert (settings.min_rounds, settings.max_rounds, settings.threads) == (9, 9, 2)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[2].split()[:7] == [files[0], "4", "4.2", "4.4", "4.8", "1000", "30"]
    for line, words in zip(
        lines[3:6],
        (
            "0.7500 (95% 0.7400 to 0.7600), faster",
            "1.5000 (95% 1.4000 to 1.6000), slower",
            "0.9900 (95% 0.9000 to 1.0100), no difference seen",
        ),
        strict=True,
    ):
        assert line.rstrip().endswith(words)
    assert "onnxruntime-cpu on Some CPU, 2 threads, batch shape 4x3x8x8; 3 fresh processes" in out
    assert cli.main(["measure", *files, "--json"]) == 0
    assert timed.kwargs["settings"].threads == default_threads()
    data = json.loads(capsys.readouterr().out)
    assert [one["file"] for one in (data["before"], *data["after"])] == files
    assert data["processes"] == 3 and data["after"][0]["ratio_by_process"] == [0.7, 0.75, 0.8]
    assert data["after"][0]["interval"] == {"low": 0.74, "high": 0.76, "level": 0.95}
    assert data["options"]["provider"] == "CPUExecutionProvider" and data["options"]["warmup"] == 5


def test_measure_tells_backend_by_backend_and_names_those_that_are_not_to_be_had(
    timed, tmp_path, capsys, monkeypatch
) -> None:
    files = [write_onnx(tmp_path / f"{name}.onnx", 4, 3, 8, 8) for name in "abcd"]
    elsewhere = {"CUDAExecutionProvider": {"Conv": 2}, "CPUExecutionProvider": {"Shape": 1}}
    told = {
        "provider": "CUDAExecutionProvider",
        "nodes": elsewhere,
        "provider_options": {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1", "device_id": "0"},
    }
    clocks = {"clocks.sm": 1980.0, "slowed_by": []}
    card = {"before": clocks, "after": {"clocks.sm": 1755.0, "slowed_by": ["sw_power_cap"]}}
    comparisons, (samples, *_) = timed.result
    answers = {
        "torch-compile": MeasurementError("no compiler"),
        "onnxruntime-cpu": timed.result,
        "onnxruntime-cuda-heuristic": fresh.Measured(
            comparisons, (dataclasses.replace(samples, conditions=(told,) * 4, card=card),)
        ),
        "openvino": DeviceError("not installed"),
    }

    def compare(*networks: Any, backend: str, device: str | None, **settings: Any) -> fresh.Measured:
        assert device == ("cpu" if backend == "torch-compile" else None)
        if isinstance(answers[backend], Exception):
            raise answers[backend]
        return answers[backend]

    monkeypatch.setattr(fresh, "compare", compare)
    asked = ["measure", *files, "--device", "cpu", "--backend", ",".join(answers)]
    assert cli.main([*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [len(one["after"]) for one in (data, *data["others"])] == [3, 3]
    assert data["not_measured"] == [
        {"backend": "torch-compile", "reason": "no compiler"},
        {"backend": "openvino", "reason": "not installed"},
    ]
    assert data["gpu"] == [] and data["others"][0]["gpu"] == [card]
    assert data["others"][0]["options"]["provider_options"]["use_tf32"] == "1"
    assert cli.main(asked) == 0
    out = capsys.readouterr().out
    assert out.endswith(
        "\n\ntorch-compile: not measured: no compiler\n\nopenvino: not measured: not installed\n"
    )
    assert "cudnn_conv_algo_search HEURISTIC, use_tf32 1\n" in out
    assert f"{files[2]}: 1 of 3 nodes to CPUExecutionProvider (Shape)\n" in out
    assert "clocks.sm 1980.0 to 1755.0; slowed by sw_power_cap" in out
    assert cli.main(["measure", *files, "--device", "cpu", "--backend", "openvino"]) == 2
    assert "device='cpu' is of torch's backends; openvino" in capsys.readouterr().err
    assert cli.main(["measure", *files, "--device", "cpu", "--backend", "openvino,torch-compile"]) == 1
    assert "not installed" in capsys.readouterr().err


def test_measure_refuses_networks_with_different_inputs(timed, tmp_path, capsys) -> None:
    shapes = {"a": (1, 3, 8, 8), "b": (1, 3, 8, 8), "c": (1, 3, 9, 9)}
    files = [write_onnx(tmp_path / f"{name}.onnx", *shape) for name, shape in shapes.items()]
    assert cli.main(["measure", *files]) == 2
    assert timed.calls == []
    assert f"{files[0]} and {files[2]} take different inputs" in capsys.readouterr().err


def test_demo_prints_its_table_or_the_figures(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    run = Recorder(None)
    monkeypatch.setattr("fxprune.shell.demo.run", run)
    for flags, expected in ([], "the table\n"), (["--json"], '{\n  "accuracy": 0.9\n}\n'):
        run.result = {"table": "the table", "accuracy": 0.9}
        assert cli.main(["demo", "--out", str(tmp_path), "--seed", "3", "--threads", "1", *flags]) == 0
        assert capsys.readouterr().out == expected
    assert run.args == (tmp_path,)
    assert run.kwargs == {"seed": 3, "threads": 1, "progress": True}


def test_the_shells_defaults_are_the_packages() -> None:
    assert arguments._IMAGENET_MEAN == images.IMAGENET_MEAN
    assert arguments._IMAGENET_STD == images.IMAGENET_STD
    assert set(arguments._KINDS) == {kind.value for kind in Kind}


def test_tables_align_text_left_and_numbers_right() -> None:
    assert tables.render(("name", "ms"), [("a", 1.23456), ("long", None), ("b", 100)]) == (
        "name     ms\n----  -----\na     1.235\nlong      -\nb       100"
    )
    assert tables.render(("a", "b"), []) == "a  b\n-  -"
    with pytest.raises(ValueError, match="3 values for 2"):
        tables.render(("a", "b"), [(1, 2, 3)])
