"""ONNX files: equal to torch at every batch size, in one file, and written only then."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torchvision.models import VisionTransformer

import fxprune
from fxprune.errors import DeviceError, ExportError, MeasurementError, OptionError, ParityError
from fxprune.export import conversion, onnx_file, parity
from fxprune.export.attention import FourDimensionalAttention
from fxprune.graph.call import Inputs
from fxprune.runtimes import onnxruntime, openvino
from fxprune.tracing.evaluation import evaluation_copy

ROOT = Path(__file__).resolve().parent.parent


class Small(nn.Module):
    """A residual network small enough to export in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.block(x) + x)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


@dataclass
class Pair:
    total: Tensor
    rows: list[Tensor]


class Several(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        return {"sum": left + right, "more": (left * 2, right.flatten(1))}


class AsDataclass(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x.sum(1), [x * 2, x + 1])


def exported_graph(model: nn.Module, *, dynamic: bool) -> GraphModule:
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    module = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes).module()
    assert isinstance(module, GraphModule)
    return module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "make",
    [Small, lambda: symbolic_trace(Small()), lambda: exported_graph(Small(), dynamic=True)],
    ids=["module", "traced", "exported"],
)
def test_the_file_equals_the_network_at_every_batch_size(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model = make()
    record = onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(1, 3, 8, 8)])
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert record.batch_sizes == (1, 2, 7)
    assert 0 <= record.max_abs_diff <= record.tolerance < 1e-2
    assert record.bytes == (tmp_path / "m.onnx").stat().st_size
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert record.opset == proto.opset_import[0].version
    assert record.inputs == tuple(entry.name for entry in proto.graph.input)
    session = onnxruntime.open_session(tmp_path / "m.onnx", device="cpu", threads=1)
    x = torch.randn(7, 3, 8, 8)
    network = evaluation_copy(model).requires_grad_(False)
    np.testing.assert_allclose(onnxruntime.run(session, [x])[0], network(x).numpy(), atol=1e-5)


def test_the_network_keeps_its_mode_weights_and_gradients(tmp_path: Path) -> None:
    model = Small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(2, 3, 8, 8)], verify=False)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx_file.export_onnx(Small(), tmp_path / "m.onnx", [torch.randn(2, 3, 8, 8)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_and_nested_outputs(tmp_path: Path, named: bool) -> None:
    left, right = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    inputs = {"right": right, "left": left} if named else [left, right]
    record = onnx_file.export_onnx(Several(), tmp_path / "m.onnx", inputs)
    assert record.inputs == (("right", "left") if named else ("input", "input_1"))
    assert record.outputs == ("sum", "more_0", "more_1")
    proto = onnx.load(tmp_path / "m.onnx")
    assert tuple(entry.name for entry in proto.graph.input) == record.inputs
    assert tuple(entry.name for entry in proto.graph.output) == record.outputs


def test_unverified_files_say_so(tmp_path: Path) -> None:
    record = onnx_file.export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", [torch.randn(2, 3)], verify=False)
    assert (record.batch_sizes, record.max_abs_diff) == ((), 0.0)
    assert (tmp_path / "m.onnx").is_file()


def test_image_size_may_stay_free(tmp_path: Path) -> None:
    model = Small().eval()
    onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(2, 3, 8, 10)], dynamic_image_size=True)
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 3, "height", "width"]
    x = torch.randn(3, 3, 13, 17)
    (y,) = onnxruntime.run(onnxruntime.open_session(tmp_path / "m.onnx", device="cpu", threads=1), [x])
    with torch.no_grad():
        np.testing.assert_allclose(y, model(x).numpy(), atol=1e-5)


OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
FIXED_BATCH = "torch 2.9 takes the batch of such attention for a constant: an ExportError says so"


class Attention(nn.Module):
    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(x, 2 * x, x + 1, attn_mask=self.mask, scale=0.3)


