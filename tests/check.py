"""The gate: style, types, layers and tests, all of them even if one fails; `python -m tests.check [--slow]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())"
# By way of this interpreter, so that the tools beside it run and not others on the path.
CHECKS = {
    "ruff check": ("-m", "ruff", "check", "."),
    "ruff format": ("-m", "ruff", "format", "--check", "."),
    "mypy": ("-m", "mypy"),
    "lint-imports": ("-c", LINT_IMPORTS, "--no-logo"),
    "pytest": ("-m", "pytest"),
}


def main() -> int:
    """Run every check and say which failed; 0 only if none did."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.check", description="run ruff, mypy, lint-imports and pytest"
    )
    parser.add_argument("--slow", action="store_true", help="run the tests that are marked slow too")
    # pyproject.toml leaves them out; a later -m replaces its own
    every = ("-m", "") if parser.parse_args().slow else ()
    outcomes: dict[str, tuple[int, float]] = {}
    for name, command in CHECKS.items():
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        arguments = [sys.executable, *command, *(every if name == "pytest" else ())]
        outcomes[name] = (
            subprocess.run(arguments, cwd=ROOT, check=False).returncode,
            time.perf_counter() - start,
        )
    print("== summary")
    for name, (code, seconds) in outcomes.items():
        print(f"{'ok' if code == 0 else 'FAILED':>6}  {name}  ({seconds:.0f} s)")
    return int(any(code for code, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
