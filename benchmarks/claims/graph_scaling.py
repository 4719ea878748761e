"""Whether discovery and rewriting stay close to linear in the size of the graph.

    python -m benchmarks.claims.graph_scaling [--nodes 1000,10000,100000] [--networks resnet152,vit_h_14] [--profile]

Synthetic residual chains are built as graphs with their shapes set by hand; real networks hold memory that is
never written. Each row is one graph: discovery over the whole of it, then one region is dropped, with adaptors
inserted and folded, and the code of the result is generated. Seconds are those of one thread's processor time,
the median over repetitions, so that other work on the machine counts little; wall time is kept beside them. The
exponent is the slope of a least-squares line through log(seconds) over log(nodes).
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import operator
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

import fxprune
from benchmarks.common import options
from benchmarks.common.tables import print_rows
from benchmarks.models.cifar_resnet import resnet
from fxprune.discovery.discovery import discover
from fxprune.errors import NoRegionError
from fxprune.graph.extract import share
from fxprune.graph.shapes import propagate_shapes
from fxprune.passes import DropRegions, FoldAdaptors, InsertAdaptors
from fxprune.placement.placement import find_sites
from fxprune.processes.threads import using_threads

__all__ = ["NETWORKS", "chain", "exponent", "main", "measure", "network"]

NODES = (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
NODES_PER_BLOCK = 5
STAGES = ("discover", "find sites", "copy graph", "drop", "insert", "fold", "generate code")
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet152": (torchvision.models.resnet152, (2, 3, 224, 224)),
    "resnet1202": (lambda: resnet(1202), (2, 3, 32, 32)),
    "vit_h_14": (lambda: torchvision.models.vit_h_14(weights=None), (2, 3, 224, 224)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the tables and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    settings = {name: getattr(arguments, name) for name in ("stage_blocks", "repeats", "threads")}
    kept = options.result_file(arguments, "graph_scaling", settings, fresh=True)
    with using_threads(arguments.threads):
        for count in arguments.nodes:
            row = measure(partial(chain, count, arguments.stage_blocks), arguments)
            kept.put(f"chain/{count}", row)
            _print_row(f"chain of {row['nodes']} nodes", row)
        for name in arguments.networks:
            row = measure(partial(network, name), arguments)
            kept.put(f"network/{name}", row)
            _print_row(name, row)
    chains = [row for key, row in kept.entries.items() if key.startswith("chain/")]
    fitted = {stage: exponent(chains, stage) for stage in (*STAGES, "total")} if len(chains) > 1 else {}
    kept.put("exponents", fitted)
    _print_table(kept.entries)
    print("fitted exponents: " + ", ".join(f"{stage} {value:.2f}" for stage, value in fitted.items()))


def chain(nodes: int, stage_blocks: int) -> fx.GraphModule:
    """Builds a residual chain: blocks of convolution, ReLU, convolution, add, ReLU, in stages of two widths.

    Args:
        nodes: Nodes of the graph, about.
        stage_blocks: Blocks in a stage; a 1x1 convolution leads to the next one. 0 puts all in one stage.

    Returns:
        A graph module with `tensor_meta` on every node.
    """
    graph = fx.Graph()
    root = nn.Module()
    blocks = max(1, nodes // NODES_PER_BLOCK)
    per_stage = stage_blocks or blocks
    stream = _with_shape(graph.placeholder("x"), 2)
    for first in range(0, blocks, per_stage):
        width = (2, 3)[first // per_stage % 2]
        stage = nn.Module()
        path = f"stage{first // per_stage}"
        root.add_module(path, stage)
        if first:
            stage.add_module("transition", nn.Conv2d(5 - width, width, 1))
            stream = _with_shape(graph.call_module(f"{path}.transition", (stream,)), width)
        for index in range(first, min(first + per_stage, blocks)):
            block = nn.Module()
            block.add_module("conv1", nn.Conv2d(width, width, 1))
            block.add_module("conv2", nn.Conv2d(width, width, 1))
            stage.add_module(f"block{index}", block)
            stream = _block(graph, f"{path}.block{index}", stream, width)
    _with_shape(graph.output(stream), width)
    return fx.GraphModule(root, graph)


def _block(graph: fx.Graph, path: str, stream: fx.Node, width: int) -> fx.Node:
    inner = _with_shape(graph.call_module(f"{path}.conv1", (stream,)), width)
    inner = _with_shape(graph.call_function(torch.relu, (inner,)), width)
    inner = _with_shape(graph.call_module(f"{path}.conv2", (inner,)), width)
    joined = _with_shape(graph.call_function(operator.add, (inner, stream)), width)
    return _with_shape(graph.call_function(torch.relu, (joined,)), width)


def _with_shape(node: fx.Node, width: int) -> fx.Node:
    shape = torch.Size((2, width, 8, 8))
    node.meta["tensor_meta"] = TensorMetadata(shape, torch.float32, False, (), None, False, {})
    return node


def network(name: str) -> fx.GraphModule:
    """Traces a real network whose weights are memory that was never written: time is all that counts here."""
    build, shape = NETWORKS[name]
    with torch.device("meta"):
        model = build().eval()
    gm = fxprune.trace(model).to_empty(device="cpu")
    propagate_shapes(gm, (torch.zeros(shape),))
    return gm


def measure(build: Callable[[], fx.GraphModule], arguments: argparse.Namespace) -> dict[str, Any]:
    """Times every stage on one graph.

    Raises:
        NoRegionError: The graph holds no region.
    """
    gm = build()
    profiler = cProfile.Profile() if arguments.profile else None
    runs = []
    for repetition in range(arguments.repeats):
        gc.collect()
        if profiler is not None and repetition == 0:
            profiler.enable()
        runs.append(_once(gm))
        if profiler is not None and repetition == 0:
            profiler.disable()
    row = {"nodes": len(gm.graph.nodes), "regions": runs[0]["regions"], "sites": runs[0]["sites"]}
    for unit in ("cpu_s", "wall_s"):
        seconds = {stage: statistics.median(run[unit][stage] for run in runs) for stage in STAGES}
        row[unit] = seconds | {"total": sum(seconds.values())}
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return row


def _once(gm: fx.GraphModule) -> dict[str, Any]:
    cpu: dict[str, float] = {}
    wall: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = time.process_time(), time.perf_counter()
        yield
        cpu[stage], wall[stage] = time.process_time() - begun[0], time.perf_counter() - begun[1]

    with timed("discover"):
        found = discover(gm)
    if not found.regions:
        raise NoRegionError("this graph holds no region, so dropping one cannot be timed; choose another")
    region = found.regions[len(found.regions) // 2]
    with timed("find sites"):
        sites = find_sites(gm, [region]).sites
    with timed("copy graph"):
        copy = share(gm)
    with timed("drop"):
        DropRegions([region])(copy)
    with timed("insert"):
        InsertAdaptors(sites)(copy)
    with timed("fold"):
        FoldAdaptors()(copy)  # of identities, so the weights that the copy shares stay as they are
    with timed("generate code"):
        assert copy.code  # what the rewritings left to do
    return {"regions": len(found.regions), "sites": len(sites), "cpu_s": cpu, "wall_s": wall}


def exponent(rows: Sequence[Mapping[str, Any]], stage: str) -> float:
    """Fits `seconds = c * nodes ** exponent` by least squares between logarithms."""
    nodes = np.log([row["nodes"] for row in rows])
    seconds = np.log([max(row["cpu_s"][stage], 1e-9) for row in rows])
    return float(np.polyfit(nodes, seconds, 1)[0])


def _print_row(title: str, row: Mapping[str, Any]) -> None:
    print(f"{title}: {row['cpu_s']['total']:.2f} s of processor time", flush=True)


def _print_table(entries: Mapping[str, Any]) -> None:
    rows = [
        {"graph": key, **row, **row["cpu_s"], "wall": row["wall_s"]["total"]}
        for key, row in entries.items()
        if key != "exponents"
    ]
    names = {name: name for name in ("graph", "nodes", "regions", "sites")}
    print_rows(rows, {**names, **{f"{stage}, s": stage for stage in (*STAGES, "total")}, "wall, s": "wall"})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("graph_scaling", __doc__, threads=1, seed=0, out=None, repeats=3)
    add, known = parser.add_argument, ",".join(NETWORKS)
    add("--nodes", type=options.counts, default=NODES, help="sizes of the chains, such as 1000,2000")
    add("--networks", type=options.words, default=tuple(NETWORKS), help=f"of {known}, or empty")
    add(
        "--stage-blocks",
        type=int,
        default=50,
        help="in a stage of a chain, 0 for one stage (default: %(default)s)",
    )
    add("--profile", action="store_true", help="print where the time of each graph goes")
    return options.parse(parser, argv)


if __name__ == "__main__":
    main()
