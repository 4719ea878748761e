"""Networks that users bring and that published pruning code refuses, each through the whole of `compress`.

    python -m benchmarks.claims.user_models [--only retinanet_resnet50_fpn,hugging_face_vit]

Parts of torchvision's detectors and of RAFT, a torchvision ViT, a Hugging Face ViT, and with the extra `test-users` the
families of Hugging Face, Ultralytics, timm and segmentation-models-pytorch, torchvision's networks for segmentation and
video, networks for signals and for pairs of images, whose cuts are chosen by FLOPs, which needs no clock. Of a part,
the latency ratio is that of the whole model, and `part_ratio` its own. Weights and images are random, so accuracy means
nothing here; what counts is that two regions are cut, that the result runs, that its ONNX file agrees with torch, and
what time it saves. Few iterations are enough.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

import fxprune
from benchmarks.common import options
from benchmarks.common.tables import print_rows
from benchmarks.models.users import USERS, UserModel
from fxprune.options import RECIPES, Recipe
from fxprune.processes.threads import using_threads

__all__ = ["USERS", "UserModel", "main"]

ITERATIONS = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the table and leaves JSON in `benchmarks/results/`."""
    defaults = {"k": 2, "threads": torch.get_num_threads(), "seed": 0, "out": None}
    parser = options.parser("user_models", __doc__, **defaults)
    parser.add_argument("--only", type=options.words, default=tuple(USERS), help=f"of {','.join(USERS)}")
    arguments = options.parse(parser, argv)
    with using_threads(arguments.threads):
        kept = options.result_file(
            arguments, "user_models", options.settings_of(arguments, basis=("k", "seed"))
        )
        for name in arguments.only:
            torch.manual_seed(arguments.seed)
            figures = kept.once(name, partial(compress_and_run, USERS[name], arguments.k, arguments.seed))
            print(f"{name}: without {', '.join(figures['chosen'])}", flush=True)
    _print(kept.entries)


def recipe() -> Recipe:
    """The default recipe, cut down to a few iterations."""
    fast = RECIPES["fast"]
    return dataclasses.replace(
        fast,
        adaptor=dataclasses.replace(fast.adaptor, iterations=ITERATIONS, batch_size=4),
        mimic=dataclasses.replace(
            fast.mimic, iterations=ITERATIONS, final_iterations=ITERATIONS, batch_size=4
        ),
    )


def compress_and_run(user: UserModel, k: int, seed: int) -> dict[str, Any]:
    """Compresses a network, runs it, exports what was compressed and measures it.

    Raises:
        FxpruneError: A stage refused the network, or the exported file disagrees with torch.
        MeasurementError: The latency in the report was not measured.
    """
    model, loader = user.build().eval(), user.loader()
    begun = time.perf_counter()
    small = fxprune.compress(
        model,
        loader,
        k=k,
        recipe=recipe(),
        submodule=user.submodule,
        seed=seed,
        progress=False,
        **user.settings,
    )
    seconds = time.perf_counter() - begun
    made = fxprune.report(small)
    latency = made.latency
    with torch.inference_mode():
        user.call(small, loader[0])
    part = small if user.submodule is None else small.get_submodule(user.submodule)
    with tempfile.TemporaryDirectory() as folder:
        record = fxprune.export_onnx(part, Path(folder) / "part.onnx")
    exported = any(isinstance(node.target, OpOverload) for node in _graph_of(part).graph.nodes)
    return {
        "part": user.submodule or "",
        "front_end": "export" if exported else "fx",
        "regions": len(made.plan.scores),
        "chosen": list(made.plan.chosen),
        "parameters": made.parameters,
        "ratio": latency.ratio,
        "part_ratio": None if made.part_latency is None else made.part_latency.ratio,
        "interval": dataclasses.asdict(latency.interval),
        "fold_error": made.fold_error,
        "onnx_max_abs_diff": record.max_abs_diff,
        "seconds": seconds,
        "notes": list(made.notes),
    }


def _graph_of(part: nn.Module) -> fx.GraphModule:
    return next(module for module in part.modules() if isinstance(module, fx.GraphModule))


def _print(entries: Mapping[str, Any]) -> None:
    rows = [
        {"network": name, **row, "low": row["interval"]["low"], "high": row["interval"]["high"]}
        for name, row in entries.items()
    ]
    names = {
        "network": "network",
        "part": "part",
        "front end": "front_end",
        "regions": "regions",
        "cut": "chosen",
    }
    latency = {"latency ratio": "ratio", "95 % from": "low", "to": "high", "of the part": "part_ratio"}
    print_rows(rows, {**names, **latency, "fold": "fold_error", "onnx": "onnx_max_abs_diff", "s": "seconds"})


if __name__ == "__main__":
    main()
