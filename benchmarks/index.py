"""The list of results, one row a file: what is claimed, how it was made, and where; `python -m benchmarks.index`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from benchmarks import claims
from benchmarks.common.environment import ROOT
from benchmarks.common.result_file import RESULTS
from fxprune.errors import OptionError
from fxprune.files import write_text_atomic

__all__ = ["PAGE", "main", "page"]

PAGE = ROOT / "benchmarks" / "README.md"
OPENING = """# Benchmarks

Made by `python -m benchmarks.index`; a test compares it with what that would write.

- `claims/`: one script for each claim, run as `python -m benchmarks.claims.NAME`;
- `common/`: what the scripts share: networks, data, result files, options;
- `judges/`: what the results are held to: hooks on the original network, the published losses, other people's networks;
- `models/`: the networks that are measured, under the names of their published weights;
- `results/`: a JSON file for each result, written by a script only;
- `figures.txt`: which figure of which document comes from which file; `python -m benchmarks.figures` compares them.

Every commit is clean: a test refuses results that were made with changes beside them. The losses of the published
procedure, hours of fitting, may be taken over from an earlier result; an entry `reference taken from/FILE` then names
its commit and machine.

"""


def page(folder: Path = RESULTS) -> str:
    """Writes the page for the result files of a folder.

    Raises:
        OptionError: A file is nobody's result.
    """
    claimed = {name: _claim(name) for _, name, _ in iter_modules(claims.__path__)}
    head = ("claim", "script", "command", "result", "commit", "machine", "date")
    rows = [head, ("---",) * len(head)]
    for file in sorted(folder.glob("*.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        made_by = re.search(r"benchmarks\.claims\.(\w+)", result.get("command", ""))
        like = [name for name in claimed if file.stem.startswith(name)]  # before results held their command
        script = made_by.group(1) if made_by else max(like, key=len, default="")
        if script not in claimed:
            raise OptionError(
                f"no script of benchmarks/claims made {file.name}: remove it, or run its script again"
            )
        rows.append(_row(file, result, script, claimed[script]))
    return OPENING + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _claim(script: str) -> str:
    lines = (import_module(f"{claims.__name__}.{script}").__doc__ or "").splitlines()
    return lines[0].rstrip(".")


def _row(file: Path, result: Mapping[str, Any], script: str, claim: str) -> tuple[str, ...]:
    environment = result["environment"]
    commits = {origin["commit"] or "unknown" for origin in result.get("origins", {}).values()}
    machine = environment["machine"]
    return (
        claim,
        f"[{script}](claims/{script}.py)",
        f"`{result['command']}`" if result.get("command") else "not noted then",
        f"[{file.name}](results/{file.name})",
        ", ".join(sorted(commits) or [environment["commit"] or "unknown"]),
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores",
        environment["date"][:10],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `benchmarks/README.md`."""
    write_text_atomic(PAGE, page())


if __name__ == "__main__":
    main()
