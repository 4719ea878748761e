from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

import fxprune
from benchmarks import claims
from benchmarks.common import options
from fxprune import errors
from fxprune.shell import cli, exits

ROOT = Path(__file__).resolve().parent.parent
DOCS = [
    ROOT / "README.md",
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "pipelines.md",
    ROOT / "docs" / "save_load_fine_tune.md",
    ROOT / "docs" / "serving.md",
    ROOT / "docs" / "writing_a_pass.md",
]
NAMES = [path.name for path in DOCS]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]


def blocks(path: Path, fence: str) -> list[str]:
    """The fenced blocks of a document that carry a language's name."""
    return re.findall(rf"^```{fence}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` blocks run one after the other in one namespace; `py` marks what needs data and is only read."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": f"docs_{path.stem}"}
    for number, source in enumerate(blocks(path, "python")):
        exec(compile(source, f"{path.name}, block {number}", "exec"), namespace)


def test_the_guide_has_an_example_that_ran() -> None:
    assert len(blocks(ROOT / "docs" / "writing_a_pass.md", "python")) >= 4
    assert blocks(ROOT / "docs" / "architecture.md", "python")


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_blocks_that_need_data_use_names_that_exist(path: Path) -> None:
    for source in blocks(path, "py"):
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "fxprune"
            ):
                assert node.attr in fxprune.__all__


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        # the tree in which the installed package is tested holds no copy of it
        elsewhere = (path.parent / target).resolve().is_relative_to(ROOT / "fxprune") and not (
            ROOT / "fxprune"
        ).exists()
        assert target.startswith("https://") or elsewhere or (path.parent / target).exists(), target


def made(kind: type[Exception]) -> Exception:
    return kind("why", max_abs_diff=1.0, tolerance=0.1) if kind is errors.ParityError else kind("why")


def test_exit_codes_are_those_of_the_page() -> None:
    rows = re.findall(
        r"^\| `(\d+)` \|.*\| (.*) \|$", (ROOT / "docs" / "pipelines.md").read_text(), re.MULTILINE
    )
    listed = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed.pop("KeyboardInterrupt") == exits.INTERRUPTED
    kinds = {name: getattr(errors, name) for name in listed}
    assert {name: exits.exit_code(made(kind)) for name, kind in kinds.items()} == listed
    assert {kind for kind, _ in exits._CODES} == {*kinds.values()} - {errors.FxpruneError}


def understood(path: Path) -> set[str]:
    """Names of the commands in the blocks of a document, once they are known to be ones."""
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fxprune ")]
    for command in commands:
        assert cli._parser().parse_args(command).command == command[0]
    return {command[0] for command in commands}


def test_commands_of_the_documents_are_understood() -> None:
    names = {"demo", "inspect", "draw", "compress", "apply", "sweep", "measure", "report", "export"}
    assert understood(ROOT / "README.md") == names
    assert understood(ROOT / "docs" / "serving.md") == {"compress", "export"}
    assert understood(ROOT / "docs" / "measuring.md") == {"measure"}


class UnderstoodError(Exception):
    """Raised in place of the work that a command line asks for."""


def test_benchmark_commands_of_the_readme_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
        parser.parse_args(argv)
        raise UnderstoodError

    monkeypatch.setattr(options, "parse", parse)
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[2:] for line in lines if "-m benchmarks.claims." in line]
    assert len(commands) > 5
    for module, *arguments in commands:
        with pytest.raises(UnderstoodError):
            import_module(module).main(arguments)


def test_every_claim_is_listed_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for _, name, _ in iter_modules(claims.__path__):
        assert f"python -m benchmarks.claims.{name}" in text


def test_decisions_are_listed_and_answer_the_four_questions() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))
    for name in listed:
        headings = re.findall(r"^\*\*(.+?)\.\*\*", (folder / name).read_text(), re.MULTILINE)
        assert headings == ["Question", "What was tried", "Result", "Decision"], name


def test_modules_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:[a-z]+/)?[a-z_]+\.py)`", text):
        assert (Path(fxprune.__file__).parent / name).exists(), name


def test_the_architecture_lists_the_layers_of_the_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[\n(.*?)^\]", contract, flags=re.MULTILINE | re.DOTALL)
    assert layers is not None
    enforced = [re.findall(r"fxprune\.(\w+)", line) for line in layers.group(1).splitlines()]
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| layer |")[2].partition("\n\n")[0]
    listed = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    assert listed == enforced
