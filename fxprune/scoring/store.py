"""Finished work on disk, so that a run that was killed goes on where it stopped and ends with the same plan.

A store holds a folder for each fingerprint: another question neither reads nor removes what this one left. Every
entry is a file of its own, named by the content of what it answers (never by a label, which other settings may give to
another region), written whole or not at all, with a checksum, and read without running any code from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fxprune.errors import ArtifactError
from fxprune.files import check_writable, remove_leftovers, write_bytes_atomic, write_json_atomic
from fxprune.graph.regions import AdaptorSite, Region, Side, every_call
from fxprune.graph.weights import bytes_of
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.fingerprint import Fingerprint, json_form

__all__ = ["ScoreStore", "content_of", "question_of"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEY = "key.json"
_DIGITS = 16
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)


def content_of(regions: Sequence[Region]) -> list[list[str]]:
    """What a set of regions is, whatever it is called and in whatever order it comes."""
    return sorted([region.entry, region.exit, region.bypass] for region in every_call(regions))


class ScoreStore:
    """Finished work of one fingerprint.

    A fingerprint that is new to the folder is told, with what differs from the last one. Under several processes, let
    one make its store before the others do.

    Args:
        folder: Of all fingerprints; created if need be.
        fingerprint: Of the present run.

    Attributes:
        folder: That of the fingerprint.

    Raises:
        ArtifactError: The folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
        self._digest = fingerprint.digest
        self.folder = check_writable(folder) / self._digest[:_DIGITS]
        for other in Path(folder).glob("*/"):
            remove_leftovers(other)
        if not self.folder.is_dir():
            _tell_what_changed(Path(folder), fingerprint)
        check_writable(self.folder)
        write_json_atomic(self.folder / _KEY, asdict(fingerprint))  # the newest key tells the last run

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("score-*.safetensors"))

    def get(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit | None:
        """The fit of a set that began at some others, maps on the CPU; None where there is none to be trusted."""
        return self._read(self._path(regions, start), content_of(regions), _parse_fit)

    def put(self, regions: Sequence[Region], fit: AdaptorFit, start: Sequence[AdaptorFit] = ()) -> None:
        """Keeps the fit of a set that began at some others; once this returns, a SIGKILL does not lose it.

        Raises:
            ArtifactError: It cannot be written, for instance because the disk is full.
        """
        tensors = {str(i): m.detach().cpu().contiguous().clone() for i, m in enumerate(fit.maps.values())}
        note = {
            "fingerprint": self._digest,
            "content": content_of(regions),
            "labels": sorted(region.label for region in regions),
            "sites": [asdict(site) for site in fit.maps],
            "checksum": _checksum(fit),
            "loss": fit.loss,
            "loss_before": fit.loss_before,
        }
        data = safetensors.torch.save(tensors, {"fxprune": json.dumps(note)})
        self._write(self._path(regions, start), data)

    def get_record(self, kind: str, content: Any) -> Any:
        """What `put_record` kept of some content; None where it is not there or cannot be trusted."""
        return self._read(self._record(kind, content), _plain(content), _parse_record)

    def put_record(self, kind: str, content: Any, value: Any) -> None:
        """Keeps anything that JSON can express.

        Args:
            kind: Of the record, a word.
            content: What it answers, as JSON can express it.
            value: The answer.

        Raises:
            ArtifactError: It cannot be written.
        """
        note = {
            "fingerprint": self._digest,
            "content": content,
            "value": value,
            "checksum": _hash([value]),
        }
        self._write(self._record(kind, content), json.dumps(note, default=json_form).encode())

    def _read(self, path: Path, content: Any, parse: Callable[[Path], tuple[Any, str, T]]) -> T | None:
        """What `parse` reads of a file after its note and its checksum; None where it cannot be trusted."""
        try:
            note, checksum, found = parse(path)
            if note["fingerprint"] != self._digest or note["content"] != content:
                why = "it belongs to another run"
            elif note["checksum"] != checksum:
                why = "it is damaged (wrong checksum)"
            else:
                return found
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            why = f"it is damaged ({error})"
        logger.warning("%s is left aside and computed again: %s", path, why)
        return None

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_bytes_atomic(path, data)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}. The {len(self)} scores finished before are kept in {self.folder}: the same call goes on "
                "from there"
            ) from error

    def _path(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> Path:
        return self.folder / f"score-{_hash(question_of(regions, start))}.safetensors"

    def _record(self, kind: str, content: Any) -> Path:
        return self.folder / f"{kind}-{_hash(content)}.json"


def _tell_what_changed(folder: Path, fingerprint: Fingerprint) -> None:
    keys = sorted(folder.glob(f"*/{_KEY}"), key=lambda path: path.stat().st_mtime)
    if not keys:
        return
    try:
        changes = fingerprint.changes(json.loads(keys[-1].read_bytes()))
    except _UNREADABLE:
        changes = ["the key of the last run, which is damaged"]
    logger.warning(
        "%s holds finished work of another run, which is left there; starting anew, because these changed: %s",
        folder,
        "; ".join(changes),
    )


def _parse_fit(path: Path) -> tuple[Any, str, AdaptorFit]:
    with safe_open(path, framework="pt", device="cpu") as file:
        note = json.loads((file.metadata() or {})["fxprune"])
        sites = [AdaptorSite(**{**site, "side": Side(site["side"])}) for site in note["sites"]]
        maps = {site: file.get_tensor(str(i)).clone() for i, site in enumerate(sites)}
    fit = AdaptorFit(maps, float(note["loss"]), float(note["loss_before"]))
    return note, _checksum(fit), fit


def _parse_record(path: Path) -> tuple[Any, str, Any]:
    note = json.loads(path.read_bytes())
    return note, _hash([note["value"]]), note["value"]


def question_of(regions: Sequence[Region], start: Sequence[AdaptorFit]) -> list[Any]:
    """What a set that begins at some fits asks, as JSON can express it."""
    return [content_of(regions), [_checksum(fit) for fit in start]]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=json_form))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=json_form, sort_keys=True).encode()).hexdigest()


def _checksum(fit: AdaptorFit) -> str:
    digest = hashlib.sha256(f"{fit.loss!r} {fit.loss_before!r}".encode())
    for site, weights in fit.maps.items():
        digest.update(f"{site} {weights.dtype}{tuple(weights.shape)}".encode())
        digest.update(bytes_of(weights))
    return digest.hexdigest()
