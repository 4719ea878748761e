"""The commands: `fxprune demo | inspect | draw | compress | apply | sweep | measure | report | export`.

Everything heavy is imported inside the commands, so that `--help` answers at once. Results go to stdout, all
else to stderr. Exit codes: 0 done, 2 wrong usage or input, 130 interrupted; `exits.py` tells the errors apart.

Under `torchrun` every process runs `compress` and `sweep`; the first one alone prints results and writes files.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune._version import __version__
from fxprune.errors import FxpruneError, SourceError
from fxprune.memory import memory_explained
from fxprune.options import Options
from fxprune.shell.arguments import (
    add_apply,
    add_compress,
    add_demo,
    add_draw,
    add_export,
    add_inspect,
    add_measure,
    add_report,
    add_sweep,
)
from fxprune.shell.exits import INTERRUPTED, exit_code

if TYPE_CHECKING:  # torch takes a second to import, and `--help` needs none of it
    from torch.fx import GraphModule

    from fxprune.graph.regions import Discovery

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code, see the module docstring.
    """
    if sys.platform == "linux" and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        # threads that spin while they wait take the cores from each other beside any other work; read with torch
        os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        args = _parser().parse_args(argv)
        args.typed = shlex.join(["fxprune", *(sys.argv[1:] if argv is None else argv)])
    except SystemExit as stop:  # argparse exits by itself, with its message printed
        return stop.code if isinstance(stop.code, int) else 2
    if args.quiet:
        args.progress = False
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.ERROR if args.quiet else logging.WARNING,
        format="fxprune: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        with memory_explained(), warnings.catch_warnings():
            if args.quiet:
                warnings.simplefilter("ignore")
            contextvars.copy_context().run(args.run, args)  # what it sets there ends with it
    except KeyboardInterrupt:
        print("fxprune: interrupted; files that were written are whole", file=sys.stderr)
        return INTERRUPTED
    except (FxpruneError, OSError) as error:
        if args.verbose:
            logging.getLogger(__name__).exception("%s failed", args.command)
        print(f"fxprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return exit_code(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxprune",
        description="Cut residual blocks out of trained vision networks, from a few unlabelled images.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, run, what in _COMMANDS:
        command = commands.add_parser(name, help=what)
        add(command)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON in place of the table")
        told = command.add_mutually_exclusive_group()
        told.add_argument("--verbose", action="store_true", help="log progress and the origin of errors")
        told.add_argument("--quiet", action="store_true", help="nothing but results, and errors on stderr")
    return parser


def _model(args: argparse.Namespace, shape: tuple[int, ...]) -> Any:
    from fxprune.sources.networks import load_model, load_weights

    model = load_model(args.model, [shape])
    if args.weights is not None:
        load_weights(model, args.weights)
    return model


def _print(args: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if args.json else text)


def _demo(args: argparse.Namespace) -> None:
    from fxprune.shell import demo

    result = demo.run(Path(args.out), seed=args.seed, threads=args.threads, progress=args.progress)
    table = result.pop("table")
    _print(args, result, table)


def _found(args: argparse.Namespace) -> tuple[GraphModule, Discovery, list[int]]:
    """The network that `inspect` and `draw` look at, what was found in it, and the shape of its input."""
    import torch

    import fxprune
    from fxprune.sources.networks import image_size

    shape = args.input_shape or (1, 3, *image_size(args.model, args.size))
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gm = fxprune.trace(_model(args, shape), example, front_end=args.front_end)
    return gm, fxprune.discover(gm, kinds=args.kinds, ignore=tuple(args.ignore)), list(shape)


def _inspect(args: argparse.Namespace) -> None:
    from fxprune.reports.inspection import describe, tables

    gm, found, shape = _found(args)
    data = {"model": args.model, "input_shape": shape, **describe(gm, found)}
    _print(args, data, tables(data))


def _draw(args: argparse.Namespace) -> None:
    from fxprune.files import write_text_atomic
    from fxprune.pictures.drawing import draw

    gm, found, shape = _found(args)
    write_text_atomic(args.out, draw(gm, found, title=args.model))
    labels = [region.label for region in found.regions]
    data = {"model": args.model, "input_shape": shape, "regions": labels, "out": args.out}
    _print(args, data, f"{args.model}: {len(labels)} regions that can be cut, drawn in {args.out}")


@contextlib.contextmanager
def _together() -> Iterator[bool]:
    """Meets the other processes where `torchrun` started some; yields whether this one talks to the user."""
    from fxprune.processes import group

    group.ensure_group()
    logger = logging.getLogger("fxprune")
    level = logger.level
    if not group.is_main():
        logger.setLevel(logging.ERROR)  # its warnings would only repeat those of the main process
    try:
        yield group.is_main()
    finally:
        logger.setLevel(level)
        group.leave_group()


def _asked_for(args: argparse.Namespace, talks: bool) -> dict[str, Any]:
    """Keywords of `fxprune.compress` and `fxprune.sweep`."""
    known = {field.name for field in fields(Options)}
    return {name: value for name, value in vars(args).items() if name in known} | {
        "ignore": tuple(args.ignore),
        "cache_bytes": args.cache_mib * 2**20,
        "progress": talks and args.progress,
    }


def _recover(args: argparse.Namespace) -> None:
    """What `compress` and `sweep` do; a folder that cannot be written is found before anything is read."""
    import fxprune
    from fxprune.files import check_writable
    from fxprune.reports.call import SHELL_COMMAND
    from fxprune.shell.images import load_images, load_labelled
    from fxprune.sources.networks import image_size

    SHELL_COMMAND.set(args.typed)
    with _together() as talks:
        if args.out is not None:
            check_writable(args.out)
        settings = _asked_for(args, talks)
        size = image_size(args.model, args.size)
        model = _model(args, (1, 3, *size))
        prepared = {"size": size, "mean": args.mean, "std": args.std}
        if args.labels is not None:
            settings["labels"] = load_labelled(args.labels, **prepared)
        progress = settings["progress"]
        loader = load_images(args.data, limit=args.images, seed=args.seed, progress=progress, **prepared)
        report: Any
        if args.command == "sweep":
            report = fxprune.sweep(model, loader, **settings)
        else:
            small = fxprune.compress(model, loader, **settings, onnx=args.out is not None)
            report = fxprune.report(small)
        if talks and loader.unreadable and not args.quiet:
            count = len(loader.unreadable)
            print(f"fxprune: skipped {count} image files that could not be read", file=sys.stderr)
        if talks:
            print(report.to_json() if args.json else str(report))


def _apply(args: argparse.Namespace) -> None:
    import fxprune
    from fxprune.artifacts.loading import rebuild
    from fxprune.artifacts.recipe import RECIPE, read_recipe
    from fxprune.errors import ArtifactError
    from fxprune.export.artifact import load_state
    from fxprune.files import check_writable
    from fxprune.graph.call import flat_tensors
    from fxprune.graph.examples import example_of
    from fxprune.plan import Plan
    from fxprune.sources.networks import load_model

    out = check_writable(args.out)
    plan, folder = Plan.read(args.plan), Path(args.plan).parent
    parts = read_recipe(folder).submodule if (folder / RECIPE).is_file() else None
    if parts is not None:
        named = parts if isinstance(parts, str) else ", ".join(parts)
        raise ArtifactError(
            f"{args.plan} is of a part of a model ({named}): in Python, fxprune.load({str(folder)!r}, build) puts it "
            "back"
        )
    state = load_state(args.weights or folder / "model.safetensors")
    shapes = [tuple(x.shape) for x in flat_tensors(example_of(plan.inputs))]
    small = rebuild(load_model(args.model, shapes), plan, state, front_end=args.front_end)
    fxprune.save(small, out)
    fxprune.export_onnx(small, out / "model.onnx")
    data = {
        "model": args.model,
        "cut": [cut.label for cut in plan.cuts],
        "parameters": sum(parameter.numel() for parameter in small.parameters()),
        "out": args.out,
    }
    text = f"{args.model} without {', '.join(data['cut'])}: {data['parameters']:,} parameters, in {args.out}"
    _print(args, data, text)


def _measure(args: argparse.Namespace) -> None:
    from fxprune.files import check_writable
    from fxprune.measuring.several import measure_networks
    from fxprune.processes.threads import default_threads
    from fxprune.reports.measurement import measurement_table
    from fxprune.sources.examples import inputs_of
    from fxprune.timing.rounds import TimingSettings

    networks = [args.before, *args.after]
    inputs = inputs_of(networks, batch=args.batch, shapes=args.input_shape)
    # a number of rounds that was asked for is taken, however long it lasts
    rounds = {"min_rounds": args.rounds, "max_rounds": args.rounds, "max_seconds": 1e9} if args.rounds else {}
    settings = TimingSettings(threads=args.threads or default_threads(), **rounds)
    data = measure_networks(
        networks,
        inputs,
        args.backend,
        processes=args.processes,
        device=args.device,
        settings=settings,
        record_in=args.record and check_writable(args.record),
        record_seconds=args.record_seconds,
    )
    _print(args, data, measurement_table(data))


def _report(args: argparse.Namespace) -> None:
    import hashlib

    from fxprune.files import write_text_atomic
    from fxprune.reports.compression import CompressionReport
    from fxprune.reports.page import PAGE, page

    file = Path(args.folder) / "report.json"
    try:
        report = CompressionReport.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file} does not exist: name a folder that compress wrote with --out") from None
    except ValueError as error:
        raise SourceError(
            f"{file} is not the report of a compression by this version of fxprune ({error})"
        ) from error
    text = page(report)
    write_text_atomic(args.html or Path(args.folder) / PAGE, text)
    known = report.files.get(PAGE)
    if args.html is None and known not in (None, hashlib.sha256(text.encode()).hexdigest()):
        print(f"fxprune: {PAGE} is no longer the one whose hash report.json holds", file=sys.stderr)
    print(report.to_json() if args.json else str(report))


