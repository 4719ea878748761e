"""Runtimes: the outputs of the network, errors in words, and no silent change of device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, save

from fxprune.errors import DeviceError, MeasurementError
from fxprune.runtimes import onnxruntime, openvino
from fxprune.timing.latency import device_of


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
    session = onnxruntime.open_session(doubling, device="cpu", threads=1)
    (y,) = onnxruntime.run(session, [x if kind == "torch" else x.numpy()])
    np.testing.assert_array_equal(y, 2 * x.numpy())


def test_a_bound_call_runs_again_and_again(doubling: Path) -> None:
    call = onnxruntime.bound_call(
        onnxruntime.open_session(doubling, device="cpu", threads=1), [torch.randn(4, 3)]
    )
    for _ in range(3):
        call()


def test_threads_reach_the_session(doubling: Path) -> None:
    session = onnxruntime.open_session(doubling, device="cpu", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_inputs_that_do_not_fit_are_named(doubling: Path) -> None:
    session = onnxruntime.open_session(doubling, device="cpu", threads=1)
    with pytest.raises(MeasurementError, match="takes 1 inputs"):
        onnxruntime.run(session, [])
    with pytest.raises(MeasurementError, match="failed while running"):
        onnxruntime.run(session, [torch.randn(2, 5)])
    with pytest.raises(MeasurementError, match="failed while running"):
        onnxruntime.bound_call(session, [torch.randn(2, 5)])()


def test_a_file_that_is_no_network_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    for name in ("bad.onnx", "missing.onnx"):
        with pytest.raises(MeasurementError, match=name):
            onnxruntime.open_session(tmp_path / name, device="cpu", threads=1)


def test_an_unknown_device_is_refused(doubling: Path) -> None:
    with pytest.raises(DeviceError, match="tpu"):
        onnxruntime.open_session(doubling, device="tpu", threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_card_is_an_error(doubling: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        onnxruntime.open_session(doubling, device="cuda", threads=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_runs_where_there_is_a_card(doubling: Path) -> None:
    session = onnxruntime.open_session(doubling, device="cuda", threads=None)
    x = torch.randn(2, 3)
    np.testing.assert_array_equal(onnxruntime.run(session, [x])[0], 2 * x.numpy())
    onnxruntime.bound_call(session, [x])()


def fake_cuda(monkeypatch: pytest.MonkeyPatch, *, available: list[str], used: list[str]) -> None:
    """A machine with a card on which onnxruntime behaves as told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcurand.so.10"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *_, **told: SimpleNamespace(get_providers=lambda: used, **told)
    )


def test_a_session_that_fell_back_is_an_error_naming_the_library(
    doubling: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cuda(monkeypatch, available=["CUDAExecutionProvider"], used=["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"fell back.*libcurand.*onnxruntime-gpu\[cuda,cudnn\]"):
        onnxruntime.open_session(doubling, device="cuda", threads=1)
    assert capsys.readouterr().out == ""


def test_a_runtime_without_cuda_says_how_to_get_it(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, available=["CPUExecutionProvider"], used=["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"no CUDA support.*pip install"):
        onnxruntime.open_session(doubling, device="cuda", threads=1)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, r"TensorRT is not installed .*pip install \"tensorrt-cu13"),
        ("11.0.1", r"TensorRT 11\.0\.1 is installed"),
    ],
)
def test_tensorrt_that_onnxruntime_cannot_use_is_refused_by_name(
    doubling: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    provider = "TensorrtExecutionProvider"
    fake_cuda(monkeypatch, available=[provider], used=[provider])
    monkeypatch.setitem(sys.modules, "tensorrt", version and SimpleNamespace(__version__=version))
    with pytest.raises(DeviceError, match=words):
        onnxruntime.open_session(doubling, device="tensorrt")
    with pytest.raises(DeviceError, match=words):
        device_of("tensorrt")


def test_tensorrt_counts_only_where_it_comes_first(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, others = "TensorrtExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1.11"))
    fake_cuda(monkeypatch, available=[provider], used=[provider, *others])
    assert onnxruntime.open_session(doubling, device="tensorrt").providers == [(provider, {})]
    fake_cuda(monkeypatch, available=[provider], used=others)
    with pytest.raises(DeviceError, match=f"could not start {provider} and fell back to CUDA"):
        onnxruntime.open_session(doubling, device="tensorrt")
    fake_cuda(monkeypatch, available=others, used=others)
    with pytest.raises(DeviceError, match=f"has no CUDA support .{provider}"):
        onnxruntime.open_session(doubling, device="tensorrt")


def test_a_session_on_the_card_is_accepted(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, available=["CUDAExecutionProvider"], used=["CUDAExecutionProvider"])
    session = onnxruntime.open_session(doubling, device="cuda", threads=1)
    assert session.get_providers() == ["CUDAExecutionProvider"]
    told = {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "1"}
    assert session.providers == [("CUDAExecutionProvider", told)]
    session = onnxruntime.open_session(doubling, device="cuda-heuristic", threads=1)
    assert session.providers == [("CUDAExecutionProvider", told | {"cudnn_conv_algo_search": "HEURISTIC"})]


def test_a_session_says_where_its_nodes_run(doubling: Path) -> None:
    session = onnxruntime.open_session(doubling, device="cpu", threads=1)
    nodes = {"CPUExecutionProvider": {"Add": 1}}
    told = nodes if hasattr(session, "get_provider_graph_assignment_info") else None  # the oldest do not say
    assert onnxruntime.nodes_by_provider(session) == told
    recorded = onnxruntime.conditions(session)["nodes"]
    assert recorded == told or (told is None and "does not say" in str(recorded))
    assert onnxruntime.elsewhere(nodes, "CPUExecutionProvider") == ""


def on_the_card(monkeypatch: pytest.MonkeyPatch, **operators: list[str]) -> None:
    """A session on a card whose nodes onnxruntime has given to providers."""
    card = "CUDAExecutionProvider"
    fake_cuda(monkeypatch, available=[card], used=[card, "CPUExecutionProvider"])
    parts = [
        SimpleNamespace(
            ep_name=f"{name}ExecutionProvider",
            get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=kind) for kind in kinds],
        )
        for name, kinds in operators.items()
    ]
    fake = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda *_, **told: SimpleNamespace(
            **vars(fake(**told)), get_provider_graph_assignment_info=lambda: parts
        ),
    )


