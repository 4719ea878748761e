"""A model repository for Triton: one folder a model, one folder a version, whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxprune.errors import OptionError, SourceError
from fxprune.files import check_writable, replacing_folder
from fxprune.serving.network import Network, Port, check_network, read_network
from fxprune.serving.triton_config import FILE, TritonSettings, config_text

__all__ = ["VERSIONS", "TritonModel", "export_triton"]

VERSIONS = {"original": "original.onnx", "compressed": "model.onnx"}
"""Networks in the folder of a compression, and their files."""

_CONFIG = "config.pbtxt"
_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TritonModel:
    """A model in a repository.

    Attributes:
        path: Its folder.
        name: Its name.
        versions: The files that versions 1, 2 and so on were copied from; the last answers requests that name none.
        inputs: What it takes.
        outputs: What it returns.
        settings: How it is run.
    """

    path: str
    name: str
    versions: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    settings: TritonSettings


def export_triton(
    sources: _Path | Sequence[_Path],
    repository: _Path,
    name: str,
    *,
    versions: Sequence[str] | None = None,
    settings: TritonSettings | None = None,
    overwrite: bool = False,
) -> TritonModel:
    """Writes a model for Triton, whose versions share their inputs and outputs.

    Args:
        sources: A folder that `compress` wrote with `out=` and `onnx=True`, or ONNX files, one a version.
        repository: The repository's folder, made if need be; other models in it stay as they are.
        name: The model's name: letters, digits and `_`, behind the first also `-` and `.`.
        versions: Of a folder: `original` and `compressed`, in this order by default.
        settings: How a server runs it.
        overwrite: Replace a model of this name.

    Raises:
        OptionError: The name will not do or is taken, or the versions differ in what they take or return.
        SourceError: A file is missing or no ONNX network, or its batch size is fixed.
        ArtifactError: The repository cannot be written.
    """
    settings = settings or TritonSettings()
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise OptionError(
            f"{name!r} cannot name a model: give letters, digits and _, and behind the first also - and ."
        )
    networks = [read_network(file) for file in _files(sources, versions)]
    first = networks[0]
    for other in networks[1:]:
        if (first.inputs, first.outputs) != (other.inputs, other.outputs):
            raise OptionError(
                f"{first.path} {first}, {other.path} {other}: versions of one model must agree. Give them equal "
                "input_names and output_names in export_onnx, or another model each"
            )
    target = check_writable(repository) / name
    _require_free(target, overwrite)
    with replacing_folder(target, replace=overwrite) as folder:
        for version, network in enumerate(networks, start=1):
            _copy(network, folder / str(version))
        (folder / _CONFIG).write_text(config_text(name, first, len(networks), settings), encoding="utf-8")
    files = tuple(os.fspath(network.path) for network in networks)
    return TritonModel(os.fspath(target), name, files, first.inputs, first.outputs, settings)


def _files(sources: _Path | Sequence[_Path], versions: Sequence[str] | None) -> list[Path]:
    given = [Path(one) for one in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    if not any(one.is_dir() for one in given):
        if versions is not None:
            raise OptionError("versions chooses from a folder; of files, the first is version 1, and so on")
        if not given:
            raise OptionError("sources is empty: give a folder or ONNX files")
        return given
    if len(given) > 1:
        raise OptionError(
            f"sources has a folder among others ({given[0]} ...): give one folder, or ONNX files"
        )
    names = tuple(VERSIONS if versions is None else versions)
    if not names or not set(names) <= VERSIONS.keys():
        raise OptionError(f"versions is {', '.join(names)!r}: choose from {', '.join(VERSIONS)}")
    files = [given[0] / VERSIONS[name] for name in names]
    for file, name in zip(files, names, strict=True):
        if not file.is_file():
            raise SourceError(
                f"{file} does not exist: compress writes it with --out (in Python with onnx=True); or leave {name} out "
                "of the versions"
            )
    return files


def _require_free(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OptionError(f"{target} exists: give another name, or ask to overwrite it")
    if target.is_symlink() or not (target / _CONFIG).is_file():
        raise OptionError(f"{target} is no model of Triton ({_CONFIG} is missing), so it is not overwritten")


def _copy(network: Network, folder: Path) -> None:
    for name in network.company:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(network.path.parent / name, folder / name)
    folder.mkdir(exist_ok=True)
    if (folder / FILE).exists():
        raise SourceError(
            f"{network.path} has weights in a file {FILE}, as the network is called: write it anew"
        )
    shutil.copyfile(network.path, folder / FILE)
    check_network(folder / FILE, network.path)
