"""The gate: style, types, layers and tests, all of them even if one fails.

`python -m tests.check`, and on demand the slow tests (`--slow`), the laws on examples drawn anew (`--thorough`), the
tests with the lowest supported versions (`--lowest`) and with the built wheel (`--wheel`). Tests run in a process
for each core, those of a file in one.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fxprune.processes.threads import default_threads
from tests.environments import ISOLATED, ROOT, with_lowest, with_wheel
from tests.laws import THOROUGH

__all__ = ["main"]

LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())"
# By way of this interpreter, so that the tools beside it run and not others on the path.
CHECKS = {
    "ruff check": ("-m", "ruff", "check", "."),
    "ruff format": ("-m", "ruff", "format", "--check", "."),
    "mypy": ("-m", "mypy"),
    "lint-imports": ("-c", LINT_IMPORTS, "--no-logo"),
}
MOST_PROCESSES = 8  # each takes gigabytes of memory
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main() -> int:
    """Run every check and say which failed; 0 only if none did."""
    given = _parser().parse_args()
    outcomes: dict[str, tuple[bool, float]] = {}
    for name, check in _checks(given).items():
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            passed = check() == 0
        except subprocess.CalledProcessError as error:  # an environment could not be made
            print(error)
            passed = False
        outcomes[name] = passed, time.perf_counter() - start
    print("== summary")
    for name, (passed, seconds) in outcomes.items():
        print(f"{'ok' if passed else 'FAILED':>6}  {name}  ({seconds:.0f} s)")
    return int(not all(passed for passed, _ in outcomes.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.check", description="run ruff, mypy, lint-imports and pytest"
    )
    parser.add_argument("--slow", action="store_true", help="run the tests that are marked slow too")
    parser.add_argument(
        "--thorough", action="store_true", help="also try the laws on many examples drawn anew"
    )
    parser.add_argument("--lowest", action="store_true", help="also test the lowest supported versions")
    parser.add_argument("--wheel", action="store_true", help="also test the wheel as it is installed")
    parser.add_argument(
        "--environment", type=Path, metavar="DIR", help="keep the environments of --lowest and --wheel here"
    )
    return parser


def _checks(given: argparse.Namespace) -> dict[str, Callable[[], int]]:
    # pyproject.toml leaves the slow ones out; a later -m replaces its own
    spread = ("-n", str(min(default_threads(), MOST_PROCESSES)), "--dist", "loadfile")
    tests = ("-m", "pytest", *spread, *(("-m", "") if given.slow else ()))

    def installed(make: Callable[[Path], tuple[Path, Path]], name: str) -> int:
        with tempfile.TemporaryDirectory() as temporary:
            python, tree = make((given.environment or Path(temporary)).resolve() / name)
            environment = {**ISOLATED, **ONE_THREAD}
            return subprocess.run([python, *tests], cwd=tree, env=environment, check=False).returncode

    checks = {name: lambda command=command: _run(*command) for name, command in CHECKS.items()}
    checks["pytest"] = lambda: _run(*tests, **ONE_THREAD)
    if given.thorough:
        seed = random.SystemRandom().randrange(2**32)  # the failing run says it, so that it can be repeated
        laws = ("-m", "pytest", "-m", "hypothesis", f"--hypothesis-seed={seed}")
        checks[f"laws, drawn with seed {seed}"] = lambda: _run(*laws, **{THOROUGH: "1"})
    if given.lowest:
        checks["pytest, lowest versions"] = lambda: installed(with_lowest, "lowest")
    if given.wheel:
        checks["pytest, wheel"] = lambda: installed(with_wheel, "wheel")
    return checks


def _run(*command: str, **variables: str) -> int:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