@pytest.mark.parametrize("mask", [None, (4, 4), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 8), (5, 3, 4, 8), (5, 2, 3, 4, 8)], ids=str)
def test_attention_over_any_number_of_dimensions(
    tmp_path: Path, shape: tuple[int, ...], mask: tuple[int, ...] | None
) -> None:
    if OLD_TORCH and (shape, mask) == ((3, 4, 8), (3, 4, 4)):
        pytest.skip(FIXED_BATCH)
    model = Attention(None if mask is None else torch.randn(mask))
    if mask is not None and len(mask) == len(shape):
        model.mask = model.mask[:1]  # a mask for each image would fix the batch
    record = onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(shape)])
    assert record.max_abs_diff <= 1e-5
    x = torch.randn(shape, dtype=torch.float64)
    model = Attention(None if model.mask is None else model.mask.double())
    with FourDimensionalAttention():
        arranged = model(x)
    torch.testing.assert_close(arranged, model(x), rtol=0, atol=1e-12)


def test_a_graph_that_the_optimizer_breaks_is_written_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    convert = onnx_file.convert

    def broken(*arguments: Any, optimize: bool, **rest: Any) -> ir.Model:
        model = convert(*arguments, optimize=optimize, **rest)
        if optimize:
            next(iter(model.graph)).replace_input_with(0, ir.val("nowhere"))
        return model

    monkeypatch.setattr(onnx_file, "convert", broken)
    record = onnx_file.export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert record.max_abs_diff <= record.tolerance
    assert "nowhere" in caplog.text


def test_half_precision_has_its_own_tolerance(tmp_path: Path) -> None:
    record = onnx_file.export_onnx(nn.Linear(3, 2).half(), tmp_path / "m.onnx", [torch.randn(2, 3).half()])
    assert record.tolerance >= 5e-3


@pytest.mark.skipif(OLD_TORCH, reason=FIXED_BATCH)
def test_a_vision_transformer_in_half_precision_does_not_end_the_process(tmp_path: Path) -> None:
    """With onnxruntime's layout optimisation it did (1.31, CPU)."""
    model = VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=4).half()
    record = onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(2, 3, 32, 32).half()])
    assert record.max_abs_diff <= record.tolerance


def as_it_comes(model: nn.Module, *inputs: Tensor) -> ir.Model:
    """What the exporter makes of a network."""
    plain = {"opset": None, "ir_version": None, "dynamic_image_size": False, "optimize": True}
    return conversion.convert(evaluation_copy(model), Inputs(inputs), **plain)


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, onnx.ModelProto]:
    model = nn.Linear(3, 2)
    return model, ir.to_proto(as_it_comes(model, torch.randn(3, 3)))


