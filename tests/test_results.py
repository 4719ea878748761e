"""The files of one run: all of one run or none, whatever ends it; and who may work in a folder."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from filelock import FileLock
from torch import Tensor, fx, nn

import fxprune
from fxprune.artifacts import results
from fxprune.artifacts.results import Results
from fxprune.errors import (
    AgreementError,
    ArtifactError,
    ExportError,
    OptionError,
    OutOfMemoryError,
    ParityError,
)
from fxprune.export import artifact
from fxprune.pipeline import closing, exports, stages
from fxprune.precision import int8
from fxprune.runtimes import onnxruntime
from tests.doubles import brief, count_latency, forbid_work
from tests.tiny import images, tiny

ROOT = Path(__file__).resolve().parent.parent
NETWORK_FILES = {"model.pt2", "model.safetensors", "plan.json"}
FILES = {*NETWORK_FILES, "report.html"}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


def compress(folder: Path, k: int = 1, **settings: Any) -> nn.Module:
    settings = {"recipe": brief(), "progress": False, "latency_batch": 2, "out": folder, **settings}
    return fxprune.compress(settings.pop("model", None) or tiny(), images(), k, **settings)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def report_of(folder: Path) -> dict[str, Any]:
    """The report of a folder, which must tell the truth about every file beside it."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert files(folder) == {"report.json", "recipe.json", *report["files"]}
    for name, digest in report["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    return report


def test_a_folder_holds_the_network_and_a_report_about_it(tmp_path: Path) -> None:
    small = compress(tmp_path, 2)
    report = report_of(tmp_path)
    assert report["files"].keys() == FILES
    assert report == json.loads(fxprune.report(small).to_json())
    again = artifact.load(tmp_path)
    assert torch.allclose(again(images(3)), small(images(3)), atol=1e-6)


def test_onnx_files_belong_to_the_results_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_text("of an earlier run")
    small = compress(tmp_path, 2, onnx=True)
    assert report_of(tmp_path)["files"].keys() == FILES | {"model.onnx", "original.onnx"}
    model, original = (onnx.load(tmp_path / name) for name in ("model.onnx", "original.onnx"))
    kinds = [Counter(node.op_type for node in one.graph.node) for one in (original, model)]
    assert kinds[0] - kinds[1] == Counter(Conv=4, Relu=2, Add=2) and not kinds[1] - kinds[0]
    for one, cuts in ((model, fxprune.report(small).plan.chosen), (original, ())):
        assert [entry.name for entry in (*one.graph.input, *one.graph.output)] == ["input", "output"]
        assert {e.key: e.value for e in one.metadata_props}["fxprune.cuts"] == json.dumps(cuts)


def test_onnx_files_are_compared_on_the_calibration_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def run(session: object, inputs: tuple[Tensor, ...]) -> list[Any]:
        seen.append(inputs[0])
        return genuine(session, inputs)

    genuine = onnxruntime.run
    monkeypatch.setattr(onnxruntime, "run", run)
    compress(tmp_path, 2, onnx=True)
    assert len(seen) == 2 * 2 * 3  # two files, unoptimised and optimised, at three batch sizes
    assert all(torch.equal(batch, images()[: len(batch)]) for batch in seen)
    told = [note for note in report_of(tmp_path)["notes"] if "onnxruntime optimised" in note]
    assert [note.split()[0] for note in told] == ["model.onnx", "original.onnx"]


def test_files_in_fewer_bits_are_told_in_the_report(tmp_path: Path) -> None:
    small = compress(tmp_path, 2, onnx=True, fp16=True, int8=True)
    made = fxprune.report(small).fewer_bits
    assert made.keys() == {"model.fp16.onnx", "model.int8.onnx"}
    assert report_of(tmp_path)["files"].keys() == FILES | made.keys() | {"model.onnx", "original.onnx"}
    half, eight = made["model.fp16.onnx"], made["model.int8.onnx"]
    assert half.latency is None and half.export.int8 is None and eight.latency is not None
    single, rounded = ((tmp_path / name).stat().st_size for name in ("model.onnx", "model.int8.onnx"))
    assert eight.latency.ratio == rounded / single  # see count_latency
    assert eight.export.int8 is not None and eight.export.int8.images + eight.export.int8.held_back == 12
    assert "OpenVINO" in eight.line
    page = html.unescape((tmp_path / "report.html").read_text())
    for one in (half, eight):
        assert one.line in str(fxprune.report(small)) and one.line in page


def test_a_file_in_eight_bits_that_agrees_too_little_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_compared", lambda *_: (0.5, 0.3, 1.0))
    with pytest.raises(
        AgreementError, match=r"min_agreement is 0.75, but in eight bits.*holds what could be"
    ):
        compress(tmp_path, 1, onnx=True, int8=True, min_agreement=0.75, recipe=brief(mimic=0))
    report = report_of(tmp_path)
    assert report["files"].keys() == FILES | {"model.onnx", "original.onnx"} and not report["fewer_bits"]
    assert "in eight bits" in report["notes"][-1]


def test_files_in_fewer_bits_need_a_folder() -> None:
    with pytest.raises(OptionError, match=r"beside model\.onnx: give onnx=True and out="):
        fxprune.compress(tiny(), images(), 1, onnx=True, int8=True)


def test_results_of_a_part_hold_the_part(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if float(x.sum()) > 1e9 else self.body(x) + 1

    whole = compress(tmp_path, model=Whole().eval(), submodule="body", onnx=True)
    assert isinstance(whole, Whole)
    assert torch.allclose(artifact.load(tmp_path)(images(2)), whole.body(images(2)), atol=1e-6)
    assert report_of(tmp_path)["files"].keys() == FILES | {"model.onnx", "original.onnx"}


def test_a_run_that_misses_its_agreement_leaves_its_own_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tmp_path, 1, onnx=True)
    monkeypatch.setattr("fxprune.recovery.fidelity.agreement", lambda *_: 0.5)
    with pytest.raises(AgreementError, match=r"min_agreement is 1.0, but .* holds that network"):
        compress(tmp_path, 3, min_agreement=1.0)
    report = report_of(tmp_path)
    assert len(report["plan"]["chosen"]) == 3 and report["files"].keys() == FILES
    assert count(artifact.load(tmp_path)) == report["parameters"][1]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("where", ["measurement", "report"])
def test_a_run_that_fails_after_mimicking_leaves_its_network(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tmp_path, 1, onnx=True)

    def broken(*_: Any, **__: Any) -> Any:
        raise ArtifactError("the disk is full")

    if where == "measurement":
        monkeypatch.setattr(closing, "compare_networks", broken)
    else:
        monkeypatch.setattr(results, "write_text_atomic", broken)
    with pytest.raises(ArtifactError, match="disk is full"):
        compress(tmp_path, 3)
    # no report.json of either run: the folder is not finished
    assert files(tmp_path) == (NETWORK_FILES if where == "measurement" else FILES)
    with pytest.raises(AssertionError):
        assert count(artifact.load(tmp_path)) == count(tiny())


def test_a_run_that_fails_before_leaves_the_run_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tmp_path, 1)
    before = report_of(tmp_path)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "recover", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path, 3)
    assert report_of(tmp_path) == before


