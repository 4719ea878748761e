"""Environments beside the present one: for the wheel, for the lowest versions, and for guests of the tests.

The installed package is tested in a copy of the repository that holds neither `fxprune/` nor `passes/`, so that the
package which the tests import is that one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

__all__ = ["ISOLATED", "ROOT", "CannotRunError", "lower_bounds", "with_guests", "with_lowest", "with_wheel"]

ROOT = Path(__file__).resolve().parent.parent
UNTRACKED = shutil.ignore_patterns(
    ".*_cache", ".git", ".hypothesis", ".mutation", ".venv", "*.egg-info", "build", "dist"
)
ISOLATED = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""Environment variables for a Python that must find the installed package only."""

WHERE = "import fxprune, fxprune.passes; print(fxprune.__file__); print(fxprune.passes.__file__)"


class CannotRunError(Exception):
    """A guest of the tests is not to be had here, for no fault of what is tested."""


def with_guests(folder: Path, requirements: Path, *, beside_present: bool = False) -> Path:
    """An environment for packages that the present one must not hold.

    Args:
        folder: Where to make it, unless it is there already.
        requirements: A file that names them.
        beside_present: Whether it reads everything else from the present one.

    Returns:
        Its Python.

    Raises:
        CannotRunError: They cannot be installed here.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if beside_present:
        _read_present(python)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run([*pip, "-r", str(requirements)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        why = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise CannotRunError(f"its packages cannot be installed here ({why[-1].removeprefix('ERROR: ')})")
    return python


def with_wheel(folder: Path) -> tuple[Path, Path]:
    """An environment that holds the wheel, and reads everything else from the present one.

    Args:
        folder: Where to make it.

    Returns:
        Its Python, and the folder in which to run the tests.
    """
    python = _environment(folder, Path(sys.executable))
    _read_present(python)
    return python, _installed(folder, python, "--no-deps", "--force-reinstall")


def with_lowest(folder: Path) -> tuple[Path, Path]:
    """An environment with the oldest Python and the oldest releases that pyproject.toml admits.

    Args:
        folder: Where to make it; some gigabytes.

    Returns:
        Its Python, and the folder in which to run the tests.
    """
    oldest = _oldest_python()
    if oldest is None:
        print(
            f"no {_lowest_python()} here: the lowest releases run on Python {sys.version.split()[0]}",
            flush=True,
        )
    python = _environment(folder, oldest or Path(sys.executable))
    constraints = folder / "lowest.txt"
    constraints.write_text("\n".join(lower_bounds()) + "\n")
    return python, _installed(folder, python, "--constraint", str(constraints), extras="[test]")


def lower_bounds(extras: tuple[str, ...] = ("demo", "test")) -> list[str]:
    """Each requirement of the package and of some extras, at the very release that is its lower bound."""
    project = _project()
    required = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    return [line for text in required for line in _lower_bound(Requirement(text))]


def _lower_bound(requirement: Requirement) -> Iterator[str]:
    if requirement.name == "fxprune":  # an extra that names another one
        return
    (lowest,) = (s.version for s in requirement.specifier if s.operator == ">=")
    marker = f"; {requirement.marker}" if requirement.marker else ""
    yield f"{requirement.name}=={lowest}{marker}"


def _project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _lowest_python() -> str:
    found = re.fullmatch(r">=(3\.\d+)", str(_project()["requires-python"]))
    assert found is not None
    return f"python{found.group(1)}"


def _oldest_python() -> Path | None:
    """The oldest Python that is supported, where there is one; pyenv's shims ask which version is meant."""
    name = _lowest_python()
    if shutil.which(name) is None:
        return None
    meant = {**os.environ, "PYENV_VERSION": name.removeprefix("python")}
    run = subprocess.run(
        [name, "-c", "import sys; print(sys.executable)"],
        env=meant,
        capture_output=True,
        text=True,
        check=False,
    )
    return Path(run.stdout.strip()) if run.returncode == 0 else None


def _environment(folder: Path, python: Path) -> Path:
    """The Python of a virtual environment in a folder, made unless it is there already."""
    made = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not made.exists():
        subprocess.run([str(python), "-m", "venv", str(folder / "environment")], check=True)
    return made


def _site_packages(python: Path) -> Path:
    return Path(_answer(python, "import sysconfig; print(sysconfig.get_path('purelib'))", python.parent))


def _read_present(python: Path) -> None:
    """Lets an environment find what the present one holds."""
    import torch

    (_site_packages(python) / "present.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")


def _answer(python: Path, code: str, folder: Path) -> str:
    command = [str(python), "-c", code]
    run = subprocess.run(command, cwd=folder, env=ISOLATED, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.strip()


def _installed(folder: Path, python: Path, *options: str, extras: str = "") -> Path:
    """Builds the wheel, installs it, and gives back a copy of the repository that lacks the package."""
    tree, wheels = folder / "tree", folder / "wheels"
    for old in (tree, wheels):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=UNTRACKED)

    def pip(*arguments: str) -> None:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
        subprocess.run(command, env=ISOLATED, check=True)

    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(tree))
    (wheel,) = wheels.iterdir()
    # in an environment that is kept, pip would take an older build of the same version for this one
    pip("uninstall", "--yes", "fxprune")
    pip("install", *options, f"{wheel}{extras}")
    for name in ("fxprune", "passes", "build", "fxprune.egg-info"):
        shutil.rmtree(tree / name)
    for path in _answer(python, WHERE, tree).split():
        assert Path(path).is_relative_to(_site_packages(python)), f"{path} is not the installed package"
    return tree
