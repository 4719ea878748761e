"""Model repositories for Triton; what the server itself makes of them is seen by `python -m tests.serve`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fxprune import files
from fxprune.errors import ArtifactError, FxpruneError, OptionError, SourceError
from fxprune.runtimes import onnxruntime
from fxprune.serving.network import read_network
from fxprune.serving.triton import export_triton
from fxprune.serving.triton_config import TritonSettings
from fxprune.shell import cli
from tests.test_json import printed

Shape = Sequence[int | str]


def write(path: Path, **changes: Any) -> Path:
    """An ONNX file that doubles an image and sums it up; `changes` overrides shapes and the like."""
    given: dict[str, Any] = {
        "x": ["N", 3, 4, 4],
        "total": ["N"],
        "type": TensorProto.FLOAT,
        "names": ("x", "total"),
        "factor": 2,
    }
    given |= changes
    x, total = given["names"]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", [x, "two"], ["twice"]),
            helper.make_node("ReduceSum", ["twice", "axes"], [total], keepdims=0),
        ],
        "g",
        [helper.make_tensor_value_info(x, given["type"], given["x"])],
        [helper.make_tensor_value_info(total, given["type"], given["total"])],
        [
            helper.make_tensor("two", given["type"], [1], [given["factor"]]),
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


TOKEN = re.compile(r'\s*(?:([{}\[\],:])|("(?:[^"\\]|\\.)*")|([-\w]+))')


def parsed(text: str) -> dict[str, list[Any]]:
    """A message in protobuf's text format: the values of each field, in order."""
    tokens = [match.group().strip() for match in TOKEN.finditer(text)]
    assert "".join(tokens) == re.sub(r'("(?:[^"\\]|\\.)*")|\s', lambda m: m[1] or "", text)
    message, rest = _message(tokens)
    assert rest == []
    return message