def test_a_file_that_cannot_be_written_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ExportError("there is no ONNX form")

    monkeypatch.setattr(exports, "export_onnx", refused)
    with pytest.raises(ExportError, match=r"no ONNX form.*holds what could be written"):
        compress(tmp_path, 1, onnx=True, model=tiny(5))
    report = report_of(tmp_path)
    assert report["files"].keys() == FILES
    assert report["notes"] == ["there is no ONNX form"] * 2
    assert "there is no ONNX form" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_said_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ArtifactError("no room for a page")

    monkeypatch.setattr(closing, "write_text_atomic", refused)
    compress(tmp_path, 1, model=tiny(5))
    report = report_of(tmp_path)
    assert report["files"].keys() == NETWORK_FILES
    assert report["notes"] == ["no room for a page"]


def test_a_file_that_would_be_wrong_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: object, path: Path, *_: Any, **__: Any) -> None:
        if path.name == "original.onnx":
            raise ParityError("it disagrees", max_abs_diff=0.5, tolerance=0.1)
        raise ExportError("there is no ONNX form")

    monkeypatch.setattr(exports, "export_onnx", wrong)
    with pytest.raises(
        ParityError, match=r"no ONNX form; it disagrees.*holds what could be written"
    ) as caught:
        compress(tmp_path, 1, onnx=True, model=tiny(5))
    assert (caught.value.max_abs_diff, caught.value.tolerance) == (0.5, 0.1)


def test_an_old_file_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ArtifactError, match=r"report.json is where a result goes and cannot be removed"):
        Results(tmp_path, "report.json", []).begin()


