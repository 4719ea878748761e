"""ONNX files as networks: what onnxruntime computes is what the graph computes, and what cannot be read is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxprune
from fxprune.errors import OptionError, SourceError
from fxprune.reading import read
from tests.tiny import BLOCKS, images, tiny

Weights = dict[str, np.ndarray[Any, Any]]


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: Weights,
    *,
    shape: tuple[object, ...] = ("batch", 4, 6, 6),
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
) -> Path:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", values, made, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, dtype=np.int64)


def one(kind: str, weights: Weights | None = None, **attributes: Any) -> tuple[list[onnx.NodeProto], Weights]:
    weights = weights or {}
    return [helper.make_node(kind, ["x", *weights], ["y"], name="node", **attributes)], weights


def by_coordinates(last: str, *more: str, **attributes: Any) -> tuple[list[onnx.NodeProto], Weights]:
    """The batch comes last, for indices begin with the first dimension."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 2, 3, 0]),
        helper.make_node("GatherND", ["t", "from"], ["u"]),
        helper.make_node(last, [*more, "u"], ["y"], **attributes),
    ]
    return nodes, {"from": whole(0, 3, 2, 1).reshape(2, 2), "to": whole(2, 1, 2, 1).reshape(2, 2)}


OPERATORS: dict[str, tuple[list[onnx.NodeProto], Weights]] = {
    "conv": one("Conv", {"a.weight": noise(8, 2, 3, 3), "a.bias": noise(8)}, group=2, pads=[1, 1, 1, 1]),
    "conv, uneven pads": one("Conv", {"w": noise(8, 4, 3, 3)}, pads=[0, 1, 2, 1], strides=[2, 2]),
    "conv, same": one("Conv", {"w": noise(8, 4, 3, 3)}, auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv transpose": one("ConvTranspose", {"w": noise(4, 5, 3, 3)}, strides=[2, 2], pads=[0, 1, 1, 1]),
    "average": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], ceil_mode=1),
    "average, padding counted": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "max": one("MaxPool", kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2]),
    "pad, negative": one("Pad", {"p": whole(0, 0, -1, 1, 0, 0, 2, -1)}),
    "relu6": one("Clip", {"low": np.float32(0).reshape(()), "high": np.float32(6).reshape(())}),
    "hard sigmoid": one("HardSigmoid", alpha=1 / 6, beta=0.5),
    "leaky": one("LeakyRelu", alpha=0.3),
    "prelu": one("PRelu", {"s": noise(4, 1, 1)}),
    "softmax": one("Softmax", axis=1),
    "layer norm": one("LayerNormalization", {"n.weight": noise(6), "n.bias": noise(6)}, axis=-1),
    "instance norm": one("InstanceNormalization", {"s": noise(4), "b": noise(4)}),
    "reduce": one("ReduceMean", axes=[2, 3], keepdims=0),
    "norm": one("ReduceL2", axes=[1], keepdims=1),
    "transpose": one("Transpose", perm=[0, 2, 3, 1]),
    "reshape": one("Reshape", {"s": whole(0, 2, -1)}),
    "slice": one("Slice", {"a": whole(1), "b": whole(2**62), "c": whole(2), "d": whole(2)}),
    "gather": one("Gather", {"i": whole(3, 0)}, axis=1),
    "expand": one("Expand", {"s": whole(1, 4, 6, 6)}),
    "depth to space": one("DepthToSpace", blocksize=2),
    "space to depth": one("SpaceToDepth", blocksize=2),
    "nearest": one("Resize", {"": noise(0), "s": np.float32([1, 1, 2, 2])}, mode="nearest",
                   coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "linear": one("Resize", {"": noise(0), "s": np.float32([1, 1, 2, 2])}, mode="linear"),
    "matmul": one("MatMul", {"w": noise(6, 5)}),
    "logic with a constant": (
        [
            helper.make_node("Greater", ["x", "zero"], ["more"]),
            helper.make_node("And", ["more", "all"], ["both"]),
            helper.make_node("Cast", ["both"], ["y"], to=TensorProto.FLOAT),
        ],
        {"zero": np.float32(0).reshape(()), "all": np.array(True)},
    ),
    "power": one("Pow", {"p": np.float32(2).reshape(())}),
    "expand to a computed shape": (
        [
            helper.make_node("Shape", ["x"], ["all"]),
            helper.make_node("Gather", ["all", "first"], ["batch"]),
            helper.make_node("Concat", ["batch", "rest"], ["sizes"], axis=0),
            helper.make_node("Shape", ["sizes"], ["rank"]),
            helper.make_node("ConstantOfShape", ["rank"], ["ones"], value=numpy_helper.from_array(whole(1))),
            helper.make_node("Mul", ["ones", "minus"], ["unknown"]),
            helper.make_node("Equal", ["sizes", "unknown"], ["kept"]),
            helper.make_node("Where", ["kept", "ones", "sizes"], ["target"]),
            helper.make_node("Expand", ["token", "target"], ["y"]),
        ],
        {"first": whole(0), "rest": whole(-1, 6), "minus": whole(-1), "token": noise(1, 2, 6)},
    ),
    "threshold": one("ThresholdedRelu", alpha=0.4),
    "log of a sum": (
        [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("ReduceLogSum", ["e"], ["y"], axes=[1])],
        {},
    ),
    "gather by coordinates": by_coordinates("Relu"),
    "scatter by coordinates": by_coordinates("ScatterND", "t", "from"),
    "add by coordinates": by_coordinates("ScatterND", "t", "to", reduction="add"),
    "scatter": one("ScatterElements", {"i": whole(0, 2, 4).reshape(1, 1, 3, 1), "u": noise(1, 1, 3, 1)}, axis=2),
    "sample": (
        [
            helper.make_node("Slice", ["x", "a", "b", "d"], ["s"]),
            helper.make_node("Transpose", ["s"], ["g"], perm=[0, 2, 3, 1]),
            helper.make_node("GridSample", ["x", "g"], ["y"], padding_mode="border"),
        ],
        {"a": whole(0), "b": whole(2), "d": whole(1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_computes_what_onnxruntime_computes(name: str, tmp_path: Path) -> None:
    nodes, weights = OPERATORS[name]
    file = write(tmp_path / "net.onnx", nodes, {key: value for key, value in weights.items() if key})
    graph = fxprune.from_onnx(file)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        x = noise(batch, 4, 6, 6)
        (wanted,) = session.run(None, {"x": x})
        torch.testing.assert_close(graph(torch.from_numpy(x)).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_attention_is_one_function(tmp_path: Path) -> None:
    nodes = [helper.make_node("Attention", ["x", "x", "x", "mask"], ["y"], scale=0.3)]
    file = write(tmp_path / "net.onnx", nodes, {"mask": noise(6, 6)}, opset=23)
    graph, x = fxprune.from_onnx(file), noise(3, 4, 6, 6)
    (wanted,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    torch.testing.assert_close(graph(torch.from_numpy(x)).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.scaled_dot_product_attention in {node.target for node in graph.graph.nodes}


def exported(path: Path, batch: object) -> Path:
    net = tiny()
    fxprune.export_onnx(net, path, images(2))
    if batch != "batch":
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = int(str(batch))
        del model.graph.value_info[:]
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = int(str(batch))
        onnx.save(model, path)
    return path


@pytest.mark.parametrize("batch", ["batch", 1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_file_is_compressed_and_written_again(batch: object, tmp_path: Path) -> None:
    graph = fxprune.from_onnx(exported(tmp_path / "net.onnx", batch))
    torch.testing.assert_close(graph(images()), tiny()(images()), rtol=1e-4, atol=1e-5)
    small = fxprune.compress(graph, images(), k=1, cost="flops", progress=False)
    assert fxprune.report(small).plan.chosen[0] in BLOCKS
    record = fxprune.export_onnx(small, tmp_path / "small.onnx")
    assert (record.inputs, record.outputs) == (("input",), ("output",))


def test_names_of_the_file_are_kept(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["scores:0"])]
    graph = fxprune.from_onnx(write(tmp_path / "net.onnx", nodes, {}, outputs=("scores:0",)))
    record = fxprune.export_onnx(graph, tmp_path / "again.onnx", torch.randn(2, 4, 6, 6))
    assert (record.inputs, record.outputs) == (("x",), ("scores:0",))


def test_a_graph_with_numbers_in_first_place_is_written_again(tmp_path: Path) -> None:
    chain = ["x", "exp", "sum", "quotient", "product", "y"]
    nodes = [helper.make_node("Exp", chain[:1], chain[1:2])]
    for kind, given, made in zip(("Add", "Div", "Mul", "Sub"), chain[1:-1], chain[2:], strict=True):
        nodes.append(helper.make_node(kind, ["two", given], [made]))
    graph = fxprune.from_onnx(write(tmp_path / "net.onnx", nodes, {"two": np.float32(2).reshape(())}))
    fxprune.export_onnx(graph, tmp_path / "again.onnx", torch.from_numpy(noise(2, 4, 6, 6)))
    x = noise(7, 4, 6, 6)
    (again,) = ort.InferenceSession(tmp_path / "again.onnx").run(None, {"x": x})
    np.testing.assert_allclose(again, 2 - 2 * (2 / (2 + np.exp(x))), rtol=1e-4, atol=1e-5)


def test_weights_that_are_called_as_an_exporter_calls_its_own_are_written_again(tmp_path: Path) -> None:
    weights = {f"val_{i}": noise(1, 4, 1, 1) for i in range(12)} | {"shape": whole(0, 4, 36)}
    chain = ["x", *(f"sum_{i}" for i in range(12))]
    nodes = [
        helper.make_node("Add", [given, f"val_{i}"], [made])
        for i, (given, made) in enumerate(pairwise(chain))
    ]
    nodes += [helper.make_node("Reshape", [chain[-1], "shape"], ["flat"])]
    nodes += [helper.make_node("ReduceMean", ["flat"], ["y"], axes=[2], keepdims=0)]
    graph = fxprune.from_onnx(write(tmp_path / "net.onnx", nodes, weights))
    fxprune.export_onnx(graph, tmp_path / "again.onnx", torch.from_numpy(noise(2, 4, 6, 6)))
    x = noise(7, 4, 6, 6)
    outputs = [
        ort.InferenceSession(tmp_path / name).run(None, {"x": x})[0] for name in ("net.onnx", "again.onnx")
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_torch_logs_no_traceback_of_what_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    sizes = ("batch", 4, "height", "width")
    with pytest.raises(SourceError, match="Add"):
        fxprune.from_onnx(write(tmp_path / "net.onnx", *one("Add", {"w": noise(6, 6)}), shape=sizes))
    assert not caplog.records
    log.error("of another's tensors", exc_info=ValueError("theirs"))
    assert [record.message for record in caplog.records if record.name == log.name] == [
        "of another's tensors"
    ]


def test_a_wrong_reading_is_seen_in_small_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Mul", ["a", "small"], ["y"])]
    file = write(tmp_path / "net.onnx", nodes, {"small": np.float32(2e-4).reshape(())})
    fxprune.from_onnx(file)
    monkeypatch.setitem(read._READERS, "Abs", lambda b, op: op.need(0))
    with pytest.raises(SourceError, match="y is off by"):
        fxprune.from_onnx(file)


def test_a_file_that_leaves_free_what_it_cannot_change_is_read_for_the_size_that_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(
        tmp_path / "net.onnx", *one("Add", {"w": noise(6, 6)}), shape=("batch", 4, "height", "width")
    )
    with pytest.raises(SourceError, match="Add"):
        fxprune.from_onnx(file)
    graph = fxprune.from_onnx(file, input_shapes=[(1, 4, 6, 6)])
    assert graph(torch.ones(5, 4, 6, 6)).shape == (5, 4, 6, 6)
    assert "takes (4, 6, 6) alone" in caplog.text


def test_sizes_that_the_file_itself_cannot_take_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = ("batch", 4, "height", "width")
    file = write(tmp_path / "net.onnx", *one("Add", {"w": noise(6, 6)}), shape=shape)
    with pytest.raises(SourceError, match=r"inputs of \(2, 4, 5, 5\).* give input_shapes that it takes"):
        fxprune.from_onnx(file, input_shapes=[(1, 4, 5, 5)])
    assert capfd.readouterr() == ("", "")


def test_everything_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Hardmax", ["x"], ["a"], name="first"),
        helper.make_node("Hardmax", ["a"], ["b"], name="second"),
        helper.make_node("Shrink", ["x"], ["c"], name="third"),
        helper.make_node("Add", ["b", "c"], ["y"], name="last"),
    ]
    with pytest.raises(
        SourceError, match=r"Hardmax .* 2 of them, the first is first.*Shrink .* 1 of them"
    ) as caught:
        fxprune.from_onnx(write(tmp_path / "net.onnx", nodes, {}))
    assert set(caught.value.nodes) == {"first", "second", "third"}


def evil_location(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")


def evil_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**20, 2**11]


@pytest.mark.parametrize(
    ("spoil", "words"), [(evil_location, "outside the file's own folder"), (evil_size, "asks for 8589934592")]
)
def test_a_hostile_file_is_refused(
    spoil: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "net.onnx", *one("MatMul", {"w": noise(6, 5)}))
    (tmp_path.parent / "secret").write_bytes(bytes(120))
    model = onnx.load(file)
    spoil(model)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match=words):
        fxprune.from_onnx(file)


@pytest.mark.parametrize(
    ("kind", "words"), [("DequantizeLinear", "is quantised"), ("SequenceConstruct", "lists of tensors")]
)
def test_files_of_other_kinds_are_refused_in_words(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=words):
        fxprune.from_onnx(write(tmp_path / "net.onnx", *one(kind)))


def test_names_never_become_code(tmp_path: Path) -> None:
    name = '");import os;os._exit(3);("'
    nodes = [
        helper.make_node("Conv", ["x", f"{name}.weight"], ["a"], name=name),
        helper.make_node("Add", ["a", name], ["y"], name=f"{name}+"),
    ]
    weights = {f"{name}.weight": noise(4, 4, 1, 1), name: noise(4, 1, 1)}
    graph = fxprune.from_onnx(write(tmp_path / "net.onnx", nodes, weights))
    assert "os._exit(" not in graph.code


@pytest.mark.parametrize("first", [True, False])
def test_a_constant_may_be_called_as_a_module_is(first: bool, tmp_path: Path) -> None:
    add = helper.make_node("Add", ["x" if first else "a", "conv"], ["s" if first else "y"], name="add")
    conv = helper.make_node(
        "Conv", ["s" if first else "x", "conv.weight"], ["y" if first else "a"], name="conv"
    )
    weights = {"conv.weight": noise(4, 4, 1, 1), "conv": noise(4, 1, 1)}
    file = write(tmp_path / "net.onnx", [add, conv] if first else [conv, add], weights)
    assert sum(node.op == "call_module" for node in fxprune.from_onnx(file).graph.nodes) == 1


def test_weights_may_lie_inside_what_is_called_by_the_path_above_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "attention.weight"], ["a"]),
        helper.make_node("Conv", ["a", "attention.out.weight"], ["y"]),
    ]
    weights = {name: noise(4, 4, 1, 1) for name in ("attention.weight", "attention.out.weight")}
    graph = fxprune.from_onnx(write(tmp_path / "net.onnx", nodes, weights))
    assert set(graph.state_dict()) == {"attention.weight", "attention_out.weight"}


def test_a_free_width_of_something_else_than_images_has_to_be_given(tmp_path: Path) -> None:
    file = write(tmp_path / "net.onnx", *one("Relu"), shape=("batch", 4, "length"))
    with pytest.raises(OptionError, match="give input_shapes"):
        fxprune.from_onnx(file)
    assert fxprune.from_onnx(file, input_shapes=[(1, 4, 9)])(torch.ones(3, 4, 5)).shape == (3, 4, 5)
