"""What `recipe.json` says: how a compressed network is made again, and that nothing beside it has changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import fx

from fxprune._version import __version__
from fxprune.errors import ArtifactError
from fxprune.export.naming import NAMES
from fxprune.files import write_bytes_atomic
from fxprune.options import FrontEnd
from fxprune.plan import Plan
from fxprune.records import restored

__all__ = [
    "ORIGIN",
    "RECIPE",
    "Origin",
    "PartOrigin",
    "Rebuilding",
    "read_file",
    "read_recipe",
    "write_recipe",
]

ORIGIN = "fxprune_origin"
"""Key of a compressed graph's `Origin`, or `PartOrigin`, in its `meta`."""

RECIPE = "recipe.json"

_FORMAT, _OF_PARTS = 1, 2
_SEAL = re.compile(rb'(?<=\n "sha256": ")[0-9a-f]{64}(?="\n}\n\Z)')
_BLANK = b"0" * 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a compressed network comes from.

    Attributes:
        plan: What was cut.
        front_end: How the original was captured; see `fxprune.trace`.
        submodule: Path of the part that was compressed, or of several; None where it was the whole model.
        weights: SHA-256 (hex) over the original's parameters and buffers, where that is known.
    """

    plan: Plan
    front_end: FrontEnd
    submodule: str | tuple[str, ...] | None
    weights: str | None

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the parts that were compressed; none where it was the whole model."""
        path = self.submodule
        return () if path is None else (path,) if isinstance(path, str) else path


@dataclass(frozen=True, slots=True)
class PartOrigin:
    """Where one of several parts comes from that were compressed together.

    Attributes:
        origin: Of all of them.
        path: Of this one.
    """

    origin: Origin
    path: str


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """The contents of `recipe.json`, beside the number of its format and its own checksum.

    Attributes:
        front_end: As for `Origin`.
        submodule: As for `Origin`.
        original_weights: `Origin.weights`.
        frozen: Names of the parameters that are not to be trained.
        versions: Of fxprune and torch.
        files: SHA-256 (hex) of every other file that belongs to the network, by name.
        onnx_names: Names of inputs and outputs in the ONNX file that the network was read from, None without one.
    """

    front_end: FrontEnd
    submodule: str | tuple[str, ...] | None
    original_weights: str | None
    frozen: tuple[str, ...]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    onnx_names: tuple[tuple[str, ...], tuple[str, ...]] | None = None


def write_recipe(folder: Path, network: fx.GraphModule, origin: Origin, names: Iterable[str]) -> None:
    """Writes `recipe.json`. It comes last, so that a folder that holds one is whole.

    Args:
        folder: Where the other files are.
        network: The compressed network.
        origin: Where it comes from.
        names: The other files; of these, those that exist belong to the network.

    Raises:
        ArtifactError: It cannot be written.
    """
    paths = [folder / name for name in names]
    files = {path.name: _digest(path.read_bytes()) for path in paths if path.is_file()}
    recipe = Rebuilding(
        front_end=origin.front_end,
        submodule=origin.submodule,
        original_weights=origin.weights,
        frozen=tuple(name for name, weight in network.named_parameters() if not weight.requires_grad),
        versions={"fxprune": __version__, "torch": torch.__version__},
        files=files,
        onnx_names=network.meta.get(NAMES),
    )
    written = _OF_PARTS if isinstance(origin.submodule, tuple) else _FORMAT
    data = {"format": written, **asdict(recipe), "sha256": _BLANK.decode()}
    write_bytes_atomic(folder / RECIPE, _sealed((json.dumps(data, indent=1) + "\n").encode()))


def read_recipe(folder: Path) -> Rebuilding:
    """What `write_recipe` wrote.

    Raises:
        ArtifactError: There is none, it was changed, or a newer fxprune wrote it.
    """
    path = folder / RECIPE
    if folder.is_dir() and not path.exists():
        raise ArtifactError(
            f"{folder} holds no {RECIPE}, which is written last: it was not saved there by fxprune, or not to the end. "
            "Save the network again"
        )
    text = read_file(path)
    try:
        data = json.loads(text)
        written = data["format"]
        recipe = restored(Rebuilding, data) if written in (_FORMAT, _OF_PARTS) else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}. Save the network again") from error
    if recipe is None:
        raise ArtifactError(
            f"{path} has format {written!r}, and fxprune {__version__} reads format {_FORMAT} and {_OF_PARTS}: install "
            "a newer one"
        )
    if not _SEAL.search(text) or _sealed(text) != text:
        raise ArtifactError(f"{path} was changed: its checksum is another one. Save the network again")
    return recipe


def read_file(path: Path, digest: str | None = None) -> bytes:
    """A file's bytes.

    Args:
        path: The file.
        digest: Its SHA-256 (hex), if that is known.

    Raises:
        ArtifactError: It cannot be read, or its SHA-256 is another one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    if digest not in (None, _digest(data)):
        raise ArtifactError(f"{path} was changed: {RECIPE} beside it holds the SHA-256 of another file")
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sealed(text: bytes) -> bytes:
    """A recipe with its own SHA-256 in its last line, taken while that place was blank."""
    return _SEAL.sub(_digest(_SEAL.sub(_BLANK, text)).encode(), text)