@pytest.mark.parametrize("verb", [fxprune.compress, fxprune.sweep])
@pytest.mark.parametrize("name", ["report.json", "model.onnx", "recipe.json", "sweep.json", "sweep.svg"])
@pytest.mark.parametrize("why", ["Is a directory", "Operation not permitted"])
def test_what_is_in_the_way_of_results_is_said_before_any_work(
    verb: Any, name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    if why == "Is a directory":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
        fixed(tmp_path / name, monkeypatch)
    goal = {"k": 1} if verb is fxprune.compress else {}
    with pytest.raises(ArtifactError, match=rf"{name} is where a result goes and cannot be removed: {why}"):
        verb(tiny(), images(), recipe=brief(), progress=False, out=tmp_path, **goal)
    assert {path.name for path in tmp_path.iterdir()} == {name, "scores"}


def fixed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a file be as one that belongs to somebody else, in a folder where only owners remove."""
    rename = os.rename

    def refused(source: Path, target: Path) -> None:
        if source == file:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)


def test_old_results_stay_where_they_are_until_there_are_new_ones(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "model.pt2").symlink_to(tmp_path / "scores")
    results.require_replaceable(tmp_path, ("report.json", "model.pt2", "model.onnx"), tmp_path / "scores")
    assert (tmp_path / "report.json").read_text() == "old" and (tmp_path / "model.pt2").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "model.pt2", "scores"}


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    compress(tmp_path)
    with (
        FileLock(tmp_path / "scores" / ".lock"),
        pytest.raises(ArtifactError, match=r"is in use: another run"),
    ):
        compress(tmp_path)
    compress(tmp_path)


def test_a_dead_run_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from filelock import FileLock; from pathlib import Path\n"
        "folder = Path(sys.argv[1]) / 'scores'; folder.mkdir(parents=True)\n"
        "FileLock(folder / '.lock').acquire(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    compress(tmp_path)


@pytest.mark.parametrize("where", ["hook", "function"])
def test_what_a_leaf_computes_is_a_part_of_the_question(where: str, tmp_path: Path) -> None:
    """Neither the graph's text nor a weight tells that it changed (a forward hook, a wrapped function)."""

    def losses(factor: float, out: Path | None) -> list[float]:
        model = tiny()
        if where == "hook":
            model.body[0].conv2.register_forward_hook(lambda module, given, result: result * factor)
        else:
            _FACTOR[0] = factor
            model = Scaled(model)
        small = compress(out, model=model)  # type: ignore[arg-type]
        return [score.recovery_loss for score in fxprune.report(small).plan.scores]

    first, fresh = losses(1.0, tmp_path), losses(3.0, None)
    assert first != fresh
    assert losses(3.0, tmp_path) == fresh
    assert losses(1.0, tmp_path) == first


_FACTOR = [1.0]


@fx.wrap
def scaled(x: Tensor) -> Tensor:
    return x * _FACTOR[0]


class Scaled(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        n = self.network
        return n.head(n.pool(n.tail(scaled(n.body(n.stem(x))))).flatten(1))


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    model = tiny()
    model.stem.requires_grad_(False)
    small = fxprune.compress(model, images(), 1, recipe=brief(), progress=False)
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "stem.bias"}


def test_a_target_that_is_met_already_cuts_nothing() -> None:
    with pytest.raises(
        OptionError, match=r"takes .* ms already, less than target_latency_ms, 1000.0 .*nothing to cut"
    ):
        fxprune.compress(tiny(), images(), target_latency_ms=1000.0, recipe=brief(), progress=False)


def test_an_exported_program_has_no_submodule() -> None:
    program = torch.export.export(tiny(), (images(2),))
    with pytest.raises(OptionError, match="an exported program has none"):
        fxprune.compress(program, images(), 1, submodule="body")  # type: ignore[call-overload]


def test_memory_that_ran_out_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 EiB")

    monkeypatch.setattr(stages, "recover", greedy)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out .*4 EiB.*smaller cache_bytes") as caught:
        fxprune.compress(tiny(), images(), 1, recipe=brief(), progress=False)
    assert isinstance(caught.value, MemoryError)


def test_the_library_joins_no_process_group() -> None:
    """Only the shell's program does: in a user's own program the variables mean something else."""
    code = (
        "import pytest, torch, fxprune; from tests.tiny import tiny, images\n"
        "from tests.doubles import brief, count_latency; count_latency(pytest.MonkeyPatch())\n"
        "fxprune.compress(tiny(), images(), 1, recipe=brief(), progress=False)\n"
        "assert not torch.distributed.is_initialized()"
    )
    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_plot_that_cannot_be_written_is_an_error_and_costs_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise ArtifactError("the disk is full")

    monkeypatch.setattr(closing, "write_text_atomic", full)
    with pytest.raises(ArtifactError, match="disk is full"):
        fxprune.sweep(tiny(), images(), recipe=brief(), progress=False, latency_batch=2, out=tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["files"] == {}
