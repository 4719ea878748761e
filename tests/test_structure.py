"""The house as it stands: no import circle, no room too large, one sentence for each room."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx
import pytest

import fxprune

PACKAGE = Path(fxprune.__file__).parent
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").glob("*.py")})  # rglob follows no links
ROOMS = sorted({path.parent for path in FILES} - {PACKAGE})
MOST_LINES_IN_A_ROOM = 1350
MOST_LINES_IN_A_FILE = 350


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Every module of the package that a file imports: at its top, inside a function, or for the type checker alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() - {name_of(path)}


def arrows() -> networkx.DiGraph[str]:
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for name, path in MODULES.items():
        # a package's face names what lies inside it, and may be named by it
        inside = {other for other in MODULES if path.name == "__init__.py" and other.startswith(f"{name}.")}
        graph.add_edges_from((name, other) for other in imported(path) - inside)
    return graph


def test_there_is_no_import_circle() -> None:
    circles = [sorted(group) for group in networkx.strongly_connected_components(arrows()) if len(group) > 1]
    assert circles == []


def test_the_arrows_are_seen() -> None:
    graph = arrows()
    assert graph.has_edge("fxprune.api", "fxprune.pipeline.opening")
    assert graph.has_edge("fxprune.shell.cli", "fxprune.files")  # inside a function
    assert graph.number_of_edges() > 250


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_is_small_and_says_in_a_sentence_what_is_inside(room: Path) -> None:
    files = [path for path in FILES if path.parent == room]
    assert sum(len(path.read_text().splitlines()) for path in files) <= MOST_LINES_IN_A_ROOM
    sentence = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert sentence.endswith(".") and "\n\n" not in sentence


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_two_rooms_in_one(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES_IN_A_FILE
