"""Whether a `.pt2` archive may be opened: reading one can run code, so every part of it is looked at first.

torch (2.9 to 2.15) trusts such a file in five ways, and each is closed here before it is read:

1. pickled weights, constants, sample inputs are unpickled with `weights_only=False`, some as a fallback;
2. `custom_obj_*`, `opaque_obj_*` and `aotinductor/` entries hold pickles and shared libraries by design;
3. symbolic sizes pass through `sympy.sympify`, and guards through `exec`;
4. names of nodes, parameters and arguments are pasted into generated Python source;
5. operator names are resolved by walking attributes from the `torch` module.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxprune.errors import ArtifactError
from fxprune.export.messages import innermost

__all__ = ["require_compact", "require_harmless"]

_ENTRY = re.compile(
    r"\.?data/(version|serialization_id)|byteorder|archive_(format|version)|\.format_version|\.storage_alignment"
    r"|extra/.*|models/model\.json|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants|sample_inputs)/model\.pt"
)
_PICKLES = re.compile(r"data/(weights|constants|sample_inputs)/model\.pt")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|")
_QUALIFIED = re.compile(r"[\w.\-/: ]*")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|higher_order|quantized_decomposed)(\.(?!_*from_file|save\b|__)\w+)+"
    # of the operator module, three call or look up by name
    r"|_operator\.(?!(attrgetter|methodcaller|call)\b)[a-z]\w*|math\.[a-z]\w*|torch\.sym_\w+"
)
_NAME_KEYS: dict[str, re.Pattern[str]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names", "field_names", "user_input_name"), _IDENTIFIER),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "fqn"), _QUALIFIED),
    **dict.fromkeys(("target", "as_operator"), _OPERATOR),
}
_FUNCTION = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Mod|Abs|floor"
    r"|ceiling|sqrt|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv"
    r"|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator"
    r"|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|GreaterThan|LessThan"
    r"|StrictGreaterThan|StrictLessThan|Equality|Unequality|max|min|abs"
)
_METHODS = frozenset({"size", "stride", "storage_offset", "dim", "numel"})
_CONSTANTS = frozenset({"math.inf", "math.nan"})
# Bytes that a zip archive may take in memory for each of its own.
_GROWTH = 4
_OPERATIONS = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Tuple)
_TERMS = (ast.Name, ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)


def require_harmless(archive: bytes, path: str) -> None:
    """Refuses an archive in which opening it could run code that is not torch's own.

    Args:
        archive: The whole file; load from the same bytes, not from the file again.
        path: Where it came from, for messages.

    Raises:
        ArtifactError: The archive is damaged, a zip bomb, of an older format, or not provably harmless.
    """
    try:
        finding = next(_findings(archive), "")
    except Exception as error:  # malformed in one of countless ways, from its directory to its JSON
        raise ArtifactError(
            f"{path} is not a readable .pt2 archive ({innermost(error)}): write it again with torch.export.save"
        ) from error
    if finding:
        raise ArtifactError(
            f"{path} was refused: {finding}, and opening it could run code from the file. Give the network "
            "as FILE.py:FACTORY with its weights as .safetensors, or export it again without custom objects"
        )


def require_compact(data: bytes) -> None:
    """Refuses, with an `ArtifactError`, a zip archive of several times its size; torch's are not compressed."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _GROWTH * len(data):
            raise ArtifactError(f"a zip bomb: {len(data)} bytes unpack to {size}")


def _findings(archive: bytes) -> Iterator[str]:
    """What is not provably harmless, in words; lazily, the first is enough. Damage raises whatever it leads to."""
    require_compact(archive)
    with zipfile.ZipFile(io.BytesIO(archive)) as directory:
        checksums = {entry.filename.partition("/")[2]: entry.CRC for entry in directory.infolist()}
    # The reader that torch uses, so that both see the same entries; it checks no checksums.
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
    read: Callable[[str], bytes] = reader.get_record
    entries: list[str] = reader.get_all_records()
    for entry in entries:
        if zlib.crc32(read(entry)) != checksums[entry]:
            raise ArtifactError(f"the entry {entry!r} is damaged")
    if "models/model.json" not in entries:
        raise ArtifactError("it is no exported network of torch 2.8 or newer")
    for entry in entries:
        if not _ENTRY.fullmatch(entry):
            yield f"it holds the entry {entry!r}"
        if _PICKLES.fullmatch(entry) and (reason := _pickle_reason(read(entry))):
            yield f"the pickle {entry!r} is unsafe ({reason})"
        if entry.endswith("_config.json"):
            yield from _payload_findings(entry, read)
    for key, value in _within(json.loads(read("models/model.json"))):
        if key in ("as_custom_obj", "custom_obj_values") and value:
            yield "its graph uses a custom object"
        elif isinstance(value, str):
            yield from _string_findings(value, key)


def _payload_findings(config: str, read: Callable[[str], bytes]) -> Iterator[str]:
    """Entries of a weights or constants table that would be unpickled, or lie elsewhere."""
    folder = config.rpartition("/")[0]
    for name, payload in json.loads(read(config))["config"].items():
        if not _QUALIFIED.fullmatch(name) or not _PAYLOAD.fullmatch(payload["path_name"]):
            yield f"{name!r} of {config!r} points to {payload['path_name']!r}"
        elif payload["use_pickle"] and (reason := _pickle_reason(read(f"{folder}/{payload['path_name']}"))):
            yield f"the pickled tensor {name!r} is unsafe ({reason})"


def _pickle_reason(data: bytes) -> str:
    """Why a pickle needs more than tensors, or nothing if it does not."""
    if not data:
        return ""
    try:
        require_compact(data)
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever goes wrong, torch would go on to unpickle everything
        return innermost(error.__context__ or error)  # torch hides the cause behind its advice
    return ""


def _within(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values that a JSON value holds, and itself, each with the key that leads to it."""
    yield key, value
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _within(inner, inner_key)
    elif isinstance(value, list):
        for inner in value:
            yield from _within(inner, key)


def _string_findings(text: str, key: str) -> Iterator[str]:
    """What a string of the graph that becomes code, or is looked up, would do."""
    if (pattern := _NAME_KEYS.get(key)) and not pattern.fullmatch(text):
        yield f"the {key} {text!r} is not a plain name"
    if key in ("expr_str", "guards_code") and not all(
        map(_plain_node, ast.walk(ast.parse(text, mode="eval")))
    ):
        yield f"the {key} {text!r} is not plain arithmetic"
    if key in ("in_spec", "out_spec") and not _plain_structure(text):
        yield f"the {key} {text[:80]!r} names something to import"


def _plain_node(node: ast.AST) -> bool:
    """Whether a part of an expression is arithmetic over sizes: known functions, names and numbers, nothing else."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or _IDENTIFIER.fullmatch(node.value) is not None
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and _FUNCTION.fullmatch(node.func.id) is not None
        return named or isinstance(node.func, ast.Attribute)
    if isinstance(node, ast.Attribute):
        return node.attr in _METHODS or ast.unparse(node) in _CONSTANTS
    return isinstance(node, _OPERATIONS + _TERMS) and not (isinstance(node, ast.Name) and "__" in node.id)


def _plain_structure(text: str) -> bool:
    """Whether a container description holds names only; enumerations and default factories import modules."""
    for key, value in _within(json.loads(text)):
        if key in ("__enum__", "default_factory_module"):
            return False
        if isinstance(value, str) and not (
            _plain_structure(value) if key == "context" else _QUALIFIED.fullmatch(value)
        ):
            return False
    return True
