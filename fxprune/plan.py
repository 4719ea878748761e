"""Which blocks to cut, in words that hold on every graph of a network: what `plan.json` says."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxprune.errors import ArtifactError
from fxprune.records import restored

__all__ = ["Plan", "PlannedCut"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PlannedCut:
    """One block of a plan; node names, which other passes and other front ends change, are no part of it.

    Attributes:
        label: As `fxprune.discover` names the region.
        kind: Kind of the region.
        shape: Shape of its stream, the batch left out.
        modules: Paths of the operators that disappear: they tell the region where its label was lost.
    """

    label: str
    kind: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The blocks to cut from a network, found again on whichever graph of it is at hand.

    Attributes:
        cuts: In graph order.
        kinds: Kinds of region that were looked for; labels depend on them.
        inputs: The network's inputs, as `fxprune.graph.examples.describe` writes them.
    """

    cuts: tuple[PlannedCut, ...]
    kinds: tuple[str, ...]
    inputs: Any

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to `plan.json`."""
        return {"format": _FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the plan") -> Plan:
        """The plan that `to_json` wrote.

        Args:
            text: What it wrote.
            where: Where it came from, for messages.

        Raises:
            ArtifactError: It is no plan, or one of a newer fxprune.
        """
        try:
            data = json.loads(text)
            written = data["format"]
            plan = restored(cls, data) if written == _FORMAT else None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{where} is no plan, or damaged ({error}): compress with out= writes one"
            ) from error
        if plan is None:
            raise ArtifactError(
                f"{where} has format {written!r}, and this fxprune reads format {_FORMAT}: install a newer one"
            )
        return plan

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a file.

        Raises:
            ArtifactError: The file cannot be read, or holds no plan.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ArtifactError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from error
        return cls.from_json(text, os.fspath(path))
