"""ONNX files: equal to torch at every batch size, in one file, and written only then."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torchvision.models import VisionTransformer

from fxprune.errors import ExportError, OptionError, ParityError
from fxprune.export import onnx_file, serving
from fxprune.export.attention import FourDimensionalAttention
from fxprune.graph.call import Inputs
from fxprune.tracing.evaluation import evaluation_copy


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
    assert record.batch_sizes == (1, 2, 5)
    assert 0 <= record.max_abs_diff <= record.tolerance < 1e-2
    assert record.bytes == (tmp_path / "m.onnx").stat().st_size
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert record.opset == proto.opset_import[0].version
    assert record.inputs == tuple(entry.name for entry in proto.graph.input)
    session = serving.open_session(tmp_path / "m.onnx", device="cpu", threads=1)
    x = torch.randn(7, 3, 8, 8)
    network = evaluation_copy(model).requires_grad_(False)
    np.testing.assert_allclose(serving.run(session, [x])[0], network(x).numpy(), atol=1e-5)


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
    assert set(record.inputs) == {"left", "right"}
    assert len(record.outputs) == 3


def test_unverified_files_say_so(tmp_path: Path) -> None:
    record = onnx_file.export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", [torch.randn(2, 3)], verify=False)
    assert (record.batch_sizes, record.max_abs_diff) == ((), 0.0)
    assert (tmp_path / "m.onnx").is_file()


def test_image_size_may_stay_free(tmp_path: Path) -> None:
    model = Small().eval()
    onnx_file.export_onnx(model, tmp_path / "m.onnx", [torch.randn(2, 3, 8, 10)], dynamic_image_size=True)
    x = torch.randn(3, 3, 13, 17)
    (y,) = serving.run(serving.open_session(tmp_path / "m.onnx", device="cpu", threads=1), [x])
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
    convert = onnx_file._convert

    def broken(*arguments: Any, optimize: bool) -> onnx.ModelProto:
        proto = convert(*arguments, optimize=optimize)
        if optimize:
            proto.graph.node[0].input[0] = "nowhere"
        return proto

    monkeypatch.setattr(onnx_file, "_convert", broken)
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


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, onnx.ModelProto]:
    model = nn.Linear(3, 2)
    return model, onnx_file._wellformed(evaluation_copy(model), Inputs((torch.randn(3, 3),)), None, False)


@pytest.fixture
def converted(linear: tuple[nn.Module, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network whose conversion, the slow part, is done already."""
    monkeypatch.setattr(onnx_file, "_wellformed", lambda *args: linear[1])
    return linear[0]


def perturb(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
    genuine = serving.run
    monkeypatch.setattr(serving, "run", lambda session, inputs: change(genuine(session, inputs)))


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

    monkeypatch.setattr(onnx_file, "_compare", interrupt)
    with pytest.raises((KeyboardInterrupt, ExportError), match=r"by the user|disk is full"):
        onnx_file.export_onnx(converted, tmp_path / "m.onnx", [torch.randn(2, 3)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [7, 17, 999])
def test_an_opset_that_cannot_be_had_is_refused(
    tmp_path: Path, opset: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=rf"opset={opset} was asked for.*Small in opset \d+"):
        onnx_file.export_onnx(Small(), tmp_path / "m.onnx", [torch.randn(2, 3, 8, 8)], opset=opset)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_opset_is_obeyed(tmp_path: Path) -> None:
    record = onnx_file.export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", [torch.randn(2, 3)], opset=19)
    assert record.opset == onnx.load(tmp_path / "m.onnx").opset_import[0].version == 19


def test_no_source_line_and_no_path_of_the_machine_travels_with_the_file(tmp_path: Path) -> None:
    onnx_file.export_onnx(Small(), tmp_path / "m.onnx", [torch.randn(2, 3, 8, 8)], verify=False)
    data = (tmp_path / "m.onnx").read_bytes()
    for secret in (str(Path(__file__).parent), str(Path(torch.__file__).parent), "self.block(x)"):
        assert secret.encode() not in data


def test_nodes_inside_of_branches_forget_their_sources_too() -> None:
    inner = onnx.helper.make_node("Relu", ["x"], ["y"])
    outer = onnx.helper.make_node(
        "If", ["c"], ["y"], then_branch=onnx.helper.make_graph([inner], "g", [], [])
    )
    graph = onnx.helper.make_graph([outer], "g", [], [])
    inner = graph.node[0].attribute[0].g.node[0]
    for node in (graph.node[0], inner):
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="secret")
        node.metadata_props.add(key="namespace", value="blocks.0")
    onnx_file._forget_sources(graph)
    assert b"secret" not in graph.SerializeToString()
    assert [entry.value for entry in inner.metadata_props] == ["blocks.0"]


def test_what_a_killed_export_left_behind_goes(tmp_path: Path, converted: nn.Module) -> None:
    left = tmp_path / ".m-1-0123abcd.onnx"
    left.write_bytes(b"half")
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


def test_a_network_beyond_protobuf_is_refused_before_any_work(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    # A sparse file: it claims its size and takes no memory.
    table = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**29, dtype=torch.float32)
    model.register_buffer("table", table)
    with pytest.raises(ExportError, match="2 GiB"):
        onnx_file._require_single_file(model)


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


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, converted: nn.Module) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        onnx_file.export_onnx(converted, tmp_path / "missing" / "m.onnx", [torch.randn(2, 3)])
