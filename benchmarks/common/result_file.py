"""A benchmark's figures in a file, each with the commit and the hour that it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import environment
from fxprune.errors import OptionError
from fxprune.files import check_writable, write_text_atomic

__all__ = ["RESULTS", "ResultFile", "read_result"]

RESULTS = environment.ROOT / "benchmarks" / "results"
T = TypeVar("T")


class ResultFile:
    """Finished entries of a benchmark in `benchmarks/results/NAME.json`, written whole, one by one as they come.

    A rerun takes finished entries up if it has the same settings, versions and machine; else all start anew.

    Args:
        name: Of the file, without its ending.
        settings: What the entries depend on, JSON-able.
        seed: The first seed, noted in the file.
        command: That makes the file, noted in it.
        fresh: Whether to begin anew in any case.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], *, seed: int = 0, command: str = "", fresh: bool = False
    ) -> None:
        self.file = RESULTS / f"{name}.json"
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it comes back: tuples as lists
        self._head = {"command": command, "seed": seed, "settings": self.settings}
        kept = {} if fresh else self._kept()
        self.entries: dict[str, Any] = kept.get("entries", {})
        self.origins: dict[str, Any] = kept.get("origins", {})

    def _kept(self) -> dict[str, Any]:
        if not self.file.is_file():
            return {}
        kept: dict[str, Any] = json.loads(self.file.read_text())
        here = environment.describe()
        same = kept.get("settings") == self.settings and all(
            kept["environment"].get(part) == here[part] for part in ("versions", "machine")
        )
        if not same:
            print(f"{self.file.name}: kept under other settings, versions or machine, so all starts anew")
            return {}
        print(f"{self.file.name}: {len(kept['entries'])} finished entries taken up")
        return kept

    def put(self, key: str, entry: T) -> T:
        """Keeps an entry, JSON-able.

        Raises:
            ArtifactError: The file cannot be written.
        """
        now = environment.describe()
        entries = self.entries | {key: entry}
        origins = self.origins | {key: {name: now[name] for name in ("commit", "date")}}
        whole = self._head | {"environment": now, "origins": origins, "entries": entries}
        text = json.dumps(whole, indent=1) + "\n"
        write_text_atomic(check_writable(self.file.parent) / self.file.name, text)
        self.entries, self.origins = entries, origins
        return entry

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns the entry kept under a key, or makes and keeps it."""
        return self.entries[key] if key in self.entries else self.put(key, make())


def read_result(file: str | Path) -> dict[str, Any]:
    """Reads an earlier result.

    Raises:
        OptionError: The file is not one.
    """
    try:
        result = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot take figures from {file}: {error}") from error
    if not isinstance(result, dict) or "entries" not in result:
        raise OptionError(f"cannot take figures from {file}: it is no result of these benchmarks")
    return result
