"""An ONNX file as it comes from a stranger: parsed, never run; what cannot be a network to compress is refused."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from onnx.inliner import inline_local_functions
from torch import Tensor

from fxprune.errors import SourceError

__all__ = ["TYPES", "FileInput", "OnnxFile", "attributes_of", "inputs_of", "load", "parse", "unreadable"]

_MOST_BYTES = 2**31 - 1
"""Protobuf, in which ONNX files are written, ends there."""
TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16, TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8,
    TensorProto.INT16: torch.int16, TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}  # fmt: skip
_OLDEST_OPSET = 7  # the first whose arithmetic broadcasts as torch's does
_QUANTISED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_CONTROL = frozenset({"If", "Loop", "Scan"})


@dataclass(frozen=True, slots=True)
class FileInput:
    """An input of an ONNX file.

    Attributes:
        name: Its name.
        shape: Its sizes, None where one is free.
        dtype: The type of its values.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What an ONNX file holds.

    Attributes:
        path: Where it lies.
        opset: Version of the default operator set.
        inputs: Its inputs.
        outputs: Names of its outputs.
        nodes: Its operators, in the order in which they run.
        tensors: Its weights and other stored values, by name.
    """

    path: str
    opset: int
    inputs: tuple[FileInput, ...]
    outputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]
    tensors: dict[str, Tensor]


def parse(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The file's description of a network, without values that lie in other files.

    Raises:
        SourceError: It is missing, too large, or no ONNX network.
    """
    file = Path(path)
    if not file.is_file():
        raise SourceError(f"The file {path} does not exist.")
    if file.stat().st_size > _MOST_BYTES:
        raise SourceError(f"{path} cannot be read as ONNX: no such file is larger than {_MOST_BYTES} bytes.")
    try:
        model = onnx.load_model_from_string(file.read_bytes())
    except Exception as error:  # protobuf's own error type is not public
        raise SourceError(f"{path} cannot be read as ONNX: {error}") from error
    if not inputs_of(model, path):
        raise SourceError(f"{path} has no input: it is not an ONNX network.")
    return model


