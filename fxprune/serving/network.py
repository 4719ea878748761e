"""What an ONNX file takes and returns, and which files beside it hold its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import onnx
import onnx_ir as ir

from fxprune.errors import SourceError

__all__ = ["Network", "Port", "check_network", "read_network"]

# Words of the open inference protocol for what Triton's onnxruntime backend takes; bfloat16 is not among it.
_TYPES = {
    ir.DataType.BOOL: "BOOL",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.UINT16: "UINT16",
    ir.DataType.UINT32: "UINT32",
    ir.DataType.UINT64: "UINT64",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT16: "INT16",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.FLOAT: "FP32",
    ir.DataType.DOUBLE: "FP64",
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output.

    Attributes:
        name: Its name.
        datatype: Such as `FP32`.
        shape: Without the batch; -1 where a size is free.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.datatype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Network:
    """An ONNX file.

    Attributes:
        path: Where it lies.
        inputs: What it takes, in order.
        outputs: What it returns, in order.
        company: Files that hold its weights, as paths from its folder.
    """

    path: Path
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    company: tuple[str, ...]

    def __str__(self) -> str:
        return f"takes {', '.join(map(str, self.inputs))} and returns {', '.join(map(str, self.outputs))}"


def read_network(path: str | os.PathLike[str]) -> Network:
    """The network in an ONNX file, whose batch size must be free.

    Raises:
        SourceError: The file is missing or no ONNX network, its batch size is fixed, or it takes or returns what no
            server can.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"The file {path} does not exist.")
    try:
        graph = ir.load(path, format="protobuf").graph
    except Exception as error:  # protobuf's own error type is not public
        raise SourceError(f"{path} cannot be read as ONNX: {error}") from error
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    if not inputs or not graph.outputs:
        raise SourceError(f"{path} has no input or no output: it is not an ONNX network.")
    company = sorted({str(tensor.location) for tensor in _external(graph)})
    for name in company:
        if not _inside(path, PurePath(name)):
            raise SourceError(
                f"{path} has weights in {name}, outside of its folder: write it anew as one file."
            )
        if not (path.parent / name).is_file():
            raise SourceError(
                f"{path} has weights in {path.parent / name}, which does not exist: bring it along."
            )
    return Network(path, _ports(path, inputs), _ports(path, graph.outputs), tuple(company))


def _inside(path: Path, name: PurePath) -> bool:
    """Whether weights lie where the file does, as written and through links: a file may name anybody's secrets."""
    if name.is_absolute() or ".." in name.parts:
        return False
    true = (path.parent / name).resolve()
    return any(true.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent))


def check_network(path: Path, source: Path) -> None:
    """Lets onnx's checker look at a copy, and at the files beside it.

    Raises:
        SourceError: It objects.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise SourceError(f"{source} is no valid ONNX network: {error}") from error


def _ports(path: Path, values: Sequence[ir.Value]) -> tuple[Port, ...]:
    return tuple(_port(path, value) for value in values)


def _port(path: Path, value: ir.Value) -> Port:
    where = f"{value.name} of {path}"
    if not isinstance(value.type, ir.TensorType) or value.dtype not in _TYPES:
        raise SourceError(f"{where} holds {value.type or 'values of no type'}, which Triton cannot serve.")
    if value.shape is None:
        raise SourceError(f"{where} has no shape: run onnx.shape_inference on the file.")
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    if not sizes or sizes[0] != -1:
        fixed = f"is fixed to {sizes[0]}" if sizes else "is missing"
        raise SourceError(f"{where}: its batch size {fixed}; export the network with a free first dimension.")
    return Port(str(value.name), _TYPES[value.dtype], tuple(sizes[1:]))


def _external(graph: ir.Graph) -> Iterator[ir.ExternalTensor]:
    for part in (graph, *graph.subgraphs()):
        constants = (value.const_value for value in part.initializers.values())
        attributes = (one.value for node in part for one in node.attributes.values())
        yield from (tensor for tensor in (*constants, *attributes) if isinstance(tensor, ir.ExternalTensor))
