"""Mutation testing: is each small defect put into a module seen by the tests that concern it?

`python -m tests.mutation` needs the extra `mutation`. The defects are those of cosmic-ray's operators. A process that
has imported torch and the other libraries is forked for each mutant and imports the mutated module, the rest of the
package and the tests anew: seconds less than a fresh interpreter takes. What is done is kept, so that an interrupted
run goes on; survivors are tried again when the tests have changed. docs/mutation.md judges what survives.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import pytest

from tests.environments import ROOT

__all__ = ["MODULES", "main"]

# Modules, and the tests that concern each, quickest first.
MODULES: dict[str, tuple[str, ...]] = {
    "placement/algebra": ("test_algebra",),
    "placement/placement": ("test_streams", "test_placement", "test_dense"),
    "discovery/discovery": (
        "test_chains",
        "test_joins",
        "test_motifs",
        "test_hooked_reference",
        "test_labels",
    ),
    "selection/planner": ("test_planning", "test_joint"),
    "scoring/store": ("test_store",),
    "passes/base": ("test_passes",),
    "passes/canonicalize": ("test_dead_nodes", "test_passes"),
    "passes/drop_regions": ("test_dropping", "test_passes", "test_hooked_reference", "test_draft"),
    "passes/fold_adaptors": ("test_passes", "test_parts"),
    "passes/fold_batchnorm": ("test_passes",),
    "passes/insert_adaptors": ("test_passes", "test_dense"),
    "passes/propagate_shapes": (
        "test_dropping",
        "test_passes",
    ),
    "passes/sequential": ("test_passes", "test_plans"),
    "passes/store_weights": ("test_dropping", "test_passes", "test_motifs"),
}
LIBRARIES = (
    *(
        "hypothesis",
        "networkx",
        "numpy",
        "onnx",
        "onnxruntime",
        "safetensors.torch",
        "scipy.stats",
        "torch",
        "torchvision",
    ),
    *(
        "torch._dynamo",
        "torch._export",
        "torch.export",
        "torch.fx.experimental.proxy_tensor",
        "torch.onnx",
        "tqdm",
    ),
)
# `is` and `==` agree on enumerations, None and nodes, which are all that the package compares so.
SAME = {frozenset(pair) for pair in (("Is", "Eq"), ("IsNot", "NotEq"))}
# What is compared by identity has no order: such a defect is either nonsense that any test sees, or the same.
UNORDERED = {frozenset((same, order)) for same in ("Is", "IsNot") for order in ("Lt", "LtE", "Gt", "GtE")}
LONGEST = 2.0
"""A mutant may take so many times as long as the tests without one, and 10 seconds besides."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One defect.

    Attributes:
        operator: Of cosmic-ray.
        occurrence: Which of the places it applies to.
        line: Of that place.
        source: The whole module with the defect.
    """

    operator: str
    occurrence: int
    line: int
    source: str

    @property
    def key(self) -> str:
        """Its name in a session."""
        return f"{self.operator}:{self.occurrence}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the mutants of some modules and says what survived; 0 only if each module reaches `--least`."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation", description="put defects into modules, run tests"
    )
    parser.add_argument(
        "--module", action="append", choices=list(MODULES), help="only this one; may be repeated"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="at most N mutants of a module, drawn at random"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".mutation", help="where finished mutants are kept"
    )
    parser.add_argument("--least", type=float, default=0.85, help="share that must be killed")
    parser.add_argument("--show", action="store_true", help="show the line of every survivor")
    given = parser.parse_args(arguments)
    for library in LIBRARIES:
        importlib.import_module(library)
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    gc.freeze()  # the forks need not look through what they were given
    shares = [_try_module(module, given) for module in given.module or MODULES]
    return int(min(shares) < given.least)


def _try_module(module: str, given: argparse.Namespace) -> float:
    path = ROOT / ("" if module.startswith("passes/") else "fxprune") / f"{module}.py"
    tests = [ROOT / "tests" / f"{name}.py" for name in MODULES[module]]
    source = path.read_text()
    mutants = list(_mutants(source))
    count = len(mutants)
    random.Random(given.seed).shuffle(mutants)  # so that a smaller sample is part of a larger one
    mutants = mutants[: given.sample]
    session = _Session(given.folder / f"{module.replace('/', '-')}.json", source, tests)
    open_ = [mutant for mutant in mutants if mutant.key not in session.done]
    if open_:
        trial = _Trial(module, path, tests)
        start = time.perf_counter()
        if trial.outcome(source, 3600.0) != "survived":
            raise SystemExit(f"the tests of {module} fail without a defect: {' '.join(MODULES[module])}")
        limit = 10.0 + LONGEST * (time.perf_counter() - start)
        for i, mutant in enumerate(open_):
            session.record(mutant, trial.outcome(mutant.source, limit))
            print(f"\r{module}: {i + 1} of {len(open_)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    outcomes = Counter(session.done[mutant.key] for mutant in mutants)
    share = 1.0 - outcomes["survived"] / len(mutants) if mutants else 1.0
    drawn = f"{len(mutants)} of {count}" if len(mutants) < count else f"{count}"
    print(
        f"| {module} | {drawn} | {outcomes['killed']} | {outcomes['timeout']} | {outcomes['survived']} | {share:.0%} |",
        flush=True,
    )
    if given.show:
        _show(source, [mutant for mutant in mutants if session.done[mutant.key] == "survived"])
    return share


def _show(source: str, survivors: Sequence[Mutant]) -> None:
    before = source.splitlines()
    for mutant in sorted(survivors, key=lambda mutant: mutant.line):
        changed = [(a, b) for a, b in zip(before, mutant.source.splitlines(), strict=False) if a != b]
        print(f"  {mutant.line}: {mutant.operator}")
        for a, b in changed[:1]:
            print(f"    - {a.strip()}\n    + {b.strip()}")


class _Session:
    """Outcomes of one module's mutants; those of another source are forgotten."""

    def __init__(self, path: Path, source: str, tests: Sequence[Path]) -> None:
        self._path = path
        self._source = hashlib.sha256(source.encode()).hexdigest()
        self._tests = hashlib.sha256(b"".join(test.read_bytes() for test in tests)).hexdigest()
        self.done: dict[str, str] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["source"] == self._source:
                same = kept["tests"] == self._tests
                self.done = {key: o for key, o in kept["done"].items() if same or o != "survived"}

    def record(self, mutant: Mutant, outcome: str) -> None:
        self.done[mutant.key] = outcome
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"source": self._source, "tests": self._tests, "done": self.done}
        self._path.write_text(json.dumps(kept, indent=1))


