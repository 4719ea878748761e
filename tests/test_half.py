"""ONNX files in half precision: nothing overflows that did not before, and inputs and outputs stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import OptionError, ParityError
from fxprune.export import onnx_file
from fxprune.precision import half
from fxprune.runtimes import onnxruntime
from tests.tiny import images, tiny

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Tall(nn.Module):
    """Its middle reaches a million where its input and its output are of the size of one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
        for conv, gain in ((self.up, 333.3), (self.middle, 3e3), (self.down, 1e-6)):
            nn.init.dirac_(conv.weight)
            conv.weight.data *= gain

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)).relu()).abs() + 1


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The tall network in single precision."""
    path = tmp_path_factory.mktemp("single") / "m.onnx"
    onnx_file.export_onnx(Tall(), path, [images(2)], verify=False)
    return onnx.load(path)


@pytest.fixture
def tall(single: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The tall network, whose file in single precision is there already."""

    def export_onnx(model: object, path: Path, *_: object, **__: object) -> onnx_file.ExportRecord:
        onnx.save(single, path)
        return onnx_file.ExportRecord(str(path), 20, 10, ("input",), ("output",), (), 0.0, 0.0, 0, "")

    monkeypatch.setattr(half, "export_onnx", export_onnx)
    return Tall()


def types(proto: onnx.ModelProto) -> set[int]:
    return {entry.type.tensor_type.elem_type for entry in (*proto.graph.input, *proto.graph.output)}


def test_a_network_in_half_precision(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", tiny()
    record = fxprune.export_onnx(model, path, images(4), fp16=True, input_names=["image"])
    proto = onnx.load(path)
    assert types(proto) == {FLOAT} and record.inputs == (proto.graph.input[0].name,) == ("image",)
    assert {tensor.data_type for tensor in proto.graph.initializer} - {onnx.TensorProto.INT64} == {HALF}
    assert record.kept == () and 0 < record.max_abs_diff <= record.tolerance < 0.1
    assert record.bytes == path.stat().st_size and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    (y,) = onnxruntime.run(onnxruntime.open_session(path, device="cpu", threads=1), [images(7)])
    with torch.no_grad():
        np.testing.assert_allclose(y, model(images(7)).numpy(), atol=record.tolerance)


def test_what_would_overflow_stays_in_single_precision(tmp_path: Path, tall: nn.Module) -> None:
    path = tmp_path / "m.onnx"
    record = half.export_half(tall, path, [images(4)])
    proto = onnx.load(path)
    kinds = [next(node.op_type for node in proto.graph.node if node.name == name) for name in record.kept]
    assert kinds == ["Conv", "Relu", "Conv"]
    weights = [tensor.data_type for tensor in proto.graph.initializer if tensor.data_type in (FLOAT, HALF)]
    assert sorted(weights) == [FLOAT, FLOAT, HALF, HALF]  # two convolutions; another one, and what is added
    assert all(np.isfinite(x).all() for x in half._activations(proto, half.Inputs((images(4),))).values())
    assert record.max_abs_diff <= record.tolerance


class Up(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * x


def test_inputs_and_outputs_beyond_the_range_never_pass_through_it(tmp_path: Path) -> None:
    x = 1e3 * images(4)
    record = half.export_half(Up(), tmp_path / "m.onnx", [x])
    (y,) = onnxruntime.run(onnxruntime.open_session(tmp_path / "m.onnx", device="cpu", threads=1), [x])
    np.testing.assert_allclose(y, 1e3 * x.numpy(), rtol=1e-5)
    assert len(record.kept) == 1


def test_an_overflow_is_seen_though_onnxruntime_hides_it(
    tmp_path: Path, tall: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "_LIMIT", float("inf"))
    with pytest.raises(ParityError, match=r"in half precision .* overflow; no file was written"):
        half.export_half(tall, tmp_path / "m.onnx", [images(4)])
    monkeypatch.setattr(half, "_require_finite", lambda *_: None)  # then torch sees it
    with pytest.raises(ParityError, match="is nan away from itself"):
        half.export_half(tall, tmp_path / "m.onnx", [images(4)])
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_half_precision_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="inputs are in half"):
        fxprune.export_onnx(tiny().half(), tmp_path / "m.onnx", images(2).half(), fp16=True)


def test_the_tolerance_is_that_of_half_precision(tmp_path: Path, tall: nn.Module) -> None:
    with pytest.raises(ParityError, match="where 1e-09 is acceptable"):
        half.export_half(tall, tmp_path / "m.onnx", [images(4)], tolerance=1e-9)