def inputs_of(model: onnx.ModelProto, path: str | os.PathLike[str]) -> tuple[FileInput, ...]:
    """The inputs, less those that only name weights.

    Raises:
        SourceError: One is no tensor of numbers.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found = []
    for entry in model.graph.input:
        if entry.name in weights:
            continue
        kind = entry.type.tensor_type
        # a free dimension has a name or nothing; dim_value then reads 0
        shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
        found.append(FileInput(entry.name, shape, _type(kind.elem_type, f"Input {entry.name} of {path}")))
    return tuple(found)


def load(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads a file and the weights beside it.

    Raises:
        SourceError: It cannot be read, names files outside its folder, or is no network in floating point without
            control flow; the message says what to do.
    """
    model = parse(path)
    if model.functions:
        model = inline_local_functions(model)
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < _OLDEST_OPSET:
        raise unreadable(
            path,
            f"its operator set {opset} is older than {_OLDEST_OPSET}: convert it with onnx.version_converter",
        )
    _require_plain(graph, path)
    folder = Path(path).resolve().parent
    tensors = {entry.name: _values(entry, folder, path) for entry in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            tensors[node.output[0]] = _constant(node, folder, path)
    nodes = tuple(node for node in graph.node if node.op_type != "Constant")
    outputs = tuple(entry.name for entry in graph.output)
    return OnnxFile(os.fspath(path), opset, inputs_of(model, path), outputs, nodes, tensors)


def attributes_of(node: onnx.NodeProto, path: str | os.PathLike[str]) -> dict[str, Any]:
    """An operator's attributes: numbers, text, lists, tensors."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, TensorProto):
            value = _values(value, Path(path).resolve().parent, path)
        found[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found


def unreadable(path: str | os.PathLike[str], reason: str, nodes: Iterable[str] = ()) -> SourceError:
    """The error for a file that is ONNX, and cannot be read as a graph."""
    return SourceError(f"{os.fspath(path)} cannot be read as a graph: {reason}", nodes=nodes)


def _require_plain(graph: onnx.GraphProto, path: str | os.PathLike[str]) -> None:
    kinds: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        name = node.op_type
        if name in _QUANTISED or name.startswith("QLinear") or name.endswith("Integer"):
            kinds["is quantised; give the file in floating point that it was made from"].append(node)
        elif name in _CONTROL:
            what = "branches or loops; export the network again, so that nothing depends on values or sizes"
            kinds[what].append(node)
        elif name.startswith("Sequence") or name in ("ConcatFromSequence", "SplitToSequence"):
            kinds["holds lists of tensors; export the network again without them"].append(node)
    if graph.sparse_initializer:
        kinds["holds sparse weights; write them as dense ones"].extend([])
    if kinds:
        reasons = [f"it {what}{_counted(nodes)}" for what, nodes in kinds.items()]
        raise unreadable(path, ". Also, ".join(reasons), [n.name for nodes in kinds.values() for n in nodes])


def _counted(nodes: Iterable[onnx.NodeProto]) -> str:
    counts = Counter(node.op_type for node in nodes)
    return f" ({', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))})" if counts else ""


def _type(number: int, what: str) -> torch.dtype:
    if number not in TYPES:
        kind = TensorProto.DataType.Name(number) if number in TensorProto.DataType.values() else number
        raise SourceError(f"{what} holds values of type {kind}, which no network can be compressed with.")
    return TYPES[number]


def _constant(node: onnx.NodeProto, folder: Path, path: str | os.PathLike[str]) -> Tensor:
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return _values(value, folder, path)
    if attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.int64 if "int" in attribute.name else torch.float32)
    raise unreadable(path, f"the constant {node.output[0]} is no tensor of numbers", [node.name])


def _values(proto: TensorProto, folder: Path, path: str | os.PathLike[str]) -> Tensor:
    what = f"The tensor {proto.name or 'of a constant'} of {path}"
    dtype, shape = _type(proto.data_type, what), tuple(proto.dims)
    claimed = math.prod(shape) * dtype.itemsize if min(shape, default=0) >= 0 else -1
    external = proto.data_location == TensorProto.EXTERNAL
    if not external and not proto.HasField("raw_data"):
        return _typed(proto, dtype, what)
    data = _beside(proto, folder, claimed, what) if external else proto.raw_data
    if len(data) != claimed:
        raise SourceError(f"{what} has {len(data)} bytes, and its shape {shape} asks for {claimed}.")
    return (
        torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
        if data
        else torch.empty(shape, dtype=dtype)
    )


def _typed(proto: TensorProto, dtype: torch.dtype, what: str) -> Tensor:
    """Values that are written as numbers and not as bytes."""
    try:
        array = onnx.numpy_helper.to_array(proto)
    except Exception as error:  # as many values as the shape asks for, or any error of numpy
        raise SourceError(f"{what} is malformed: {error}") from error
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(dtype)
    return torch.from_numpy(np.array(array))


def _beside(proto: TensorProto, folder: Path, claimed: int, what: str) -> bytes:
    """Bytes of another file, which has to lie in the same folder or below it."""
    where = {entry.key: entry.value for entry in proto.external_data}
    file = (folder / where.get("location", "")).resolve()
    if not file.is_relative_to(folder):
        raise SourceError(f"{what} is said to lie in {where['location']}, outside the file's own folder.")
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", claimed))
        size = file.stat().st_size
        if min(offset, length) < 0 or offset + length > size or length != claimed:
            reason = f"{length} bytes at {offset} of {size}, and {claimed} are needed"
            raise SourceError(f"{what} cannot be read from {file.name}: {reason}")
        with file.open("rb") as source:
            source.seek(offset)
            data: bytes = source.read(length)
            return data
    except (OSError, ValueError) as error:
        raise SourceError(f"{what} cannot be read from {file.name}: {error}") from error