def test_nodes_that_run_elsewhere_are_told(
    doubling: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_the_card(monkeypatch, CUDA=["Conv", "Conv", "Relu"])
    onnxruntime.open_session(doubling, device="cuda", threads=1)
    assert caplog.messages == []
    on_the_card(monkeypatch, CUDA=["Conv", "Conv"], CPU=["Shape", "Gather", "Shape"])
    onnxruntime.open_session(doubling, device="cuda", threads=1)
    (message,) = caplog.messages
    assert message.endswith("3 of 5 nodes to CPUExecutionProvider (Gather, Shape)")


def test_a_session_none_of_whose_nodes_run_where_they_should_is_refused(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_card(monkeypatch, CPU=["Conv"])
    with pytest.raises(DeviceError, match=r"CUDA.* runs no node of .*m\.onnx; .* 1 of 1 nodes to CPU.*Conv"):
        onnxruntime.open_session(doubling, device="cuda", threads=1)


def test_an_onnxruntime_that_does_not_say_where_nodes_run_is_told(doubling: Path) -> None:
    silent = SimpleNamespace(
        get_providers=lambda: ["CPUExecutionProvider"],
        get_provider_options=lambda: {"CPUExecutionProvider": {}},
        get_session_options=lambda: ort.SessionOptions(),
    )
    assert onnxruntime.nodes_by_provider(silent) is None
    assert "not recorded: onnxruntime" in onnxruntime.conditions(silent)["nodes"]


@pytest.fixture
def with_openvino() -> None:
    pytest.importorskip("openvino")


@pytest.mark.usefixtures("with_openvino")
def test_openvino_answers_and_runs_again_and_again(doubling: Path) -> None:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    session = openvino.open_session(doubling, threads=1)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3)
        (y,) = openvino.run(session, [x])
        np.testing.assert_array_equal(y, 2 * x.numpy())
    call = openvino.bound_call(session, [torch.randn(4, 3)])
    for _ in range(3):
        call()
    assert cores is None or os.sched_getaffinity(0) == cores


@pytest.mark.usefixtures("with_openvino")
def test_openvino_says_what_it_was_told(doubling: Path) -> None:
    told = json.loads(json.dumps(openvino.conditions(openvino.open_session(doubling, threads=1))))
    assert told["provider"] == "CPU" and told["openvino"]
    assert told["provider_options"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert told["provider_options"]["INFERENCE_NUM_THREADS"] == 1


@pytest.mark.usefixtures("with_openvino")
def test_openvino_names_what_does_not_fit(doubling: Path, tmp_path: Path) -> None:
    session = openvino.open_session(doubling, threads=1)
    with pytest.raises(MeasurementError, match="takes 1 inputs"):
        openvino.run(session, [])
    for x in (torch.randn(2, 5), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(MeasurementError, match=r"OpenVINO failed while running the network: .*[a-z]"):
            openvino.run(session, [x])
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(MeasurementError, match=r"OpenVINO cannot load .*bad\.onnx: (?!Exception)"):
        openvino.open_session(tmp_path / "bad.onnx", threads=1)


def test_openvino_is_told_the_precision_and_the_threads(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default may be bfloat16, on processors that have it."""
    core = SimpleNamespace(compile_model=lambda *told: told)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    path, device, told = openvino.open_session(doubling, threads=3)
    assert (path, device) == (str(doubling), "CPU")
    assert (told["INFERENCE_PRECISION_HINT"], told["INFERENCE_NUM_THREADS"]) == ("f32", 3)


def test_openvino_where_it_is_missing_says_how_to_get_it(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match=r"OpenVINO is not installed .*pip install openvino"):
        openvino.open_session(doubling, threads=1)
