"""ONNX files in eight bits: how they are rounded, what is corrected, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.drawing import draw
from fxprune.errors import AgreementError, CalibrationError, ExportError, OptionError, ParityError
from fxprune.export import parity
from fxprune.export.onnx_file import EightBits, ExportRecord
from fxprune.precision import int8
from fxprune.precision.int8 import export_int8
from fxprune.reports.fewer_bits import FewerBits
from fxprune.runtimes import onnxruntime, openvino
from tests.tiny import images, tiny

ROOT = Path(__file__).resolve().parent.parent


class Depthwise(nn.Module):
    """A convolution without a bias, a depthwise one whose channels differ widely, and scores of four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Conv2d(8, 4, 1)
        self.deep.weight.data *= torch.logspace(-1, 1, 8).view(8, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.stem(x)).relu()).mean((2, 3))


def depthwise() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Depthwise().eval()


def constants(proto: onnx.ModelProto) -> dict[str, Any]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}


def of(path: Path, x: Tensor) -> Tensor:
    (y,) = onnxruntime.run(onnxruntime.open_session(path, device="cpu", threads=1), [x])
    return torch.from_numpy(y)


def rounded(proto: onnx.ModelProto, kind: str) -> tuple[Any, Any, Any, Any]:
    """Weights of the only operator of a kind as they are read, whole, and its bias, whole, with the scale."""
    made = {output: node for node in proto.graph.node for output in node.output}
    (node,) = (one for one in proto.graph.node if one.op_type == kind)
    known = constants(proto)
    (whole, scale, zero), (bias, steps) = (
        [known[name] for name in made[node.input[i]].input][:count] for i, count in ((1, 3), (2, 2))
    )
    assert not zero.any()
    return torch.from_numpy(whole * scale.reshape(-1, *[1] * (whole.ndim - 1))), whole, bias, steps


