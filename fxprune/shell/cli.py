"""The pipeline for the shell: `fxprune demo | inspect | compress | sweep | measure`.

Everything heavy is imported inside the commands, so that `--help` answers at once. Results go to stdout, all
else to stderr. Exit codes: 0 done, 1 an explained error, 2 wrong usage or options, 130 interrupted.

Under `torchrun` every process runs `compress` and `sweep`; the first one alone prints results and writes files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fxprune.errors import FxpruneError, OptionError
from fxprune.shell.arguments import add_compress, add_demo, add_inspect, add_measure, add_sweep

__all__ = ["main"]

_SCORING = (
    *("recipe", "criterion", "selection", "backend", "device", "kinds", "tap", "images", "latency_batch"),
    *("seed", "threads", "out"),
)
_GOALS = ("k", "target_speedup", "target_latency_ms", "min_agreement", "submodule")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code, see the module docstring.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse exits by itself, with its message printed
        return stop.code if isinstance(stop.code, int) else 2
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="fxprune: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    command: Callable[[argparse.Namespace], None] = args.run
    try:
        command(args)
    except KeyboardInterrupt:
        print("fxprune: interrupted; files that were written are whole", file=sys.stderr)
        return 130
    except (FxpruneError, OSError) as error:
        if args.verbose:
            logging.getLogger(__name__).exception("%s failed", args.command)
        print(f"fxprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxprune",
        description="Cut residual blocks out of trained vision networks, from a few unlabelled images.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add, run in _COMMANDS:
        command = add(commands)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON in place of the table")
        command.add_argument("--verbose", action="store_true", help="log progress and the origin of errors")
    return parser


def _model(args: argparse.Namespace) -> Any:
    from fxprune.shell.sources import load_model, load_weights

    model = load_model(args.model)
    if args.weights is not None:
        load_weights(model, args.weights)
    return model


def _print(args: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if args.json else text)


def _demo(args: argparse.Namespace) -> None:
    from fxprune.shell import demo

    result = demo.run(Path(args.out), seed=args.seed, threads=args.threads, progress=not args.no_progress)
    table = result.pop("table")
    _print(args, result, table)


def _inspect(args: argparse.Namespace) -> None:
    import torch

    import fxprune
    from fxprune.shell.inspection import describe, tables

    model = _model(args)
    shape = args.input_shape or (1, 3, args.size, args.size)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gm = fxprune.trace(model, example, front_end=args.front_end)
    found = fxprune.discover(gm, kinds=args.kinds, ignore=tuple(args.ignore))
    data = {"model": args.model, "input_shape": list(shape), **describe(gm, found)}
    _print(args, data, tables(data))


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


def _scoring(args: argparse.Namespace, talks: bool) -> dict[str, Any]:
    """The keywords that `fxprune.compress` and `fxprune.sweep` share."""
    return {
        **{name: getattr(args, name) for name in _SCORING},
        "cache_bytes": args.cache_mib * 2**20,
        "ignore": tuple(args.ignore),
        "progress": talks and not args.no_progress,
    }


def _compress(args: argparse.Namespace) -> None:
    import fxprune
    from fxprune.export import artifact
    from fxprune.files import check_writable

    with _together() as talks:
        out = None if args.out is None else check_writable(args.out)
        model = _model(args)
        loader = _images(args, talks)
        example = next(iter(loader))[:1]
        # a network that is compressed in part need not be traceable as a whole
        original = model if args.submodule else fxprune.trace(model, example)
        goals = {name: getattr(args, name) for name in _GOALS}
        small = fxprune.compress(original, loader, **goals, **_scoring(args, talks))
        report = fxprune.report(small)
        if out is not None and talks:
            before, after, inputs = _parts(args, original, small, example)
            fxprune.export_onnx(after, out / "model.onnx", inputs)
            artifact.save(after, out, example_inputs=inputs)
            fxprune.export_onnx(before, out / "original.onnx", inputs)
        if talks:
            _print_report(args, loader, report)


def _parts(args: argparse.Namespace, original: Any, small: Any, example: Any) -> tuple[Any, Any, Any]:
    """What the files hold: both networks, or both states of the part that was compressed, and their inputs."""
    if not args.submodule:
        return original, small, (example,)
    from fxprune.graph.call import flat_tensors, positional

    part = small.get_submodule(args.submodule)
    inputs = part.meta["fxprune_example"]
    before = original.get_submodule(args.submodule)
    return positional(before, inputs), positional(part, inputs), flat_tensors(inputs)


def _sweep(args: argparse.Namespace) -> None:
    import fxprune
    from fxprune.files import check_writable

    with _together() as talks:
        if args.out is not None:
            check_writable(args.out)
        model = _model(args)
        loader = _images(args, talks)
        report = fxprune.sweep(model, loader, **_scoring(args, talks))
        if talks:
            _print_report(args, loader, report)


def _print_report(args: argparse.Namespace, loader: Any, report: Any) -> None:
    if loader.unreadable:
        count = len(loader.unreadable)
        print(f"fxprune: skipped {count} image files that could not be read", file=sys.stderr)
    print(report.to_json() if args.json else str(report))


def _images(args: argparse.Namespace, talks: bool) -> Any:
    from fxprune.shell.sources import load_images

    return load_images(
        args.data,
        size=args.size,
        mean=args.mean,
        std=args.std,
        limit=args.images,
        seed=args.seed,
        progress=talks and not args.no_progress,
    )


def _measure(args: argparse.Namespace) -> None:
    import fxprune
    from fxprune.shell.inspection import comparison, comparison_table
    from fxprune.shell.sources import onnx_inputs
    from fxprune.timing.latency import TimingSettings

    shapes = args.input_shape
    inputs = onnx_inputs(args.before, batch=args.batch, shapes=shapes)
    theirs = onnx_inputs(args.after, batch=args.batch, shapes=shapes)
    if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in theirs]:
        raise OptionError(f"{args.before} and {args.after} take different inputs: they cannot be compared.")
    # a number of rounds that was asked for is taken, however long it lasts
    rounds = {"min_rounds": args.rounds, "max_rounds": args.rounds, "max_seconds": 1e9} if args.rounds else {}
    settings = TimingSettings(threads=args.threads, **rounds)
    result = fxprune.measure(args.before, args.after, inputs=inputs, backend=args.backend, settings=settings)
    _print(args, comparison(result), comparison_table(result))


_COMMANDS = (
    (add_demo, _demo),
    (add_inspect, _inspect),
    (add_compress, _compress),
    (add_sweep, _sweep),
    (add_measure, _measure),
)

if __name__ == "__main__":
    sys.exit(main())