@pytest.fixture
def converted(linear: tuple[nn.Module, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network whose conversion, the slow part, is done already."""
    monkeypatch.setattr(onnx_file, "convert", lambda *args, **options: ir.from_proto(linear[1]))
    return linear[0]


def perturb(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
    genuine = onnxruntime.run
    monkeypatch.setattr(onnxruntime, "run", lambda session, inputs: change(genuine(session, inputs)))


@pytest.mark.parametrize(
    "change",
    [
        lambda ys: [y + 0.1 for y in ys],
        lambda ys: [y * np.nan for y in ys],
        lambda ys: [y[:, :1] for y in ys],
    ],
    ids=["offset", "nan", "shape"],
)
def test_a_file_that_disagrees_is_not_written(
    tmp_path: Path,
    converted: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[np.ndarray]], list[np.ndarray]],
) -> None:
    perturb(monkeypatch, change)
    (tmp_path / "m.onnx").write_bytes(b"the old one")
    with pytest.raises(ParityError, match="no file was written") as caught:
        onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert not caught.value.max_abs_diff <= caught.value.tolerance
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"the old one")]


def test_probabilities_of_many_classes_are_held_to_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Linear(3, 1000), nn.Softmax(1)).eval()
    perturb(monkeypatch, lambda ys: [1.01 * y for y in ys])
    with pytest.raises(ParityError, match="disagrees with torch"):
        onnx_file.export_onnx(network, tmp_path / "m.onnx", [torch.randn(2, 3)])


def test_a_wider_tolerance_accepts(
    tmp_path: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturb(monkeypatch, lambda ys: [y + 0.1 for y in ys])
    record = onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)], tolerance=0.2)
    assert record.max_abs_diff == pytest.approx(0.1, abs=1e-4)
    assert record.tolerance == 0.2


@pytest.mark.parametrize("stop", [KeyboardInterrupt("by the user"), OSError(errno.ENOSPC, "No space left")])
def test_an_interruption_leaves_no_file(
    tmp_path: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def interrupt(*arguments: object) -> None:
        raise stop

    monkeypatch.setattr(onnx_file, "compare", interrupt)
    with pytest.raises((KeyboardInterrupt, ExportError), match=r"by the user|disk is full"):
        onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("opset", "words"),
    [(7, r"onnx's converter cannot make it out of 18"), (999, r"exporter writes \d+ instead")],
)
def test_an_opset_that_cannot_be_had_is_refused(
    tmp_path: Path, opset: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=rf"opset={opset} was asked for.*{words}.*Ask for \d+"):
        onnx_file.export_onnx(Small(), tmp_path / "m.onnx", [torch.randn(2, 3, 8, 8)], opset=opset)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("opset", "ir_version"), [(19, None), (17, 8), (14, 7)])
def test_versions_are_obeyed(tmp_path: Path, opset: int, ir_version: int | None) -> None:
    export = partial(onnx_file.export_onnx, Small(), tmp_path / "m.onnx", [torch.randn(2, 3, 8, 8)])
    if OLD_TORCH and opset < 18:  # its graphs hold what onnx's converter cannot write in an older set
        with pytest.raises(ExportError, match=f"opset={opset} was asked for, and onnx's converter cannot"):
            export(opset=opset, ir_version=ir_version)
        return
    record = export(opset=opset, ir_version=ir_version)
    proto = onnx.load(tmp_path / "m.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert (record.opset, record.ir_version) == (opset, proto.ir_version)
    assert ir_version in (None, proto.ir_version)
    assert (record.inputs, record.outputs) == (("input",), ("output",))
    assert not any(node.metadata_props for node in proto.graph.node) or proto.ir_version >= 10


@pytest.mark.parametrize("ir_version", [3, 99])
def test_a_file_format_that_cannot_hold_the_opset_is_refused(converted: nn.Module, ir_version: int) -> None:
    with pytest.raises(
        ExportError, match=rf"ir_version={ir_version} was asked for.*writes opset \d+ in \d+ to \d+"
    ):
        conversion._in_format(onnx_file.convert(), ir_version)


@pytest.mark.parametrize("how", ["single", "fp16", "int8"])
def test_no_source_line_and_no_path_of_the_machine_travels_with_the_file(how: str, tmp_path: Path) -> None:
    x = torch.randn(10, 3, 8, 8)
    settings = {"int8": x} if how == "int8" else {"example_inputs": x, "fp16": how == "fp16"}
    fxprune.export_onnx(Small().eval(), tmp_path / "m.onnx", **settings)
    data = (tmp_path / "m.onnx").read_bytes()
    for secret in (str(Path(__file__).parent), str(Path(torch.__file__).parent), "self.block(x)"):
        assert secret.encode() not in data


def test_nodes_inside_of_branches_forget_their_sources_too() -> None:
    inner = onnx.helper.make_node("Relu", ["x"], ["y"])
    branches = {f"{name}_branch": onnx.helper.make_graph([inner], name, [], []) for name in ("then", "else")}
    outer = onnx.helper.make_node("If", ["c"], ["z"], **branches)
    graph = onnx.helper.make_graph([outer], "g", [], [], doc_string="secret")
    for node in (graph.node[0], *(attribute.g.node[0] for attribute in graph.node[0].attribute)):
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="secret")
        node.metadata_props.add(key="namespace", value="blocks.0")
        node.doc_string = "secret"
    model = ir.from_proto(onnx.helper.make_model(graph))
    conversion._forget_sources(model)
    data = ir.to_proto(model).SerializeToString()
    assert b"secret" not in data and data.count(b"blocks.0") == 3


def test_what_a_killed_export_left_behind_goes(tmp_path: Path, converted: nn.Module) -> None:
    left = tmp_path / ".m-1-0123abcd.onnx"
    left.mkdir()
    (left / "m.onnx").write_bytes(b"half")
    os.utime(left, (0, 0))
    onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


class Counts(nn.Module):
    def __init__(self, count: Any) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Any:
        return {"doubled": 2 * x, "count": x.shape[0] if self.count is None else self.count}


@pytest.mark.parametrize(("count", "kind"), [(3, "int"), (True, "bool"), (None, "int")])
def test_an_output_that_is_no_tensor_is_named(tmp_path: Path, count: Any, kind: str) -> None:
    with pytest.raises(ExportError, match=f"output holds a value of type {kind}.*returns its tensors"):
        onnx_file.export_onnx(Counts(count), tmp_path / "m.onnx", [torch.randn(2, 3)])


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 12)


class PythonOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (FixedBatch(), (2, 12), "free batch size.*constants"),
        (exported_graph(Small(), dynamic=False), (2, 3, 8, 8), "fixes the batch.*2|free batch size"),
        (AsDataclass(), (2, 12), "free batch size"),
        (PythonOnly(), (2, 12), "free batch size"),
        (nn.Linear(5, 2), (2, 12), "free batch size"),
    ],
    ids=["view", "exported", "dataclass", "control-flow", "shape"],
)
def test_what_cannot_be_written_is_explained(
    tmp_path: Path, model: nn.Module, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(shape)])
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_what_protobuf_holds_lie_beside_the_file(
    tmp_path: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    onnx_file.export_onnx(converted, path, [torch.randn(2, 3)])
    inside = path.read_bytes()
    monkeypatch.setattr(onnx_file, "_SINGLE_FILE_BYTES", 1)
    monkeypatch.setattr(onnx_file.ir, "save", partial(onnx_file.ir.save, size_threshold_bytes=0))
    record = onnx_file.export_onnx(converted, path, [torch.randn(2, 3)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert record.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    table = converted.weight.detach().numpy().tobytes()
    assert (
        table in inside
        and table not in path.read_bytes()
        and table in (tmp_path / "m.onnx.data").read_bytes()
    )
    x = torch.randn(3, 3)
    (y,) = onnxruntime.run(onnxruntime.open_session(path, device="cpu", threads=1), [x])
    np.testing.assert_allclose(y, converted(x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ([], {}),
        ([torch.tensor(1.0)], {}),
        ([torch.randn(0, 3)], {}),
        ([torch.randn(2, 3), torch.randn(3, 3)], {}),
        ([torch.randn(2, 3)], {"tolerance": -1.0}),
    ],
)
def test_unfit_options_are_refused(tmp_path: Path, inputs: list[Tensor], options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        onnx_file.export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", inputs, **options)


def test_a_folder_is_made_before_the_export(tmp_path: Path, converted: nn.Module) -> None:
    onnx_file.export_onnx(converted, tmp_path / "new" / "m.onnx", [torch.randn(2, 3)])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.onnx"]


def test_a_place_that_cannot_be_written_is_found_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "convert", lambda *args, **options: pytest.fail("the export began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        onnx_file.export_onnx(nn.Linear(3, 2), tmp_path / "file" / "m.onnx", [torch.randn(2, 3)])
    with pytest.raises(ExportError, match="is a folder: name the file"):
        onnx_file.export_onnx(nn.Linear(3, 2), tmp_path, [torch.randn(2, 3)])


def test_names_can_be_given(tmp_path: Path) -> None:
    inputs = {"right": torch.randn(2, 3, 4), "left": torch.randn(2, 3, 4)}
    names = {
        "input_names": ["r", "mul"],
        "output_names": ["add", "double", "left"],
    }  # what nodes are called too
    record = onnx_file.export_onnx(Several(), tmp_path / "m.onnx", inputs, **names)
    assert record.inputs == ("r", "mul") and record.outputs == ("add", "double", "left")
    session = onnxruntime.open_session(tmp_path / "m.onnx", device="cpu", threads=1)
    total, double, right = session.run(
        ["add", "double", "left"], {"mul": inputs["left"].numpy(), "r": inputs["right"].numpy()}
    )
    np.testing.assert_allclose(total, (inputs["left"] + inputs["right"]).numpy())
    np.testing.assert_allclose(double, 2 * inputs["left"].numpy())
    np.testing.assert_allclose(right, inputs["right"].flatten(1).numpy())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"input_names": ["a"]}, "network has 2 inputs, and 1 names"),
        ({"output_names": ["a", "b", "c", "d"]}, "network has 3 outputs, and 4 names"),
        ({"input_names": ["a", "a"]}, "a name of its own"),
        ({"output_names": ["a", "", "c"]}, "a name of its own"),
        ({"input_names": ["a", "b"], "output_names": ["c", "b", "d"]}, "'b' names an input and an output"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_the_export(
    tmp_path: Path, names: dict[str, list[str]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "convert", lambda *args, **options: pytest.fail("the export began"))
    with pytest.raises(OptionError, match=words):
        onnx_file.export_onnx(
            Several(), tmp_path / "m.onnx", [torch.randn(2, 3, 4), torch.randn(2, 3, 4)], **names
        )
    assert list(tmp_path.iterdir()) == []


class Starred(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1]


def test_inputs_may_arrive_through_args(tmp_path: Path) -> None:
    record = onnx_file.export_onnx(Starred(), tmp_path / "m.onnx", [torch.randn(2, 3), torch.randn(2, 3)])
    assert record.inputs == ("input", "input_1")


class Through(nn.Module):
    """Returns its input, and one value twice."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = 2 * x
        return {"input": x, "y": y, "again": y}


def test_outputs_that_are_one_value_have_names_of_their_own(tmp_path: Path) -> None:
    record = onnx_file.export_onnx(Through(), tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert (record.inputs, record.outputs) == (("input",), ("input_", "y", "again"))


class Shared(nn.Module):
    """Two convolutions of one width read one tensor, each with a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.bias)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norms[0](self.left(x)) + self.norms[1](self.right(x))))


@pytest.mark.parametrize("traced", [False, True])
def test_batch_norms_are_folded_before_the_exporter_sees_them(
    tmp_path: Path, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[nn.Module] = []
    convert = onnx_file.convert
    monkeypatch.setattr(
        onnx_file, "convert", lambda net, *a, **kw: (seen.append(net), convert(net, *a, **kw))[1]
    )
    model = symbolic_trace(Shared()) if traced else Shared()
    onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(2, 3, 4, 4)])
    assert [type(m) for m in seen[0].modules() if isinstance(m, nn.BatchNorm2d)] == []
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 2
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds == ["Conv", "Conv", "Add", "Relu", "Conv"]


def test_a_bias_that_overwrote_anothers_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxscript 0.5.0 to 0.5.6 wrote of two batch norms behind one tensor; onnx.checker accepts it."""
    convert = onnx_file.convert

    def overwritten(*arguments: Any, **options: Any) -> ir.Model:
        model = convert(*arguments, **options)
        first, second = [node for node in model.graph if node.op_type == "Conv"][:2]
        first.replace_input_with(2, second.inputs[2])
        return model

    monkeypatch.setattr(onnx_file, "convert", overwritten)
    with pytest.raises(ParityError, match=r"disagrees with torch by .* \(batch size \d, onnxruntime"):
        onnx_file.export_onnx(Shared(), tmp_path / "m.onnx", [torch.randn(2, 3, 4, 4)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [False, True], ids=["unoptimised", "optimised"])
def test_both_sessions_are_compared(
    tmp_path: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    genuine_open, genuine_run, wrong = onnxruntime.open_session, onnxruntime.run, []

    def open_session(*args: Any, optimised: bool, **options: Any) -> Any:
        session = genuine_open(*args, optimised=optimised, **options)
        if optimised == broken:
            wrong.append(session)
        return session

    monkeypatch.setattr(onnxruntime, "open_session", open_session)
    monkeypatch.setattr(
        onnxruntime, "run", lambda s, inputs: [y + (s in wrong) for y in genuine_run(s, inputs)]
    )
    with pytest.raises(ParityError, match=rf"onnxruntime {'optimised' if broken else 'unoptimised'}\)"):
        onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])


def test_openvino_is_asked_where_it_is_installed(tmp_path: Path, converted: nn.Module) -> None:
    pytest.importorskip("openvino")
    record = onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert record.runtimes == ("onnxruntime unoptimised", "onnxruntime optimised", "OpenVINO")
    assert record.note is None and record.checked.endswith("OpenVINO at batches of 1, 2, 7")


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[[list[np.ndarray]], Any]) -> None:
    """OpenVINO that answers what is made of onnxruntime's answers."""
    monkeypatch.setattr(
        openvino, "open_session", lambda path, threads: onnxruntime.open_session(path, device="cpu")
    )
    monkeypatch.setattr(openvino, "run", lambda session, inputs: run(onnxruntime.run(session, inputs)))


def test_openvino_that_computes_something_else_is_named(
    tmp_path: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, lambda answers: [y + 0.1 for y in answers])
    with pytest.raises(ParityError, match=r"by 0\.1 .*batch size \d, OpenVINO\)"):
        onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert list(tmp_path.iterdir()) == []


def test_what_openvino_cannot_run_is_noted(
    tmp_path: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(answers: list[np.ndarray]) -> None:
        raise MeasurementError("OpenVINO cannot run Rocket")

    caplog.set_level("INFO", "fxprune")
    stand_in(monkeypatch, run)
    record = onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert record.runtimes == ("onnxruntime unoptimised", "onnxruntime optimised")
    assert record.note == "not checked in OpenVINO: OpenVINO cannot run Rocket"
    assert record.checked in caplog.text and record.note in record.checked
    monkeypatch.setattr(openvino, "open_session", absent)
    record = onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert record.note == "not checked in OpenVINO: it is not there" and (tmp_path / "m.onnx").is_file()


def absent(*_: object, **__: object) -> None:
    raise DeviceError("it is not there")


def test_examples_are_compared_as_they_are_where_there_are_enough() -> None:
    seven = Inputs((torch.randn(7, 3),))
    for batch in parity.BATCH_SIZES:
        assert torch.equal(parity.resized(seven, batch, seed=0).args[0], seven.args[0][:batch])
    rows = parity.resized(Inputs((torch.randn(2, 3),)), 7, seed=0).args[0]
    assert rows.shape == (7, 3) and len({tuple(row.tolist()) for row in rows}) == 7


def test_the_file_says_what_it_is(tmp_path: Path, converted: nn.Module) -> None:
    cuts, x = ["layer1.0", "layer2.1"], [torch.randn(2, 3)]
    record = onnx_file.export_onnx(converted, tmp_path / "m.onnx", x, cuts=cuts)
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert about == {
        "fxprune.version": fxprune.__version__,
        "fxprune.cuts": json.dumps(cuts),
        "fxprune.weights_sha256": record.weights,
    }
    other = copy.deepcopy(converted)
    assert onnx_file.export_onnx(other, tmp_path / "m.onnx", x, verify=False).weights == record.weights
    nn.init.zeros_(other.bias)
    assert onnx_file.export_onnx(other, tmp_path / "m.onnx", x, verify=False).weights != record.weights


TWICE = """
import sys, torch
from torch import nn
from fxprune.export.onnx_file import export_onnx
torch.manual_seed(0)
branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
export_onnx(nn.Sequential(branch, branch, nn.Dropout()), sys.argv[1], [torch.randn(2, 3, 8, 8)], verify=False)
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", TWICE, str(tmp_path / seed)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