def test_a_network_in_eight_bits(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", tiny()
    record = fxprune.export_onnx(
        model, path, int8=images(40), input_names=["image"], opset=18, cuts=["body.9"]
    )
    proto = onnx.load(path)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", record.opset)] == [("", 18)]
    assert proto.ir_version == record.ir_version and record.inputs == (proto.graph.input[0].name,) == (
        "image",
    )
    assert {e.key: e.value for e in proto.metadata_props} == {
        "fxprune.version": fxprune.__version__,
        "fxprune.cuts": '["body.9"]',
        "fxprune.weights_sha256": record.weights,
    }
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert (
        kinds["Conv"] == 10 and kinds["QuantizeLinear"] > 10 and {n.domain for n in proto.graph.node} == {""}
    )
    assert {tensor.data_type for tensor in proto.graph.initializer if np.prod(tensor.dims) > 20} == {
        onnx.TensorProto.INT8
    }
    assert record.bytes == path.stat().st_size and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    held_back, _ = draw(images(40)).split(0.2, seed=0)
    x = held_back.inputs.tensors()[0]
    with torch.no_grad():
        y, exact = of(path, x), model(x)
    assert record.int8 is not None and (record.int8.images, record.int8.held_back) == (32, 8)
    assert record.int8.convolutions == 10
    assert record.int8.agreement == float((y.argmax(1) == exact.argmax(1)).double().mean())
    error = float((y - exact).square().sum() / (exact - exact.mean(0)).square().sum())
    assert record.int8.error == pytest.approx(error, rel=1e-3) and 0 < error < 0.1
    assert record.max_abs_diff == pytest.approx(float((y - exact).abs().max()), rel=1e-3)


def test_a_bias_takes_what_rounding_the_weights_adds_to_the_mean(tmp_path: Path) -> None:
    model, x = nn.Conv2d(3, 4, 3, bias=False).eval(), images(8) + 2
    fitted, held_back = draw(x[:6]), draw(x[6:])
    export_int8(model, tmp_path / "m.onnx", fitted, held_back)
    weights, _, bias, steps = rounded(onnx.load(tmp_path / "m.onnx"), "Conv")
    with torch.no_grad():
        lost = nn.functional.conv2d(x[:6], model.weight - weights).mean((0, 2, 3))
    np.testing.assert_allclose(bias * steps, lost.numpy(), atol=0.51 * steps.max())
    assert (np.abs(bias) > 5).any()


def test_corrected_biases_bring_a_depthwise_network_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = depthwise(), images(60) + 2
    corrected = fxprune.export_onnx(model, tmp_path / "m.onnx", int8=x).int8
    monkeypatch.setattr(int8, "correct_biases", lambda rounded, *_: rounded)
    plain = fxprune.export_onnx(model, tmp_path / "m.onnx", int8=x).int8
    assert corrected is not None and plain is not None
    assert corrected.convolutions == 3 and corrected.error < 0.5 * plain.error


@pytest.mark.parametrize("flags", ["avx2 avx512_vnni", "avx_vnni fma", "avx2 xavx_vnni", None])
def test_weights_take_seven_bits_where_the_cpu_lacks_vnni(
    flags: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name\t: one\nflags\t\t: {flags}\n")
    path = tmp_path / "m.onnx"
    record = fxprune.export_onnx(nn.Conv2d(3, 4, 3).eval(), path, int8=images(10))
    reduced = flags not in ("avx2 avx512_vnni", "avx_vnni fma")
    assert record.int8 is not None and record.int8.reduce_range == reduced
    _, whole, _, _ = rounded(onnx.load(path), "Conv")
    assert (np.abs(whole.astype(int)).max() <= 64) == reduced


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, fxprune; from tests.tiny import images, tiny; "
        "fxprune.export_onnx(tiny(), sys.argv[1], int8=images(10))"
    )
    fxprune.export_onnx(tiny(), tmp_path / "here.onnx", int8=images(10))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    there = [sys.executable, "-c", code, str(tmp_path / "there.onnx")]
    subprocess.run(there, check=True, env=environment, cwd=tmp_path, timeout=240)
    one, other = (
        hashlib.sha256((tmp_path / f"{name}.onnx").read_bytes()).hexdigest() for name in ("here", "there")
    )
    assert one == other


def test_a_file_whose_convolutions_stay_in_float_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partly = partial(int8.quantize_static, op_types_to_quantize=["Gemm"])
    monkeypatch.setattr(int8, "quantize_static", partly)
    with pytest.raises(ExportError, match=r"0 of 10 convolutions in eight bits.*no file was written"):
        fxprune.export_onnx(tiny(), tmp_path / "m.onnx", int8=images(10))
    assert list(tmp_path.iterdir()) == []


def ready(monkeypatch: pytest.MonkeyPatch, agreement: float | None, error: float = 0.0) -> None:
    """Lets a file in single precision be rounded at once, with a comparison that is given."""

    def export_onnx(model: object, path: Path, *_: object, **__: object) -> ExportRecord:
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), path)
        return ExportRecord(str(path), 20, 10, ("input",), ("output",), (), 0.0, 0.0, 0, "")

    monkeypatch.setattr(int8, "export_onnx", export_onnx)
    monkeypatch.setattr(int8, "_rounded", lambda proto, *_, **__: proto)
    monkeypatch.setattr(int8, "_require_fused", lambda *_: 3)
    monkeypatch.setattr(int8, "_outputs", lambda *_: [])
    monkeypatch.setattr(int8, "_compared", lambda *_: (agreement, error, 1.0))
    monkeypatch.setattr(int8, "in_openvino", lambda *_: (None, "not checked in OpenVINO: it is not there"))
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)


def test_too_little_agreement_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(monkeypatch, 0.75)
    path = tmp_path / "m.onnx"
    with pytest.raises(AgreementError, match=r"min_agreement is 0.8, but .* 0.750 of 2 held-back .*NNCF"):
        fxprune.export_onnx(tiny(), path, int8=images(10), min_agreement=0.8)
    assert list(tmp_path.iterdir()) == []
    made = fxprune.export_onnx(tiny(), path, int8=images(10), min_agreement=0.75).int8
    assert made is not None and made.agreement == 0.75
    ready(monkeypatch, None)
    with pytest.raises(OptionError, match="one score for each class"):
        fxprune.export_onnx(tiny(), path, int8=images(10), min_agreement=0.5)


@pytest.mark.parametrize(
    ("agreement", "error", "said"),
    [
        (0.89, 0.05, "the class of 11.0 % of 2 held-back images"),
        (None, 0.2, "the outputs by 0.2 of their variance"),
        (0.91, 0.05, None),
    ],
)
def test_a_file_far_from_single_precision_comes_with_advice(
    agreement: float | None,
    error: float,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ready(monkeypatch, agreement, error)
    made = fxprune.export_onnx(tiny(), tmp_path / "m.onnx", int8=images(10)).int8
    assert made == EightBits(8, 2, agreement, error, 3, made.reduce_range if made else False)
    assert [said in record.getMessage() and "NNCF" in record.getMessage() for record in caplog.records] == (
        [] if said is None else [True]
    )


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.onnx", "other.onnx")]
    for file, factor in zip(files, (1.0, float("inf")), strict=True):
        value = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node("Mul", ["x", "f"], ["y"])
        given, got = (value(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy")
        by = onnx.numpy_helper.from_array(np.array(factor, np.float32), "f")
        graph = onnx.helper.make_graph([node], "g", [given], [got], [by])
        opset = onnx.helper.make_opsetid("", 20)
        onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset]), file)
    one, other = (int8._outputs(file, [(torch.ones(3, 2),)]) for file in files)
    with pytest.raises(ParityError, match=r"not finite \(onnxruntime\)"):
        int8._compared(one, other, "onnxruntime")


