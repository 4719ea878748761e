"""A compressed network as a folder of files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torch import fx, nn

from fxprune.artifacts.placing import taken_out
from fxprune.artifacts.recipe import ORIGIN, RECIPE, Origin, write_recipe
from fxprune.artifacts.results import Results
from fxprune.errors import GraphError
from fxprune.export.artifact import program_bytes, state_bytes
from fxprune.files import check_writable, write_bytes_atomic, write_text_atomic
from fxprune.graph.examples import example_for
from fxprune.reports.compression import REPORT
from fxprune.reports.page import PAGE

__all__ = ["FILES", "NETWORK", "close_folder", "save_network", "write_plan"]

NETWORK = ("model.pt2", "model.safetensors", "plan.json", "report.json")
"""What a network is made from again; the last of these may be missing."""

FILES = (
    RECIPE,
    "plan.json",
    "model.pt2",
    "model.safetensors",
    "model.onnx",
    "original.onnx",
    "model.fp16.onnx",
    "model.int8.onnx",
    "model.onnx.data",
    "original.onnx.data",
    PAGE,
)
"""Whatever may stand beside a report."""


def save_network(network: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a compressed network so that `load_network` makes it again; see `fxprune.save`.

    Raises:
        GraphError: It is no graph that `compress`, `load` or `apply` returned.
        ArtifactError: It cannot be captured by `torch.export`, or the folder cannot be written.
    """
    network, origin = _known(network)
    target = check_writable(folder)
    # before anything old is removed
    archive = program_bytes(network, example_for(network, origin.plan.inputs))
    results = Results(target, "report.json", FILES)
    results.begin()
    write_bytes_atomic(target / "model.safetensors", state_bytes(network))
    write_bytes_atomic(target / "model.pt2", archive)
    write_plan(target, origin)
    if REPORT in network.meta:
        results.end(replace(network.meta[REPORT], files=results.hashes()).to_json())
    close_folder(target, network, origin)


def _known(network: nn.Module) -> tuple[fx.GraphModule, Origin]:
    """The graph to save, and where it comes from: of a model whose parts were compressed together these, joined."""
    if (together := taken_out(network)) is not None:
        return together
    if isinstance(network, fx.GraphModule) and isinstance(origin := network.meta.get(ORIGIN), Origin):
        return network, origin
    graphs = {name: m for name, m in network.named_modules() if isinstance(m, fx.GraphModule)}
    parts = [name for name, graph in graphs.items() if name and ORIGIN in graph.meta]
    if parts:
        raise GraphError(
            f"a {type(network).__name__} is saved by its own means, and its compressed part by fxprune: give "
            f"model.get_submodule({parts[0]!r}), and keep the other weights with the model's state_dict()"
        )
    raise GraphError(
        "this network does not say what was cut from it: fxprune.save takes the graphs that fxprune.compress and "
        "fxprune.load return, and copies of them; tracing or pickling one again loses it"
    )


def write_plan(folder: Path, origin: Origin) -> None:
    """Writes `plan.json`."""
    write_text_atomic(folder / "plan.json", origin.plan.to_json())


def close_folder(folder: Path, network: fx.GraphModule, origin: Origin) -> None:
    """Writes `recipe.json`, after all else; a folder in which the network could not be written whole gets none.

    Raises:
        ArtifactError: It cannot be written.
    """
    if not all((folder / name).is_file() for name in NETWORK[:-1]):
        return
    write_recipe(folder, network, origin, NETWORK)
