"""The command lines of the scripts: options that several have, and what the settings of a result hold."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.networks import MODELS
from benchmarks.common.result_file import ResultFile
from fxprune.options import RECIPES, Recipe, recipe_named

__all__ = ["NETWORK", "counts", "parse", "parser", "result_file", "settings_of", "shortened", "words"]


def words(text: str) -> tuple[str, ...]:
    """Parses `a,b` to words; an empty text gives none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def counts(text: str) -> tuple[int, ...]:
    """Parses `100,250` to numbers; an empty text gives none."""
    return tuple(int(part) for part in words(text))


_FLAG: Mapping[str, Any] = {"action": "store_true"}
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "model": {"choices": sorted(MODELS), "help": "default: %(default)s"},
    "images": {"type": int, "help": "to compress with (default: %(default)s)"},
    "random": {**_FLAG, "help": "random weights and images: times only, no data"},
    "device": {"help": "default: %(default)s"},
    "threads": {"type": int, "help": "of torch; its own number by default"},
    "seed": {"type": int, "help": "default: %(default)s"},
    "seeds": {"type": int, "help": "how many, from --seed on (default: %(default)s)"},
    "data": {"help": "folder of the data; else FXPRUNE_DATA, else ../shared/data"},
    "out": {"help": "name of the result file"},
    "k": {"type": int, "help": "regions to cut (default: %(default)s)"},
    "regions": {"type": words, "help": "labels, such as layer1.0,layer1.1 (default: %(default)s)"},
    "recipe": {"choices": sorted(RECIPES), "help": "default: %(default)s"},
    "recipes": {"type": words, "help": "default: %(default)s"},
    "iterations": {"type": int, "help": "fewer than the recipe's, for a quick trial"},
    "adaptor_iterations": {"type": int, "help": "fewer than the recipe's, for a quick trial"},
    "mimic_iterations": {"type": int, "help": "fewer than the recipe's, for a quick trial"},
    "repeats": {"type": int, "help": "default: %(default)s"},
}
NETWORK: Mapping[str, Any] = {
    "images": 500, "random": False, "device": "cpu", "threads": None, "seed": 0, "data": None, "out": None,
}  # fmt: skip
"""Options, with their defaults, of every script that compresses a network; `model` comes with its own default."""
BASIS = ("model", "images", "random", "device", "seed")


def parser(script: str, about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Makes a script's parser.

    Args:
        script: Its module in `benchmarks.claims`.
        about: Its description, of which the first line is shown.
        defaults: Of those shared options that it has.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.claims.{script}", description=(about or "").split("\n")[0]
    )
    for name, default in defaults.items():
        made.add_argument("--" + name.replace("_", "-"), default=default, **_SHARED[name])
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line, and notes it as `command` without the places of data and files, which are no settings."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = made.parse_args(given)
    shown = [word for word in given if not word.startswith("--data=")]
    if "--data" in shown:
        place = shown.index("--data")
        shown[place : place + 2] = []
    shown = [Path(word).name if Path(word).is_absolute() else word for word in shown]
    arguments.command = f"{made.prog} {shlex.join(shown)}".strip()
    return arguments


def result_file(
    arguments: argparse.Namespace, name: str, settings: Mapping[str, Any], *, fresh: bool = False
) -> ResultFile:
    """Opens the file that `--out` names, else the one of that name."""
    chosen = arguments.out or name
    return ResultFile(chosen, settings, seed=arguments.seed, command=arguments.command, fresh=fresh)


def settings_of(
    arguments: argparse.Namespace, *names: str, recipes: Iterable[Recipe] = (), basis: Sequence[str] = BASIS
) -> dict[str, Any]:
    """Returns what a result depends on: some of the options, the threads, and recipes in full."""
    given = {name: getattr(arguments, name) for name in (*basis, *names)}
    used = {recipe.name: asdict(recipe) for recipe in recipes}
    return given | {"threads": torch.get_num_threads()} | ({"recipes": used} if used else {})


def shortened(name: str, adaptor: int | None, mimic: int | None) -> Recipe:
    """Returns a recipe with so many iterations of adaptors and of mimicking, its own where None."""
    recipe = recipe_named(name)
    for stage, iterations in (("adaptor", adaptor), ("mimic", mimic)):
        if iterations is not None:
            recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), iterations=iterations)})
    return recipe
