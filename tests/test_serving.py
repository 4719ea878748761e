"""Sessions: the outputs of the network, errors in words, and no silent change of device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, save

from fxprune.errors import DeviceError, MeasurementError
from fxprune.export import serving


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "doubling", value[:1], value[1:])
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "m.onnx",
    )
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_run_takes_tensors_and_arrays(doubling: Path, kind: str) -> None:
    x = torch.randn(2, 3)
    session = serving.open_session(doubling, device="cpu", threads=1)
    (y,) = serving.run(session, [x if kind == "torch" else x.numpy()])
    np.testing.assert_array_equal(y, 2 * x.numpy())


def test_a_bound_call_runs_again_and_again(doubling: Path) -> None:
    call = serving.bound_call(serving.open_session(doubling, device="cpu", threads=1), [torch.randn(4, 3)])
    for _ in range(3):
        call()


def test_threads_reach_the_session(doubling: Path) -> None:
    session = serving.open_session(doubling, device="cpu", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_inputs_that_do_not_fit_are_named(doubling: Path) -> None:
    session = serving.open_session(doubling, device="cpu", threads=1)
    with pytest.raises(MeasurementError, match="takes 1 inputs"):
        serving.run(session, [])
    with pytest.raises(MeasurementError, match="failed while running"):
        serving.run(session, [torch.randn(2, 5)])
    with pytest.raises(MeasurementError, match="failed while running"):
        serving.bound_call(session, [torch.randn(2, 5)])()


def test_a_file_that_is_no_network_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    for name in ("bad.onnx", "missing.onnx"):
        with pytest.raises(MeasurementError, match=name):
            serving.open_session(tmp_path / name, device="cpu", threads=1)


def test_an_unknown_device_is_refused(doubling: Path) -> None:
    with pytest.raises(DeviceError, match="tpu"):
        serving.open_session(doubling, device="tpu", threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_card_is_an_error(doubling: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        serving.open_session(doubling, device="cuda", threads=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_runs_where_there_is_a_card(doubling: Path) -> None:
    session = serving.open_session(doubling, device="cuda", threads=None)
    x = torch.randn(2, 3)
    np.testing.assert_array_equal(serving.run(session, [x])[0], 2 * x.numpy())
    serving.bound_call(session, [x])()


def fake_cuda(monkeypatch: pytest.MonkeyPatch, *, available: list[str], used: list[str]) -> None:
    """A machine with a card on which onnxruntime behaves as told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcurand.so.10"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: SimpleNamespace(get_providers=lambda: used))


def test_a_session_that_fell_back_is_an_error_naming_the_library(
    doubling: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cuda(monkeypatch, available=["CUDAExecutionProvider"], used=["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"fell back.*libcurand.*onnxruntime-gpu\[cuda,cudnn\]"):
        serving.open_session(doubling, device="cuda", threads=1)
    assert capsys.readouterr().out == ""


def test_a_runtime_without_cuda_says_how_to_get_it(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, available=["CPUExecutionProvider"], used=["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"no CUDA support.*pip install"):
        serving.open_session(doubling, device="cuda", threads=1)


def test_a_session_on_the_card_is_accepted(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, available=["CUDAExecutionProvider"], used=["CUDAExecutionProvider"])
    session = serving.open_session(doubling, device="cuda", threads=1)
    assert session.get_providers() == ["CUDAExecutionProvider"]