def test_openvino_runs_the_file_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path, model = tmp_path / "m.onnx", tiny()
    record = fxprune.export_onnx(model, path, int8=images(40))
    assert record.runtimes == ("onnxruntime", "OpenVINO") and record.note is None
    held_back, _ = draw(images(40)).split(0.2, seed=0)
    x = held_back.inputs.tensors()[0]
    (theirs,) = openvino.run(openvino.open_session(path, threads=1), [x])
    ours, other = of(path, x), torch.from_numpy(theirs)
    made = record.int8
    assert made is not None and made.openvino_error is not None
    assert made.openvino_agreement == float((ours.argmax(1) == other.argmax(1)).double().mean()) >= 0.9
    error = float((ours - other).square().sum() / (ours - ours.mean(0)).square().sum())
    assert made.openvino_error == pytest.approx(error, rel=1e-2, abs=1e-9) and error < 0.1


@pytest.mark.parametrize("classes", [True, False])
def test_openvino_that_computes_something_else_is_warned_of(
    classes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = onnxruntime.run
    monkeypatch.setattr(openvino, "open_session", onnxruntime_session)
    monkeypatch.setattr(openvino, "run", lambda session, inputs: [-y for y in run(session, inputs)])
    monkeypatch.setattr(parity, "_TOLERANCE", float("inf"))
    model, path = tiny() if classes else tiny().body, tmp_path / "m.onnx"
    x = images(40) if classes else torch.randn(40, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    made = fxprune.export_onnx(model, path, int8=x).int8
    held_back, _ = draw(x).split(0.2, seed=0)
    y = of(path, held_back.inputs.tensors()[0])
    error = float((2 * y).square().sum() / (y - y.mean(0)).square().sum())
    assert made is not None and made.openvino_error == pytest.approx(error, rel=1e-3)
    assert made.openvino_agreement == (0 if classes else None)
    (said,) = (
        r.getMessage() for r in caplog.records if "OpenVINO runs it in place of onnxruntime" in r.getMessage()
    )
    assert ("the class of 100.0 % of 8 held-back images" if classes else "of their variance") in said
    monkeypatch.setattr(openvino, "run", lambda session, inputs: [y / 0 for y in run(session, inputs)])
    with np.errstate(all="ignore"), pytest.raises(ParityError, match=r"not finite \(OpenVINO\)"):
        fxprune.export_onnx(model, path, int8=x, verify=False)


def onnxruntime_session(path: Path, threads: int) -> Any:
    return onnxruntime.open_session(path, device="cpu", threads=threads)


def test_why_openvino_did_not_run_the_file_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    record = fxprune.export_onnx(tiny(), tmp_path / "m.onnx", int8=images(10))
    assert record.runtimes == ("onnxruntime",) and record.int8 is not None
    assert record.int8.openvino_agreement is record.int8.openvino_error is None
    assert record.note is not None and record.note.startswith("not checked in OpenVINO: ")
    assert FewerBits(record, None).line.endswith(record.note)
    told = replace(record, note=None, int8=replace(record.int8, openvino_agreement=0.5, openvino_error=0.25))
    assert FewerBits(told, None).line.endswith("the same class as onnxruntime on 50.0 % of them")
    told = replace(told, int8=replace(record.int8, openvino_error=0.25))
    assert FewerBits(told, None).line.endswith("from onnxruntime's by 0.25 of their variance")


def test_what_cannot_be_asked_for_together(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for wrong in ({"fp16": True}, {"example_inputs": images(2)}):
        with pytest.raises(OptionError, match="int8 goes neither with fp16 nor with example_inputs"):
            fxprune.export_onnx(tiny(), path, int8=images(10), **wrong)
    with pytest.raises(OptionError, match=r"min_agreement is 1\.5"):
        fxprune.export_onnx(tiny(), path, int8=images(10), min_agreement=1.5)
    with pytest.raises(OptionError, match="inputs are in half"):
        fxprune.export_onnx(tiny().half(), path, int8=images(10).half())
    with pytest.raises(CalibrationError, match="One image"):
        fxprune.export_onnx(tiny(), path, int8=images(1))
    assert list(tmp_path.iterdir()) == []
