"""Whole model zoos through the compiler: what works, to how many digits, and why the rest does not.

    python -m benchmarks.claims.coverage [--suite torchvision|timm|all] [--only PATTERN] [--limit-seconds S]
                                         [--out NAME] [--resume]

Every network has random weights, seeded, and the smallest input that works. Constants such as a layer scale
of 1e-6 or a norm's zero gain are stirred, so that nothing is small by initialisation. There are three figures,
each the largest absolute difference divided by the largest absolute output (or 1 if that is larger):

- `fold`: adaptors of random values inserted, against the same folded, in float64;
- `cut`: one region dropped, against the original module with hooks (`benchmarks.judges.hooked_reference`), in float64;
- `onnx`: the network without two regions in onnxruntime, against torch, in float32 (where the weights exceed what
  an ONNX file can hold, in half precision).

`effect` says how far the cut moved the output; `cut` has to be small beside it, and regions that move nothing are
passed over.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from benchmarks.common import options
from benchmarks.common.result_file import ResultFile
from benchmarks.judges.hooked_reference import Inputs, NoBypass, call, find_bypass, run_bypassed
from benchmarks.judges.zoo import Case, cases
from fxprune.errors import TraceError
from fxprune.files import write_text_atomic
from fxprune.graph.extract import share
from fxprune.graph.regions import Discovery, Kind, Region
from fxprune.options import FrontEnd
from fxprune.passes import Adaptor, Cut, DropRegions, FoldAdaptors, Prepare
from fxprune.placement.placement import find_sites
from fxprune.runtimes import onnxruntime

__all__ = ["Row", "main", "measure_case"]

SEED = 0
TRIES = 8  # regions tried until one has sites, or a hook that bypasses it to some effect
FLOAT64_TOLERANCE = 1e-10
VISIBLE = 1e-12  # smallest effect of a cut that is compared
CUT_TOLERANCE = 1e-3  # of that effect
ONNX_TOLERANCE = 1e-3
ONNX_LIMIT = 2**31
WORKS, NONE, UNTRACEABLE, FAILED = "works", "no droppable region", "cannot be traced", "FAILED"
KINDS = tuple(kind.value for kind in Kind)


@dataclass(slots=True)
class Row:
    """One network's result; see the module's description for the figures."""

    name: str
    status: str = FAILED
    detail: str = ""
    front_end: FrontEnd = "auto"
    input: str = ""
    nodes: int = 0
    regions: dict[str, int] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)
    discovery_seconds: float = 0.0
    seconds: float = 0.0
    sites: int = 0
    fold: float | None = None
    cut: float | None = None
    effect: float | None = None
    onnx: float | None = None
    bypassed_by: str = ""
    remarks: list[str] = field(default_factory=list)


class _OutOfTimeError(Exception):
    """The network took longer than it was given."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises `_OutOfTimeError` in the block after some seconds, at the next return to Python."""

    def ring(*_: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stir(model: nn.Module) -> None:
    """Moves constant parameters and batch statistics away from their initial values, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.std() == 0:
                start = 1.0 if abs(float(parameter.flatten()[0])) > 0.5 else 0.1
                parameter.copy_(start + 0.1 * start * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.75 + 0.5 * torch.rand_like(buffer))


def difference(one: Any, other: Any) -> float:
    """Largest absolute difference of all float outputs, relative to the largest absolute value (at least 1).

    Raises:
        ValueError: The outputs differ in structure, or one is not finite.
    """
    first, second = _floats(one), _floats(other)
    if [t.shape for t in first] != [t.shape for t in second]:
        raise ValueError(f"outputs differ in shape: {[t.shape for t in first]}, {[t.shape for t in second]}")
    if not all(torch.isfinite(t).all() for t in (*first, *second)):
        raise ValueError("an output is not finite")
    scale = max([1.0, *(float(t.abs().max()) for t in first if t.numel())])
    return (
        max([0.0, *(float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a.numel())])
        / scale
    )


def _floats(value: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(value) if isinstance(value, Mapping) else value)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their float tensors in another type."""
    result: Inputs = pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, inputs
    )
    return result


def run(module: nn.Module, inputs: Inputs) -> Any:
    """One forward call on a private copy of the inputs, without gradients."""
    with torch.no_grad():
        return call(module, copy.deepcopy(inputs))


def by_preference(discovery: Discovery) -> list[Region]:
    """Identity regions first, then projection, then sequential; the middle of the small ones first."""
    ordered: list[Region] = []
    for kind in Kind:
        group = [r for r in discovery.regions if r.kind is kind]
        plain = [r for r in group if not any(r.overlaps(s) and len(s.body) < len(r.body) for s in group)]
        middle = len(plain) // 2
        rest = [r for r in group if r not in plain]
        ordered += [*plain[middle:], *plain[:middle][::-1], *rest]
    return ordered


def prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as `compress` looks for regions in it; changed in place."""
    Prepare()(gm)
    return gm


def check_fold(gm: fx.GraphModule, regions: Sequence[Region], inputs: Inputs, row: Row) -> None:
    """Fills `fold` and `sites` from the first region that has sites, and rewrites `gm` on the way."""
    for region in regions[:TRIES]:
        placement = find_sites(gm, (region,))
        if not placement.sites:
            row.remarks.append(f"{region.label}: no site")
            continue
        Cut((region,), placement.sites, fold=False)(gm)
        with torch.no_grad():
            for module in gm.modules():
                if isinstance(module, Adaptor):
                    module.weight.add_(0.1 * torch.randn_like(module.weight) / module.weight.shape[0] ** 0.5)
        inserted = run(gm, inputs)
        FoldAdaptors()(gm)
        left = [m for m in gm.modules() if isinstance(m, Adaptor)]
        if left:
            raise AssertionError(f"{len(left)} adaptors of {region.label} were not folded")
        row.sites, row.fold = len(placement.sites), difference(inserted, run(gm, inputs))
        return


def check_cut(
    model: nn.Module, gm: fx.GraphModule, regions: Sequence[Region], inputs: Inputs, row: Row
) -> None:
    """Fills `cut`, `effect` and `bypassed_by` from the first region that a hook can bypass."""
    for region in regions[:TRIES]:
        bypass = find_bypass(model, gm, region, inputs)
        if isinstance(bypass, NoBypass):
            row.remarks.append(f"{region.label}: {bypass.reason}")
            continue
        expected = run_bypassed(model, bypass, inputs)
        effect = difference(run(model, inputs), expected)
        if effect < VISIBLE:
            row.remarks.append(f"{region.label}: without it the output moves by {effect:.1e} only")
            continue
        graph = share(gm)
        DropRegions((region,))(graph)
        row.bypassed_by = f"{region.label}: {bypass}"
        row.cut, row.effect = difference(expected, run(graph, inputs)), effect
        return


def check_onnx(model: nn.Module, inputs: Inputs, row: Row) -> None:
    """Fills `onnx` after dropping up to two regions from a trace in float32 (exported graphs fix their type)."""
    dtype = torch.float32
    if sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize >= ONNX_LIMIT:
        dtype = torch.float16
        row.remarks.append("onnx in half precision: one ONNX file holds at most 2 GiB")
    inputs = cast(inputs, dtype)
    graph = prepared(fxprune.trace(model.to(dtype), inputs, front_end=row.front_end))
    chosen: list[Region] = []
    for region in by_preference(fxprune.discover(graph, kinds=KINDS)):
        if len(chosen) < 2 and not any(region.overlaps(other) for other in chosen):
            chosen.append(region)
    DropRegions(tuple(chosen))(graph)
    positional = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = dict(inputs) if isinstance(inputs, Mapping) else positional
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        fxprune.export_onnx(graph, path, tensors, verify=False)
        row.onnx = difference(_floats(run(graph, inputs)), _run_onnx(path, inputs))


def _run_onnx(path: Path, inputs: Inputs) -> list[Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    half = any(tensor.dtype == torch.float16 for tensor in tensors)
    session = onnxruntime.open_session(path, device="cpu", half=half)
    return _floats([torch.from_numpy(value) for value in onnxruntime.run(session, tensors)])


def _traced(model: nn.Module, inputs: Inputs) -> tuple[FrontEnd, fx.GraphModule]:
    """The first front end that captures the network.

    Raises:
        TraceError: None does.
    """
    try:
        return "fx", fxprune.trace(model, inputs, front_end="fx")
    except fxprune.FxpruneError as first:
        try:
            return "export", fxprune.trace(model, inputs, front_end="export")
        except TraceError as second:
            raise TraceError(f"fx: {first} | export: {second}") from second


def measure_case(case: Case, row: Row) -> None:
    """Fills a row; whatever a network raises is left to the caller.

    Args:
        case: The network.
        row: Its row, filled as far as the work gets.
    """
    torch.manual_seed(SEED)
    model, inputs = case.build()
    stir(model)
    row.input = str([tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)])
    model, inputs = model.double().eval(), cast(inputs, torch.float64)
    row.front_end, gm = _traced(model, inputs)
    row.nodes = len(gm.graph.nodes)
    prepared(gm)
    begin = time.perf_counter()
    discovery = fxprune.discover(gm, kinds=KINDS)
    row.discovery_seconds = time.perf_counter() - begin
    row.regions = dict(Counter(r.kind.value for r in discovery.regions))
    row.rejections = dict(Counter(r.reason.name for r in discovery.rejections))
    agreement = difference(run(model, inputs), run(gm, inputs))
    if agreement > FLOAT64_TOLERANCE:
        raise AssertionError(f"the traced graph computes something else than the network: {agreement:.1e}")
    regions = by_preference(discovery)
    if not regions:
        row.status = NONE
        row.detail = (
            "; ".join(f"{r.exit}: {r.reason.value}" for r in discovery.rejections[:8]) or "no join at all"
        )
        return
    check_cut(model, gm, regions, inputs, row)
    check_fold(gm, regions, inputs, row)
    del gm
    check_onnx(model, inputs, row)
    _judge(row)


def _judge(row: Row) -> None:
    wrong = []
    cut_limit = min(FLOAT64_TOLERANCE, CUT_TOLERANCE * (row.effect or 0.0))
    for name, limit in (("fold", FLOAT64_TOLERANCE), ("cut", cut_limit), ("onnx", ONNX_TOLERANCE)):
        figure = getattr(row, name)
        if figure is None:
            wrong.append(f"{name} could not be checked")
        elif not figure <= limit:
            wrong.append(f"{name} differs by {figure:.1e}")
    row.status, row.detail = (FAILED, "; ".join(wrong)) if wrong else (WORKS, "")


def _row_of(case: Case, limit: float) -> Row:
    row = Row(case.name)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings(), _time_limit(limit):
            warnings.simplefilter("ignore")
            measure_case(case, row)
    except TraceError as error:
        row.status, row.detail = UNTRACEABLE, str(error)
    except _OutOfTimeError:
        row.detail = f"not finished within {limit:.0f} s"
    except Exception as error:  # a failing network is a row, not the end of the table
        where = traceback.extract_tb(error.__traceback__)[-1]
        row.detail = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
    row.detail = " ".join(row.detail.split())[:1000]
    row.seconds = time.perf_counter() - begin
    gc.collect()
    return row


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows, its totals first."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    totals = Counter(row.status for row in rows)
    head = [
        "network",
        "front end",
        "nodes",
        "regions",
        "rejections",
        "s",
        "fold",
        "cut",
        "effect",
        "onnx",
        "outcome",
    ]
    lines = [
        f"{len(rows)} networks: " + ", ".join(f"{count} {status}" for status, count in totals.most_common()),
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for row in rows:
        found = ", ".join(f"{n} {kind}" for kind, n in row.regions.items())
        refused = ", ".join(f"{n} {reason}" for reason, n in row.rejections.items())
        outcome = f"{row.status}: {row.detail}" if row.detail else row.status
        cells = [row.name, row.front_end, str(row.nodes), found, refused, f"{row.seconds:.1f}"]
        cells += [*map(figure, (row.fold, row.cut, row.effect, row.onnx)), outcome.replace("|", "/")[:300]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rows(kept: ResultFile) -> list[Row]:
    return [Row(**entry) for name, entry in kept.entries.items() if name != "totals"]


def _note(kept: ResultFile, row: Row) -> None:
    kept.put(row.name, asdict(row))
    rows = _rows(kept)
    kept.put("totals", dict(Counter(row.status for row in rows)))
    write_text_atomic(kept.file.with_suffix(".md"), table(rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("coverage", __doc__, out=None)
    parser.add_argument("--suite", choices=("torchvision", "timm", "all"), default="all")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="glob over names such as timm:vgg*")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="per network")
    parser.add_argument("--resume", action="store_true", help="keep the rows of NAME.json that did not fail")
    parser.set_defaults(seed=SEED)
    return options.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; the exit status is 1 if a network failed."""
    arguments = _arguments(argv)
    settings = options.settings_of(arguments, "limit_seconds", basis=())
    kept = options.result_file(arguments, "coverage", settings, fresh=not arguments.resume)
    done = {row.name for row in _rows(kept) if row.status != FAILED}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for case in cases(arguments.suite):
        if case.name in done or not fnmatchcase(case.name, arguments.only):
            continue
        row = _row_of(case, arguments.limit_seconds)
        _note(kept, row)
        print(f"{row.name:45} {row.status:20} {row.seconds:6.1f} s  {row.detail[:160]}", flush=True)
    rows = _rows(kept)
    print(table(rows).partition("\n")[0])
    return int(any(row.status == FAILED for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