def _mutants(source: str) -> Iterator[Mutant]:
    """Every defect that changes what the module does: annotations, say, are never run."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    seen = {_meaning(source)}
    for name in provider:
        if provider[name].arguments() or frozenset(name.split("_")[1:]) in SAME | UNORDERED:
            continue
        operator = provider[name]()
        places = [place for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(places):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is None:
                continue
            try:
                meaning = _meaning(mutated)
            except SyntaxError:
                continue
            if meaning not in seen:
                seen.add(meaning)
                yield Mutant(name, occurrence, start[0], mutated)


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    nothing = ast.Constant(None)
    for node in ast.walk(tree):
        if isinstance(node, (ast.AnnAssign, ast.arg)):
            node.annotation = nothing
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = nothing
    return ast.dump(tree)


class _Trial:
    """Runs the tests of one module on a source of it; tests that failed lately come first."""

    def __init__(self, module: str, path: Path, tests: Sequence[Path]) -> None:
        self._name, self._path, self._tests = f"fxprune.{module.replace('/', '.')}", path, tests
        self._failed: list[str] = []

    def outcome(self, source: str, limit_s: float) -> str:
        """`killed`, `survived` or `timeout`, of a fork."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os._exit(self._work(source, writing))
        os.close(writing)
        with open(reading) as told:
            ready, _, _ = select.select([told], [], [], limit_s)  # the pipe closes with the child
            if not ready:
                os.killpg(child, signal.SIGKILL)
            failed = told.read()
        _, status = os.waitpid(child, 0)
        if failed:
            self._failed = [failed, *(name for name in self._failed if name != failed)]
        return "timeout" if not ready else "survived" if status == 0 else "killed"

    def _work(self, source: str, writing: int) -> int:
        os.setpgid(0, 0)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        sys.meta_path.insert(0, _Finder(self._name, self._path, source))
        already_imported = "ignore::pytest.PytestAssertRewriteWarning"
        options = ("-x", "-p", "no:cacheprovider", "-W", already_imported, "-c", str(ROOT / "pyproject.toml"))
        try:
            return int(
                pytest.main([*options, *map(str, self._tests)], plugins=[_Order(self._failed, writing)])
            )
        except BaseException:  # whatever a defect does, it was seen
            return 1


class _Order:
    """A plugin that runs some tests first and tells which one failed."""

    def __init__(self, first: Sequence[str], writing: int) -> None:
        self._place = {name: place for place, name in enumerate(first)}
        self._writing = writing

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._place.get(item.nodeid, len(self._place)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._writing, report.nodeid.encode())
            os._exit(1)  # tidying up takes longer than most tests


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, and gives it another source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        loader = _Loader(fullname, str(self._path))
        loader.source = self._source
        return importlib.util.spec_from_file_location(fullname, self._path, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    source: str

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


if __name__ == "__main__":
    sys.exit(main())
