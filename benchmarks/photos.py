"""Accuracy of compressed MobileNetV2 on 200 photographs of classes that it was not compressed with.

python -m benchmarks.photos --k 2 --images 500
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import fxprune
from benchmarks import data, runs
from benchmarks.models.mobilenet_v2 import MobileNetV2
from fxprune.errors import OptionError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    fit = data.photographs("fit", arguments.data).images
    if not 1 <= arguments.images <= len(fit):
        raise OptionError(f"cannot draw {arguments.images} photographs: there are {len(fit)}")
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(arguments.seed))
    test = data.photographs("held_out", arguments.data)
    model = data.load_weights(MobileNetV2(), "mobilenet_v2_imagenet", arguments.data)
    regions = fxprune.discover(fxprune.trace(model, (fit[:1],))).regions
    print(f"{len(regions)} regions: {', '.join(region.label for region in regions)}")
    case = runs.Case(model, _native, test, test.images[:1])
    name = arguments.out or f"photos_k{arguments.k}_{arguments.recipe}"
    settings = runs.settings_of(arguments) | {"regions": [region.label for region in regions]}
    ledger = runs.Ledger(name, settings, seed=arguments.seed)
    calibration = fit[order[: arguments.images]]
    runs.print_table([runs.run_case(case, calibration, ledger, arguments, seed=arguments.seed)])


def _native(without: Sequence[str]) -> MobileNetV2:
    return MobileNetV2(without=without)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--images", type=int, default=500, help="how many to compress with (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    runs.add_arguments(parser, k=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
