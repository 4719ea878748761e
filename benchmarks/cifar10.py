"""Accuracy of compressed CIFAR-10 ResNets on all 10,000 test images, over image counts and seeds.

python -m benchmarks.cifar10 --model resnet20 --k 3 --images 50,500 --seeds 3 --recipe practise
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import data, runs
from benchmarks.models.cifar_resnet import CifarResNet, resnet

__all__ = ["main"]

TIMED = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    depth = int(arguments.model.removeprefix("resnet"))

    def native(without: Sequence[str]) -> CifarResNet:
        return resnet(depth, without=without)

    test = data.cifar10_test(arguments.data)
    model = data.load_weights(resnet(depth), f"{arguments.model}_cifar10", arguments.data)
    case = runs.Case(model, native, test, test.images[:TIMED])
    name = arguments.out or f"cifar10_{arguments.model}_k{arguments.k}_{arguments.recipe}"
    ledger = runs.Ledger(name, runs.settings_of(arguments), seed=0)
    finished = []
    for images in arguments.images:
        for seed in range(arguments.seeds):
            calibration, _ = data.few_shot(images, seed, data=arguments.data)
            run = runs.run_case(case, calibration, ledger, arguments, seed=seed)
            print(
                f"{images} images, seed {seed}: {run['accuracy_after']:.2%} without {run['chosen']}",
                flush=True,
            )
            finished.append(run)
    runs.print_table(finished)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--images", type=_counts, default=(50, 500), help="counts, such as 50,500")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    runs.add_arguments(parser, k=3)
    return parser.parse_args(argv)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