def _export(args: argparse.Namespace) -> None:
    from fxprune.serving.triton import export_triton
    from fxprune.serving.triton_config import TritonSettings

    settings = TritonSettings(args.max_batch, args.max_queue_delay, args.threads, args.accelerator)
    model = export_triton(
        args.sources,
        args.triton,
        args.name,
        versions=args.versions,
        settings=settings,
        overwrite=args.overwrite,
    )
    versions = ", ".join(f"version {number} {file}" for number, file in enumerate(model.versions, start=1))
    _print(args, asdict(model), f"{model.path}: {versions}")


_COMMANDS = (
    ("demo", add_demo, _demo, "train, compress and measure on real digits"),
    ("inspect", add_inspect, _inspect, "list what can be cut, and why the rest not"),
    ("draw", add_draw, _draw, "draw the network with what can be cut, as an SVG"),
    ("compress", add_compress, _recover, "cut, recover, export"),
    ("apply", add_apply, _apply, "make a compressed network again from its plan and its weights"),
    ("sweep", add_sweep, _recover, "latency and recovery loss for every number of cuts"),
    ("measure", add_measure, _measure, "time networks in turns, where they will run"),
    ("report", add_report, _report, "show what a compression did, and write it as a page"),
    ("export", add_export, _export, "write a model repository for an inference server"),
)

if __name__ == "__main__":
    sys.exit(main())
