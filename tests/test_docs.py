from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.shell import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "writing_a_pass.md"]
NAMES = [path.name for path in DOCS]


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


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_commands_of_the_readme_are_understood() -> None:
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fxprune ")]
    assert {command[0] for command in commands} == {"demo", "inspect", "compress", "sweep", "measure"}
    for command in commands:
        assert cli._parser().parse_args(command).command == command[0]


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