def _message(tokens: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    message: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        name, mark, *tokens = tokens
        value: Any
        if mark == "{":
            value, tokens = _message(tokens)
            tokens = tokens[1:]
        else:
            assert mark == ":"
            end = tokens.index("]") + 1 if tokens[0] == "[" else 1
            value, tokens = "".join(tokens[:end]), tokens[end:]
            value = value if re.fullmatch("[A-Z].*", value) else json.loads(value)
        message.setdefault(name, []).append(value)
    return message, tokens


def config(folder: Path) -> dict[str, list[Any]]:
    """The configuration of a model, by Triton's own schema too where its client is installed."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        pass
    else:
        text_format.Parse(text, model_config_pb2.ModelConfig())
    return parsed(text)


def tree(folder: Path) -> list[str]:
    return sorted(os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """A folder with the two networks of a compression."""
    for name, factor in (("original.onnx", 2), ("model.onnx", 3)):
        write(tmp_path / "out" / name, factor=factor)
    return tmp_path / "out"


def test_both_versions_of_a_compression(
    tmp_path: Path, compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"
    arguments = [str(compressed), "--triton", str(repository), "--name", "tiny-net"]
    data = printed(capsys, "export", *arguments)
    assert tree(repository) == ["tiny-net/1/model.onnx", "tiny-net/2/model.onnx", "tiny-net/config.pbtxt"]
    for version, name in ((1, "original.onnx"), (2, "model.onnx")):
        served = repository / "tiny-net" / str(version) / "model.onnx"
        assert served.read_bytes() == (compressed / name).read_bytes()
    assert data["versions"] == [str(compressed / "original.onnx"), str(compressed / "model.onnx")]
    port = {"data_type": ["TYPE_FP32"]}
    warm = {"key": ["x"], "value": [port | {"dims": [[3, 4, 4]], "random_data": [True]}]}
    assert config(repository / "tiny-net") == {
        "name": ["tiny-net"],
        "backend": ["onnxruntime"],
        "default_model_filename": ["model.onnx"],
        "max_batch_size": [32],
        "input": [{"name": ["x"]} | port | {"dims": [[3, 4, 4]]}],
        "output": [{"name": ["total"]} | port | {"dims": [[1]], "reshape": [{}]}],
        "version_policy": [{"specific": [{"versions": [[1, 2]]}]}],
        "instance_group": [{"count": [1], "kind": ["KIND_AUTO"]}],
        "dynamic_batching": [{"max_queue_delay_microseconds": [100]}],
        "model_warmup": [{"name": [f"batch of {n}"], "batch_size": [n], "inputs": [warm]} for n in (1, 32)],
    }


def test_versions_are_numbered_as_they_are_given(tmp_path: Path, compressed: Path) -> None:
    model = export_triton(compressed, tmp_path / "r", "net", versions=["compressed", "original"])
    first, second = (tmp_path / "r" / "net" / n / "model.onnx" for n in "12")
    assert first.read_bytes() == (compressed / "model.onnx").read_bytes()
    assert second.read_bytes() == (compressed / "original.onnx").read_bytes()
    assert model.versions[1].endswith("original.onnx")
    export_triton(compressed, tmp_path / "r", "one", versions=["compressed"])
    assert tree(tmp_path / "r" / "one") == ["1/model.onnx", "config.pbtxt"]
    assert config(tmp_path / "r" / "one")["version_policy"] == [{"specific": [{"versions": [[1]]}]}]


def test_files_and_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(write(tmp_path / f"{name}.onnx")) for name in "abc"]
    arguments = ["--max-batch", "8", "--max-queue-delay", "0", "--threads", "2", "--accelerator", "tensorrt"]
    data = printed(capsys, "export", *sources, "--triton", str(tmp_path / "r"), "--name", "n", *arguments)
    assert data["versions"] == sources
    assert data["settings"] == asdict(TritonSettings(8, 0, 2, "tensorrt"))
    found = config(tmp_path / "r" / "n")
    assert found["max_batch_size"] == [8] and found["version_policy"][0]["specific"][0]["versions"] == [
        [1, 2, 3]
    ]
    assert found["dynamic_batching"] == [{"max_queue_delay_microseconds": [0]}]
    assert found["parameters"] == [{"key": ["intra_op_thread_count"], "value": [{"string_value": ["2"]}]}]
    (accelerators,) = found["optimization"][0]["execution_accelerators"]
    (tensorrt,) = accelerators["gpu_execution_accelerator"]
    assert tensorrt["name"] == ["tensorrt"]
    shapes = {one["key"][0]: one["value"][0] for one in tensorrt["parameters"]}
    assert shapes == {
        "trt_profile_min_shapes": "x:1x3x4x4",
        "trt_profile_opt_shapes": "x:8x3x4x4",
        "trt_profile_max_shapes": "x:8x3x4x4",
    }


@pytest.mark.parametrize(("accelerator", "where"), [("cuda", "gpu"), ("openvino", "cpu")])
def test_accelerators(tmp_path: Path, accelerator: Any, where: str) -> None:
    settings = TritonSettings(accelerator=accelerator)
    export_triton(write(tmp_path / "a.onnx"), tmp_path / "r", "n", settings=settings)
    found = config(tmp_path / "r" / "n")["optimization"][0]["execution_accelerators"]
    assert found == [{f"{where}_execution_accelerator": [{"name": [accelerator]}]}]


def test_free_sizes_have_no_warm_up(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", x=["N", 3, "height", "width"])
    export_triton(path, tmp_path / "r", "n", settings=TritonSettings(1, accelerator="tensorrt"))
    found = config(tmp_path / "r" / "n")
    assert found["input"][0]["dims"] == [[3, -1, -1]]
    assert not {"model_warmup", "dynamic_batching"} & found.keys()
    assert found["optimization"] == [
        {"execution_accelerators": [{"gpu_execution_accelerator": [{"name": ["tensorrt"]}]}]}
    ]


@pytest.mark.parametrize(
    ("kind", "word", "data"),
    [(TensorProto.INT64, "INT64", "zero_data"), (TensorProto.FLOAT16, "FP16", "random_data")],
)
def test_types(tmp_path: Path, kind: int, word: str, data: str) -> None:
    export_triton(write(tmp_path / "a.onnx", type=kind), tmp_path / "r", "n")
    found = config(tmp_path / "r" / "n")
    assert found["input"][0]["data_type"] == [f"TYPE_{word}"]
    assert found["model_warmup"][0]["inputs"][0]["value"][0][data] == [True]


def test_names_are_quoted(tmp_path: Path) -> None:
    name = 'a "b"\\\n\N{SNOWMAN}'
    export_triton(write(tmp_path / "a.onnx", names=(name, "total")), tmp_path / "r", "n")
    assert config(tmp_path / "r" / "n")["input"][0]["name"] == [name]


def scattered(path: Path) -> Path:
    """A network whose constants lie in two other files, one of them in a folder."""
    model = onnx.load(write(path))
    two = onnx.numpy_helper.from_array(np.full(1, 2, np.float32), "two")
    model.graph.initializer[0].CopyFrom(two)
    three = onnx.numpy_helper.from_array(np.full(1, 3, np.float32))
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=three))
    for tensor, place in (
        (model.graph.initializer[0], "two.bin"),
        (model.graph.node[-1].attribute[0].t, "sub/3.bin"),
    ):
        (path.parent / place).parent.mkdir(exist_ok=True)
        (path.parent / place).write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, place)
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_a_file_travel_with_it(tmp_path: Path) -> None:
    export_triton(scattered(tmp_path / "net.onnx"), tmp_path / "r", "n")
    assert tree(tmp_path / "r" / "n") == ["1/model.onnx", "1/sub/3.bin", "1/two.bin", "config.pbtxt"]
    (y,) = onnxruntime.run(
        onnxruntime.open_session(tmp_path / "r" / "n" / "1" / "model.onnx", device="cpu"),
        [np.ones((2, 3, 4, 4), np.float32)],
    )
    np.testing.assert_array_equal(y, [96, 96])


def placed(path: Path, location: str) -> Path:
    """A network that says that its weights lie elsewhere."""
    path.write_bytes(scattered(path).read_bytes().replace(b"two.bin", location.encode()))
    return path


def test_links_to_weights_are_followed_only_where_the_file_lies(tmp_path: Path) -> None:
    kept = scattered(tmp_path / "kept" / "net.onnx")
    link = tmp_path / "links" / "net.onnx"
    (link.parent / "sub").mkdir(parents=True)
    for name in ("net.onnx", "two.bin", "sub/3.bin"):
        (link.parent / name).symlink_to(kept.parent / name)
    assert read_network(link).company == ("sub/3.bin", "two.bin")  # as a cache of downloads keeps them
    (tmp_path / "secret").write_bytes(b"0000")
    (link.parent / "two.bin").unlink()
    (link.parent / "two.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"weights in two.bin, outside"):
        export_triton(link, tmp_path / "r", "n")


NAMES = ("", ".", "..", ".hidden", "-rf", "a/b", "../a", "a\\b", "/a", "a b", "a\n", "\N{SNOWMAN}")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"cannot name a model"):
        export_triton(write(tmp_path / "a.onnx"), tmp_path / "r", name)
    assert not (tmp_path / "r").exists()


def other(path: Path, text: bytes = b"no network") -> Path:
    path.write_bytes(text)
    return path


Make = Callable[[Path], Sequence[Path]]
REFUSED: dict[str, tuple[Make, str]] = {
    "missing": (lambda d: [d / "none.onnx"], r"none.onnx does not exist"),
    "text": (lambda d: [other(d / "a.onnx")], r"a.onnx cannot be read as ONNX"),
    "empty": (lambda d: [other(d / "a.onnx", b"")], r"no input or no output"),
    "cut off": (
        lambda d: [other(d / "b.onnx", write(d / "a.onnx").read_bytes()[:-40])],
        r"b.onnx cannot be read",
    ),
    "none": (lambda d: [], r"sources is empty"),
    "empty folder": (lambda d: [d], r"original.onnx does not exist: compress writes it"),
    "a folder among files": (lambda d: [d, d / "a.onnx"], r"give one folder, or ONNX files"),
    "fixed batch": (
        lambda d: [write(d / "a.onnx", x=[2, 3, 4, 4])],
        r"x of .*: its batch size is fixed to 2",
    ),
    "no dimension": (lambda d: [write(d / "a.onnx", total=[])], r"total of .*: its batch size is missing"),
    "no shape": (lambda d: [write(d / "a.onnx", total=None)], r"total of .* has no shape"),
    "bfloat16": (
        lambda d: [write(d / "a.onnx", type=TensorProto.BFLOAT16)],
        r"BFLOAT16.*Triton cannot serve",
    ),
    "names": (
        lambda d: [write(d / "a.onnx"), write(d / "b.onnx", names=("y", "total"))],
        r"a.onnx takes x FP32 \[3, 4, 4\] .*b.onnx takes y FP32 \[3, 4, 4\] .* must agree",
    ),
    "sizes": (lambda d: [write(d / "a.onnx"), write(d / "b.onnx", x=["N", 3, 8, 8])], r"must agree"),
    "weights missing": (
        lambda d: [placed(d / "a.onnx", "not.bin")],
        r"weights in .*not.bin, which does not exist",
    ),
    "weights outside": (lambda d: [placed(d / "a.onnx", "../.bin")], r"weights in ../.bin, outside"),
    "types": (lambda d: [write(d / "a.onnx"), write(d / "b.onnx", type=TensorProto.DOUBLE)], r"must agree"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served(tmp_path: Path, what: str) -> None:
    make, why = REFUSED[what]
    with pytest.raises((SourceError, OptionError), match=why):
        export_triton(make(tmp_path), tmp_path / "r", "n")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("versions", "why"), [([], "versions is ''"), (["original", "small"], "choose from original, compressed")]
)
def test_versions_that_a_folder_does_not_have(
    tmp_path: Path, compressed: Path, versions: list[str], why: str
) -> None:
    with pytest.raises(OptionError, match=why):
        export_triton(compressed, tmp_path / "r", "n", versions=versions)
    with pytest.raises(OptionError, match="chooses from a folder"):
        export_triton(compressed / "model.onnx", tmp_path / "r", "n", versions=["original"])
    (compressed / "original.onnx").unlink()
    with pytest.raises(SourceError, match=r"or leave original out"):
        export_triton(compressed, tmp_path / "r", "n")


@pytest.mark.parametrize(
    "settings", [{"max_batch_size": 0}, {"max_queue_delay_us": -1}, {"threads": 0}, {"accelerator": "tpu"}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(settings))} is"):
        TritonSettings(**settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def test_a_model_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, names=(name[0], "total")) for name in ("a.onnx", "b.onnx"))
    repository = tmp_path / "r"
    export_triton([a, a], repository, "n")
    export_triton(a, repository, "other")
    before = contents(repository)
    with pytest.raises(OptionError, match=r"r/n exists"):
        export_triton(b, repository, "n")
    assert contents(repository) == before
    assert cli.main(["export", str(b), "--triton", str(repository), "--name", "n"]) == 2
    assert cli.main(["export", str(b), "--triton", str(repository), "--name", "n", "--overwrite"]) == 0
    assert tree(repository / "n") == ["1/model.onnx", "config.pbtxt"]
    assert (repository / "n" / "1" / "model.onnx").read_bytes() == b.read_bytes()
    assert {name: data for name, data in contents(repository).items() if name.startswith("other")} == {
        name: data for name, data in before.items() if name.startswith("other")
    }
    assert sorted(path.name for path in repository.iterdir()) == ["n", "other"]


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_no_model_is_never_replaced(tmp_path: Path, what: str) -> None:
    target = tmp_path / "r" / "n"
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("irreplaceable")
    if what == "file":
        target = tmp_path / "r" / "n" / "thesis.tex"
    elif what == "link":
        export_triton(write(tmp_path / "a.onnx"), tmp_path / "elsewhere", "n")
        target = tmp_path / "r" / "link"
        target.symlink_to(tmp_path / "elsewhere" / "n")
    before = contents(tmp_path)
    with pytest.raises(OptionError, match="no model of Triton"):
        export_triton(write(tmp_path / "a.onnx"), target.parent, target.name, overwrite=True)
    assert contents(tmp_path) == {**before, "a.onnx": (tmp_path / "a.onnx").read_bytes()}


@pytest.mark.parametrize("fails", ["copyfile", "replace", "check"])
def test_whole_or_not_at_all(tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx")
    export_triton(a, tmp_path / "r", "n")
    before = contents(tmp_path / "r")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    true_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "n" and "replaced" not in Path(source).name:
            fail()
        true_replace(source, target)

    if fails == "copyfile":
        monkeypatch.setattr("shutil.copyfile", fail)
    elif fails == "replace":
        monkeypatch.setattr(files.os, "replace", replace)
    else:
        model = onnx.load(b)
        model.graph.node[0].op_type = "Multiply"
        onnx.save(model, b)
    with pytest.raises(
        FxpruneError, match="b.onnx is no valid ONNX" if fails == "check" else "the disk is full"
    ):
        export_triton([a, b], tmp_path / "r", "n", overwrite=True)
    assert contents(tmp_path / "r") == before
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["n"]


def test_a_repository_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("a file")
    with pytest.raises(ArtifactError, match=r"r cannot be written"):
        export_triton(write(tmp_path / "a.onnx"), tmp_path / "r", "n")


def test_who_comes_second_does_not_replace(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError), files.replacing_folder(tmp_path / "n", replace=False) as folder:
        (folder / "late").write_text("")
        with files.replacing_folder(tmp_path / "n", replace=False) as first:
            (first / "early").write_text("")
    assert tree(tmp_path) == ["n/early"]


def test_what_an_old_format_lists_as_inputs_are_weights(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "a.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("two", TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "a.onnx")
    assert [port.name for port in read_network(tmp_path / "a.onnx").inputs] == ["x"]
