"""Keeping and reading back: equality, whole files only, and refusal of everything that would run code."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fxprune import files
from fxprune.errors import ArtifactError
from fxprune.export import artifact


class Tied(nn.Module):
    """A residual network that uses one weight twice and keeps a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x))) + x
        return self.head(self.second(x).mean((2, 3)))


class Trap:
    """Runs a command when unpickled; the file it would create must never appear."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Tied().eval()
    folder = tmp_path_factory.mktemp("kept")
    artifact.save(symbolic_trace(model), folder, example_inputs=[torch.randn(1, 3, 6, 6)])
    return model, folder


MISSING = b"left out"


def tampered(source: Path, target: Path, edits: dict[str, Callable[[bytes], bytes] | bytes]) -> Path:
    """Copy an archive with some entries changed, added or `MISSING`, by the end of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        names = [name.removeprefix(f"{root}/") for name in old.namelist()]
        for name in [*names, *(set(edits) - set(names))]:
            data = old.read(f"{root}/{name}") if name in names else b""
            edit = edits.get(name)
            if edit is MISSING:
                continue
            new.writestr(f"{root}/{name}", edit(data) if callable(edit) else data if edit is None else edit)
    return target


def in_graph(old: str, new: str) -> dict[str, Callable[[bytes], bytes] | bytes]:
    def edit(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode())

    return {"models/model.json": edit}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_kept_network_is_the_same_function_at_any_batch_size(
    kept: tuple[nn.Module, Path], batch: int
) -> None:
    model, folder = kept
    x = torch.randn(batch, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(artifact.load(folder)(x), model(x), rtol=0, atol=1e-6)


def test_weights_alone_are_complete_although_shared(kept: tuple[nn.Module, Path]) -> None:
    model, folder = kept
    state = artifact.load_state(folder / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert load_file(folder / "model.safetensors").keys() == state.keys()


def test_saving_changes_neither_the_network_nor_its_mode(tmp_path: Path) -> None:
    gm = symbolic_trace(Tied()).train()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    artifact.save(gm, tmp_path / "new", example_inputs=[torch.randn(4, 3, 6, 6)])
    assert gm.training
    assert all(torch.equal(before[name], value) for name, value in gm.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["model.pt2", "model.safetensors"]


def test_calibration_images_do_not_travel_with_the_network(kept: tuple[nn.Module, Path]) -> None:
    with zipfile.ZipFile(kept[1] / "model.pt2") as archive:
        samples = [archive.read(name) for name in archive.namelist() if "sample_inputs" in name]
    assert samples == [b""]


def test_a_network_of_torch_export_round_trips(kept: tuple[nn.Module, Path], tmp_path: Path) -> None:
    again = artifact.load(kept[1])
    artifact.save(again, tmp_path, example_inputs=[torch.randn(2, 3, 6, 6)])
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(artifact.load(tmp_path)(x), again(x))


def test_a_loaded_network_takes_either_mode_and_computes_the_same(kept: tuple[nn.Module, Path]) -> None:
    """`torch.export` hangs methods that raise over both."""
    network = artifact.load(kept[1])
    assert not any(module.training for module in network.modules())
    x = torch.randn(3, 3, 6, 6)
    assert torch.equal(network.train()(x), network.eval()(x))
    assert not network.training


def test_an_archive_with_sample_inputs_and_guards_is_accepted(tmp_path: Path) -> None:
    class Guarded(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = x * 2 if x.shape[2] > 4 else x
            return x.reshape(x.shape[0] * 2, -1) + y[: x.shape[0] // 2].sum()

    auto = torch.export.Dim.AUTO
    inputs = (torch.randn(4, 4, 8, 8), torch.randn(4, 3))
    program = torch.export.export(Guarded(), inputs, dynamic_shapes=({0: auto, 2: auto}, {0: auto}))
    torch.export.save(program, tmp_path / "guarded.pt2")
    torch.testing.assert_close(artifact.load(tmp_path / "guarded.pt2")(*inputs), Guarded()(*inputs))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Symbol('s", "__import__('os').mkdir('s", "arithmetic"),
        ("torch.ops.aten.linear.default", "torch.hub.load", "plain name"),
        ("torch.ops.aten.linear.default", "torch.ops.load_library", "plain name"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.linear.__class__", "plain name"),
        ("torch.ops.aten.linear.default", "_operator.methodcaller", "methodcaller"),
        ('"guards_code": []', '"guards_code": ["print(1)"]', "arithmetic"),
        ('"guards_code": []', '"guards_code": ["L.__class__ == 1"]', "arithmetic"),
        ('"name": "linear"', '"name": "linear = print()"', "plain name"),
        ('"parameter_name": "head.bias"', '"parameter_name": "head.b\\");print(\\""', "plain name"),
        ('\\"context\\": \\"null\\"', '\\"context\\": \\"{\\\\\\"__enum__\\\\\\": 1}\\"', "import"),
        ('\\"context\\": \\"null\\"', '\\"context\\": {\\"default_factory_module\\": \\"this\\"}', "import"),
    ],
)
def test_graphs_that_could_run_code_are_refused(
    kept: tuple[nn.Module, Path], tmp_path: Path, old: str, new: str, words: str
) -> None:
    bad = tampered(kept[1] / "model.pt2", tmp_path / "bad.pt2", in_graph(old, new))
    with pytest.raises(ArtifactError, match=words):
        artifact.load(bad)


@pytest.mark.parametrize(
    "entry",
    [
        "data/sample_inputs/model.pt",
        "data/weights/model.pt",
        "data/constants/opaque_obj_0",
        "data/constants/custom_obj_0",
        "data/aotinductor/model/library.so",
    ],
)
def test_pickles_and_libraries_in_an_archive_are_refused(
    kept: tuple[nn.Module, Path], tmp_path: Path, entry: str
) -> None:
    sprung = tmp_path / "sprung"
    bad = tampered(kept[1] / "model.pt2", tmp_path / "bad.pt2", {entry: pickle.dumps(Trap(sprung))})
    with pytest.raises(ArtifactError, match="could run code"):
        artifact.load(bad)
    assert not sprung.exists()


def test_a_weight_marked_as_pickled_is_refused(kept: tuple[nn.Module, Path], tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"

    def mark(data: bytes) -> bytes:
        table = json.loads(data)
        entry = next(iter(table["config"].values()))
        entry.update(use_pickle=True, path_name="weight_0")
        return json.dumps(table).encode()

    edits = {
        "data/weights/model_weights_config.json": mark,
        "data/weights/weight_0": pickle.dumps(Trap(sprung)),
    }
    with pytest.raises(ArtifactError, match="pickled tensor"):
        artifact.load(tampered(kept[1] / "model.pt2", tmp_path / "bad.pt2", edits))
    assert not sprung.exists()


def test_an_archive_of_the_old_format_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_state_dict.pt", pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ArtifactError, match=r"torch\.export\.save"):
        artifact.load(tmp_path / "old.pt2")
    assert not (tmp_path / "sprung").exists()


def test_missing_and_damaged_archives_are_named(kept: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        artifact.load(tmp_path / "nowhere.pt2")
    whole = (kept[1] / "model.pt2").read_bytes()
    (tmp_path / "half.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="not a readable"):
        artifact.load(tmp_path / "half.pt2")


def test_one_flipped_bit_is_found(kept: tuple[nn.Module, Path], tmp_path: Path) -> None:
    for name in ("model.pt2", "model.safetensors"):
        data = bytearray((kept[1] / name).read_bytes())
        weight = kept[0].get_parameter("first.weight").detach().numpy().tobytes()
        data[data.find(weight) + len(weight) // 2 + 3] ^= 0x40
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"entry 'data/weights/weight_\d+' is damaged.*write it again"):
        artifact.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"is damaged.*checksum"):
        artifact.load_state(tmp_path / "model.safetensors")


def test_weights_of_other_programs_carry_no_checksum_and_are_read(tmp_path: Path) -> None:
    state = {"x": torch.arange(3.0)}
    for metadata in (None, {"format": "pt"}):
        save_file(state, tmp_path / "x.safetensors", metadata)
        assert torch.equal(artifact.load_state(tmp_path / "x.safetensors")["x"], state["x"])


def bombed(data: bytes) -> bytes:
    """The archive with one more entry, of a size that its own file hides."""
    buffer = io.BytesIO(data)
    root = zipfile.ZipFile(buffer).namelist()[0].split("/")[0]
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{root}/extra/blanks", bytes(10 * len(data)))
    return buffer.getvalue()


def test_zip_bombs_are_refused_before_they_are_unpacked(
    kept: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    torch.save(Tied().state_dict(), buffer)
    (tmp_path / "x.pt").write_bytes(bombed(buffer.getvalue()))
    (tmp_path / "x.pt2").write_bytes(bombed((kept[1] / "model.pt2").read_bytes()))
    tampered(kept[1] / "model.pt2", tmp_path / "y.pt2", {"data/weights/model.pt": bombed(buffer.getvalue())})
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "PyTorchFileReader", None)  # nothing may be read yet
        with pytest.raises(ArtifactError, match="zip bomb"):
            artifact.load(tmp_path / "x.pt2")
        with pytest.raises(ArtifactError, match="zip bomb"):
            artifact.load_state(tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"pickle 'data/weights/model.pt' is unsafe \(a zip bomb"):
        artifact.load(tmp_path / "y.pt2")


_GRAPH, _TABLE = "models/model.json", "data/weights/model_weights_config.json"


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        (_GRAPH, b"{not json"),
        (_GRAPH, b"\xff\xfe\x00"),
        (_GRAPH, b"[" * 200_000),
        (_GRAPH, b"[]"),
        (_GRAPH, b'{"in_spec": "nope"}'),
        (_TABLE, b"nope"),
        (_TABLE, b"{}"),
        (_TABLE, b'{"config": [1]}'),
        (_TABLE, b'{"config": {"a": {"use_pickle": false}}}'),
        (_TABLE, b'{"config": {"a": {"use_pickle": true, "path_name": "weight_99"}}}'),
        (_TABLE, b'{"config": {"a": {"use_pickle": false, "path_name": 7}}}'),
        ("data/constants/model_constants_config.json", b"[]"),
    ],
)
def test_malformed_archives_are_named(
    kept: tuple[nn.Module, Path], tmp_path: Path, entry: str, content: bytes
) -> None:
    bad = tampered(kept[1] / "model.pt2", tmp_path / "bad.pt2", {entry: content})
    with pytest.raises(ArtifactError, match=r"bad\.pt2"):
        artifact.load(bad)


def test_an_unknown_operator_is_named_in_one_line(
    kept: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tampered(
        kept[1] / "model.pt2", tmp_path / "bad.pt2", in_graph("aten.linear.default", "aten.nosuch.default")
    )
    with pytest.raises(ArtifactError, match=r"aten\.nosuch\.default") as caught:
        artifact.load(bad)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_missing_weight_is_named_in_one_line(
    kept: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tampered(kept[1] / "model.pt2", tmp_path / "bad.pt2", {"data/weights/weight_0": MISSING})
    with pytest.raises(ArtifactError, match=r"bad\.pt2.*weight_0") as caught:
        artifact.load(bad)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_what_torch_logs_while_it_reads_is_kept_away(
    kept: tuple[nn.Module, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer = io.BytesIO()
    torch.save(kept[0].state_dict(keep_vars=True), buffer)  # where torch 2.8 put it; newer ones warn
    tampered(kept[1] / "model.pt2", tmp_path / "old.pt2", {"data/weights/model.pt": buffer.getvalue()})
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(artifact.load(tmp_path / "old.pt2")(x), kept[0](x), rtol=0, atol=1e-6)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_no_source_line_and_no_path_of_the_machine_travels_with_the_file(tmp_path: Path) -> None:
    rows = torch.export.Dim.AUTO
    program = torch.export.export(Tied().eval(), (torch.randn(2, 3, 6, 6),), dynamic_shapes=({0: rows},))
    for network in (symbolic_trace(Tied()), program.module()):
        artifact.save(network, tmp_path, example_inputs=[torch.randn(2, 3, 6, 6)])
        for path in tmp_path.iterdir():
            for secret in (str(Path(__file__).parent), str(Path(torch.__file__).parent), "self.first(x)"):
                assert secret.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
def test_checkpoints_are_read_with_tensors_only(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], dict[str, object]]
) -> None:
    state = Tied().state_dict()
    torch.save(wrap(dict(state)), tmp_path / "weights.pt")
    found = artifact.load_state(tmp_path / "weights.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"x": Trap(sprung)}, tmp_path / "bad.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError, match=r"refused.*mkdir.*if you trust.*convert it once, which runs"):
        artifact.load_state(tmp_path / "bad.pth")
    assert not sprung.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(Tied(), tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="safetensors"):
        artifact.load_state(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.safetensors", "x.pt2"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02garbage"])
def test_garbage_is_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="x\\."):
        artifact.load_state(tmp_path / name)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_damage_and_nothing_to_trust(tmp_path: Path, seed: int) -> None:
    (tmp_path / "x.pt").write_bytes(random.Random(seed).randbytes(1000))
    with pytest.raises(ArtifactError, match="damaged or no torch checkpoint") as caught:
        artifact.load_state(tmp_path / "x.pt")
    assert not re.search(r"weights_only|trust", str(caught.value))


def test_a_truncated_checkpoint_is_damaged(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Tied().state_dict(), buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue()[:-700])
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.load_state(tmp_path / "x.pt")


def test_a_checkpoint_without_weights_says_so(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="no state dict"):
        artifact.load_state(tmp_path / "x.pt")


def test_json_and_text_are_written_whole(tmp_path: Path) -> None:
    files.write_json_atomic(tmp_path / "a.json", {"k": [1, 2]})
    files.write_text_atomic(tmp_path / "a.txt", "äöü\n")
    assert json.loads((tmp_path / "a.json").read_text()) == {"k": [1, 2]}
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "äöü\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_json_cannot_say_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ArtifactError, match=r"a\.json"):
        files.write_json_atomic(tmp_path / "a.json", {"x": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("by the user"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    files.write_text_atomic(tmp_path / "a.txt", "old")

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(data[:1])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises((KeyboardInterrupt, ArtifactError), match=r"disk is full|by the user"):
        files.write_text_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []

    def sync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix))

    def replace(source: Path, target: Path) -> None:
        done.append(("replace", target.suffix))
        genuine(source, target)

    genuine = os.replace
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_text_atomic(tmp_path / "a.txt", "new")
    assert done == [("sync", ".txt"), ("replace", ".txt"), ("sync", "")]
    done.clear()
    with files.replacing_with_company(tmp_path / "b.onnx") as path:
        path.touch()
        path.with_suffix(".data").touch()
    assert sorted(done[:2]) == [("sync", ".data"), ("sync", ".onnx")]
    assert done[2:] == [("replace", ".data"), ("replace", ".onnx"), ("sync", "")]
    done.clear()
    with files.replacing_folder(tmp_path / "c", replace=True) as folder:
        (folder / "d.txt").touch()
    assert done == [("sync", ".txt"), ("replace", ""), ("sync", "")]


def test_check_writable_creates_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert files.check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    day, minute = 25 * 3600, 2 * 60
    gone = {f".model-{ended.pid}-0123abcd.onnx": minute, f".probe-{os.getpid()}-0123abcd": day}
    kept = {
        f".model-{ended.pid}-4567abcd.onnx": 0,  # a process of another machine may be at it
        f".model-{os.getpid()}-0123abcd.onnx": minute,
        f"model-{ended.pid}-0123abcd.onnx": day,
        f".model-{ended.pid}-other.onnx": day,
        ".hidden": day,
    }
    for name, age in (gone | kept).items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.check_writable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="cannot be written"):
            files.check_writable(folder)
    with pytest.raises(ArtifactError, match="cannot be written"):
        files.write_text_atomic(tmp_path / "missing" / "a.txt", "x")


def test_a_network_that_export_cannot_capture_is_not_kept(tmp_path: Path) -> None:
    gm = symbolic_trace(nn.Linear(3, 3))
    with pytest.raises(ArtifactError, match=r"torch\.export failed"):
        artifact.save(gm, tmp_path, example_inputs=[torch.randn(2, 5)])
    assert [path.name for path in tmp_path.iterdir()] == [
        "model.safetensors"
    ]  # its weights are all that is sure
