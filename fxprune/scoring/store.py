"""Finished work on disk, so that a run that was killed goes on where it stopped and ends with the same plan.

A store is a folder with one file for each finished candidate. Every file is written whole or not at all, carries the
fingerprint of what it was computed from and a checksum, and is read without running any code from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxprune.errors import ArtifactError, OptionError
from fxprune.files import check_writable, write_bytes_atomic, write_json_atomic
from fxprune.graph.regions import AdaptorSite, Region, Side
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.fingerprint import Fingerprint, bytes_of, json_form

__all__ = ["ScoreStore"]

logger = logging.getLogger(__name__)

_KEY = "key.json"
_OURS = re.compile(r"(score-[0-9a-f]{64}\.safetensors|record-[\w.-]+\.json)")
_LEFTOVER = re.compile(r"\.(score-[0-9a-f]{64}|record-[\w.-]+|key)-\d+-[0-9a-f]{8}\.(safetensors|json)")
_STALE_S = 600.0
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)


class ScoreStore:
    """Finished scores of one fingerprint in one folder.

    A folder of another fingerprint starts anew, with a warning that says why; only files that a store wrote are
    removed. Under several processes, let one make its store before the others do.

    Args:
        folder: Created if need be.
        fingerprint: Of the present run.

    Raises:
        ArtifactError: The folder cannot be written, or holds another program's `key.json`.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
        self.folder = check_writable(folder)
        self._digest = fingerprint.digest
        self._remove(_LEFTOVER, older_than_s=_STALE_S)
        key = self._read_key()
        if key is not None and key != asdict(fingerprint):
            logger.warning(
                "%s holds scores of another run; starting anew, because these changed: %s",
                self.folder,
                "; ".join(fingerprint.changes(key)) or "the format of the store",
            )
            self._remove(_OURS)  # before the key is replaced: a run killed in between starts anew once more
        if key != asdict(fingerprint):
            write_json_atomic(self.folder / _KEY, asdict(fingerprint))

    def __len__(self) -> int:
        return sum(1 for path in self.folder.iterdir() if re.fullmatch(r"score-[0-9a-f]{64}\..*", path.name))

    def get(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit | None:
        """The fit of a set that began at some others, maps on the CPU; None where there is none to be trusted."""
        path = self._path(regions, start)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                note = json.loads((file.metadata() or {})["fxprune"])
                maps = {_site(s): file.get_tensor(str(i)).clone() for i, s in enumerate(note["sites"])}
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            _distrust(path, f"it is damaged ({error})")
            return None
        if note.get("fingerprint") != self._digest or note.get("labels") != _labels(regions):
            _distrust(path, "it belongs to another run")
        elif note.get("checksum") != _checksum(maps.values()):
            _distrust(path, "it is damaged (wrong checksum)")
        else:
            return AdaptorFit(maps, float(note["loss"]), float(note["loss_before"]))
        return None

    def put(self, regions: Sequence[Region], fit: AdaptorFit, start: Sequence[AdaptorFit] = ()) -> None:
        """Keeps the fit of a set that began at some others; once this returns, a SIGKILL does not lose it.

        Raises:
            ArtifactError: It cannot be written, for instance because the disk is full.
        """
        maps = [m.detach().cpu().contiguous().clone() for m in fit.maps.values()]
        note = {
            "fingerprint": self._digest,
            "labels": _labels(regions),
            "sites": [asdict(site) for site in fit.maps],
            "checksum": _checksum(maps),
            "loss": fit.loss,
            "loss_before": fit.loss_before,
        }
        tensors = {str(i): m for i, m in enumerate(maps)}
        self._write(
            self._path(regions, start), safetensors.torch.save(tensors, {"fxprune": json.dumps(note)})
        )

    def get_record(self, name: str) -> Any:
        """What `put_record` kept under a name; None where it is not there or cannot be trusted."""
        path = self._record(name)
        try:
            note = json.loads(path.read_bytes())
            if note["fingerprint"] == self._digest:
                return note["value"]
            _distrust(path, "it belongs to another run")
        except FileNotFoundError:
            pass
        except _UNREADABLE as error:
            _distrust(path, f"it is damaged ({error})")
        return None

    def put_record(self, name: str, obj: Any) -> None:
        """Keeps anything that JSON can express.

        Raises:
            ArtifactError: It cannot be written.
            OptionError: The name holds something else than letters, digits, `_`, `.` and `-`.
        """
        note = {"fingerprint": self._digest, "value": obj}
        self._write(self._record(name), json.dumps(note, default=json_form).encode())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_bytes_atomic(path, data)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}. The {len(self)} scores finished before are kept in {self.folder}: the same call goes on "
                "from there"
            ) from error

    def _path(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> Path:
        return self.folder / f"score-{_hash(regions, start)}.safetensors"

    def _record(self, name: str) -> Path:
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise OptionError(f"a record cannot be named {name!r}: use letters, digits, '_', '.' and '-'")
        return self.folder / f"record-{name}.json"

    def _read_key(self) -> dict[str, Any] | None:
        path = self.folder / _KEY
        try:
            key = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            # no reason to lose scores: each carries its own fingerprint
            logger.warning("%s is damaged (%s) and is written again", path, error)
            return None
        if not isinstance(key, dict) or not {"graph", "weights", "images"} <= key.keys():
            raise ArtifactError(f"{path} is not fxprune's, so the folder is left alone: name another folder")
        return key

    def _remove(self, names: re.Pattern[str], older_than_s: float = -math.inf) -> None:
        try:
            for path in self.folder.iterdir():
                if names.fullmatch(path.name) and _age(path) >= older_than_s:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{self.folder} cannot be cleared: {error.strerror or error}. Name another folder"
            ) from error


def _distrust(path: Path, why: str) -> None:
    logger.warning("%s is left aside and computed again: %s", path, why)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # another process of this run removed it
        return 0.0


def _labels(regions: Sequence[Region]) -> list[str]:
    return sorted(region.label for region in regions)


def _hash(regions: Sequence[Region], start: Sequence[AdaptorFit]) -> str:
    begun = [_checksum(fit.maps.values()) for fit in start]
    return hashlib.sha256(json.dumps([_labels(regions), begun]).encode()).hexdigest()


def _site(fields: Mapping[str, Any]) -> AdaptorSite:
    return AdaptorSite(**{**fields, "side": Side(fields["side"])})


def _checksum(maps: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for weights in maps:
        digest.update(f"{weights.dtype}{tuple(weights.shape)}".encode())
        digest.update(bytes_of(weights))
    return digest.hexdigest()
