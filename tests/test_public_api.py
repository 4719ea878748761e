"""The public surface: what can be imported, from where, and that nothing else can by accident."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fxprune

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fxprune.__file__).parent
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").glob("*.py")})  # rglob follows no links
FOR_GUESTS = (
    PACKAGE / "integrations" / "olive.py"
)  # imports what only `python -m tests.olive` has, and is a command
PACKAGES = sorted({path.parent for path in FILES})
needs_the_sources = pytest.mark.skipif(PACKAGE.parent != ROOT, reason="an installed package holds its passes")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def declared(path: Path) -> list[str] | None:
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in statement.targets
        ):
            return list(ast.literal_eval(statement.value))
    return None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_declares_sorted_names_that_exist(path: Path) -> None:
    names = declared(path)
    if path.name == "__init__.py" and names is None:
        assert len(path.read_text().splitlines()) <= 3  # a package with nothing but a docstring
        return
    if path.name == "__main__.py" and names is None:
        return
    assert names is not None, f"{module_name(path)} has no __all__"
    # as ruff's RUF022 sorts: constants, then classes, then the rest
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[:1].isupper(), n))
    assert len(set(names)) == len(names)
    if path == FOR_GUESTS:
        return
    module = importlib.import_module(module_name(path))
    assert [name for name in names if not hasattr(module, name)] == []
    assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_public_definitions_are_declared_and_documented(path: Path) -> None:
    names = declared(path) or []
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        overload = any(ast.unparse(d) == "overload" for d in getattr(node, "decorator_list", ()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names and not overload:
            assert ast.get_docstring(node), node.name


def test_the_front_door_is_narrow_and_every_name_resolves() -> None:
    assert len(fxprune.__all__) <= 13
    for name in fxprune.__all__:
        assert getattr(fxprune, name) is not None
    assert {"trace", "discover", "compress", "report", "export_onnx", "measure", "passes"} <= set(
        fxprune.__all__
    )
    assert dir(fxprune) == sorted(fxprune.__all__)
    with pytest.raises(AttributeError, match="prune_everything"):
        fxprune.prune_everything  # noqa: B018 (the access is the test)


def test_what_users_call_is_annotated_and_documented() -> None:
    for name in fxprune.__all__:
        value = getattr(fxprune, name)
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty
            assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), (
                name
            )


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    assert listed == sorted(listed)
    assert listed == [".".join(folder.relative_to(PACKAGE.parent).parts) for folder in PACKAGES]
    assert all((folder / "__init__.py").exists() for folder in PACKAGES)
    assert "fxprune.passes = passes" in config["options"]["package_dir"]


@needs_the_sources
def test_passes_live_at_the_root_and_are_imported_as_part_of_the_package() -> None:
    link = ROOT / "fxprune" / "passes"
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == ROOT / "passes"
    assert not [path for path in (ROOT / "passes").iterdir() if path.is_dir() and path.name != "__pycache__"]


@needs_the_sources
def test_a_second_copy_of_the_passes_cannot_be_imported() -> None:
    code = "import passes"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError: import fxprune.passes" in run.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, fxprune; sys.exit(', '.join({'torch', 'onnx', 'networkx'} & set(sys.modules)) or 0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_error_descends_from_one_root() -> None:
    errors = importlib.import_module("fxprune.errors")
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, fxprune.FxpruneError)
    assert issubclass(errors.OptionError, ValueError)
    assert fxprune.FxpruneError("what", nodes=iter(["a", "b"])).nodes == ("a", "b")
    parity = errors.ParityError("off", max_abs_diff=0.5, tolerance=0.1)
    assert (parity.max_abs_diff, parity.tolerance, parity.nodes) == (0.5, 0.1, ())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_library_neither_prints_nor_configures_logging(path: Path) -> None:
    if path == FOR_GUESTS or module_name(path) in (
        "fxprune.shell.cli",
        "fxprune.shell.demo",
        "fxprune.__main__",
    ):
        return
    calls = {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    }
    assert calls.isdisjoint({"print", "logging.basicConfig", "logging.StreamHandler", "logger.addHandler"})
