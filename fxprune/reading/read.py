"""From an ONNX file to an FX graph that computes what onnxruntime computes from it."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import onnx
from torch import fx

from fxprune.building.agreement import Trials, answers, compare, open_file, trials_of
from fxprune.building.builder import Builder, Operation, UnreadableError, Value
from fxprune.building.file import OnnxFile, attributes_of, load, unreadable
from fxprune.building.names import path_of, plain_path, scope_of
from fxprune.errors import SourceError
from fxprune.export.messages import innermost
from fxprune.export.naming import NAMES
from fxprune.moving.indexing import INDEXING
from fxprune.moving.layout import LAYOUT
from fxprune.moving.sizes import sizes_reader
from fxprune.reading.functions import FUNCTIONS
from fxprune.reading.layers import LAYERS

__all__ = ["from_onnx"]

logger = logging.getLogger(__name__)

_READERS = {**LAYERS, **FUNCTIONS, **LAYOUT, **INDEXING}
_NO_READING = "not known here"


def from_onnx(path: str | os.PathLike[str], *, input_shapes: Sequence[Sequence[int]] = ()) -> fx.GraphModule:
    """Reads an ONNX file as a graph of torch's own modules and functions, to be compressed like any other network.

    Modules stand where the file's names say. A file for one batch size is read for any, if it computes the same for
    each image. The graph is compared with the file in onnxruntime before it is returned.

    Args:
        path: A network in floating point, with its weights in it or beside it.
        input_shapes: A shape for each input, batch first, with which to try it. By default height and width are 224
            where the file leaves them free. Of a file that computes for one size only, the graph takes this one.

    Returns:
        A graph module in evaluation mode, which returns a tensor, or a tuple of several. `fxprune.export_onnx` gives
        its inputs and outputs the names that they have in the file.

    Raises:
        SourceError: The file is missing, damaged, quantised, holds operators that have no reading here (all of them are
            named), or takes one batch size only.
        OptionError: `input_shapes` does not fit the file.
    """
    file = load(path)
    shapes = trials_of(file, input_shapes)
    session = open_file(file)
    try:
        gm = _graph(file, shapes)
    except SourceError:
        # sizes that the file itself cannot take are the plainer reason
        answers(session, file, shapes, shapes.first[0][0])
        fixed = trials_of(file, input_shapes, fixed=True)
        if not input_shapes or fixed == shapes:
            raise
        gm = _graph(file, fixed)
        sizes = ", ".join(str(tuple(shape[1:])) for shape in fixed.first)
        logger.warning(
            "%s leaves sizes free that it cannot change; its graph takes %s alone", file.path, sizes
        )
    compare(gm, session, file, shapes)
    if shapes.batch is not None:
        logger.warning(
            "%s is written for batches of %d; its graph takes any, and computes the same for each image",
            file.path,
            shapes.batch,
        )
    names = tuple(entry.name for entry in file.inputs), file.outputs
    gm.meta[NAMES] = names
    return gm


def _graph(file: OnnxFile, shapes: Trials) -> fx.GraphModule:
    b = Builder(shapes.batch)
    values: dict[str, Value | None] = {"": None}
    for entry, *both in zip(file.inputs, shapes.first, shapes.second, strict=True):
        values[entry.name] = b.placeholder(entry.name, both, entry.dtype)
    for name, tensor in file.tensors.items():
        values[name] = b.name(tensor, plain_path([name.replace("/", ".").replace(":", ".")]))
    uses = Counter([*(name for node in file.nodes for name in node.input), *file.outputs])
    failures: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for node in file.nodes:
        known = all(name in values for name in node.input)
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        reason = "" if kind in _READERS else _NO_READING
        if known and not reason:
            try:
                values.update(_read(b, node, values, uses, file))
            except (UnreadableError, KeyError) as error:
                reason = str(error) if isinstance(error, UnreadableError) else f"it lacks {error}"
            except Exception as error:  # torch may refuse what an operator asks for in countless ways
                reason = innermost(error)
        if reason:
            failures[kind, reason].append(node.name or node.output[0])
    if failures:
        raise _unread(file, failures)
    outputs = {name: value for name in file.outputs if (value := values.get(name)) is not None}
    missing = [name for name in file.outputs if name not in outputs]
    if missing:
        raise unreadable(file.path, f"nothing computes its outputs {', '.join(missing)}")
    return b.finish([outputs[name] for name in file.outputs], "OnnxGraph")


def _read(
    b: Builder,
    node: onnx.NodeProto,
    values: Mapping[str, Value | None],
    uses: Mapping[str, int],
    file: OnnxFile,
) -> dict[str, Value]:
    """The values that an operator yields, by name."""
    b.scope = scope_of(node)
    attributes = attributes_of(node, file.path)
    op = Operation(
        kind=node.op_type,
        attributes=attributes,
        inputs=tuple(values[name] for name in node.input),
        outputs=len(node.output),
        opset=file.opset,
        path=path_of(node),
        key=(node.op_type, *node.input[1:], repr(sorted(attributes.items()))),
        alone=tuple(uses[name] == 1 for name in node.input),
    )
    read = sizes_reader(op) or _READERS[op.kind]
    made = read(b, op)
    return dict(zip(node.output, made if isinstance(made, list) else [made], strict=False))


def _unread(file: OnnxFile, failures: Mapping[tuple[str, str], Sequence[str]]) -> SourceError:
    lines = [
        f"{kind} ({reason}), {len(names)} of them, the first is {names[0]}"
        for (kind, reason), names in sorted(failures.items())
    ]
    advice = (
        "Export the network again without them, or give the file as it was before a runtime optimised it"
        if any(reason == _NO_READING for _, reason in failures)
        else "Export the network again, with a free batch dimension, so that they are not needed"
    )
    named = [name for names in failures.values() for name in names]
    return unreadable(file.path, f"these operators stand in the way: {'; '.join(lines)}. {advice}", named)
