"""Networks that users bring and that published pruning code refuses, each through the whole of `compress`.

    python -m benchmarks.stories [--only retinanet_resnet50_fpn,hugging_face_vit]

Parts of torchvision's detectors and of RAFT, a torchvision ViT, and a Hugging Face ViT (when transformers is
installed). Weights and images are random, so accuracy means nothing here; what counts is that two regions are cut,
that the result runs, that its ONNX file agrees with torch, and what time it saves. Few iterations are enough for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

import fxprune
from benchmarks import environment, subjects
from fxprune.options import RECIPES, Recipe
from fxprune.processes.threads import using_threads
from fxprune.reports.tables import render

__all__ = ["STORIES", "Story", "main"]

ITERATIONS = 4


@dataclass(frozen=True)
class Story:
    """One network and how it is called.

    Attributes:
        build: Makes the whole model.
        loader: Makes its calibration batches.
        submodule: The part to compress, None for the whole.
        settings: Further arguments of `compress`.
        call: Runs the whole model on a loader's batch.
    """

    build: Callable[[], nn.Module]
    loader: Callable[[], list[Any]]
    submodule: str | None
    settings: Mapping[str, Any]
    call: Callable[[nn.Module, Any], Any]


def _detector(name: str) -> nn.Module:
    small = {} if name.startswith("ssd") else {"min_size": 256, "max_size": 256}
    model: nn.Module = models.get_model(name, weights=None, weights_backbone=None, **small)
    return model


def _pictures(size: int, images: int) -> list[Any]:
    """Batches of two pictures and their (empty) targets, as detectors' loaders give them."""
    return [(list(pair), [{}] * 2) for pair in torch.rand(images // 2, 2, 3, size, size)]


def _vision_transformer() -> nn.Module:
    model = models.vit_b_32(weights=None)
    assert isinstance(model.heads.head, nn.Linear)
    # zeros, as torchvision has them, would hide every difference
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def _hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=224
    )
    return ViTForImageClassification(config)


def _of_first(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def _on_detector(
    name: str, part: str, size: int, images: int, kinds: tuple[str, ...] = ("identity",)
) -> Story:
    return Story(
        partial(_detector, name),
        partial(_pictures, size, images),
        part,
        {"kinds": kinds, "latency_batch": 1},
        _of_first,
    )


STORIES: Mapping[str, Story] = {
    "fasterrcnn_resnet50_fpn": _on_detector("fasterrcnn_resnet50_fpn", "backbone.body", 256, 16),
    "retinanet_resnet50_fpn": _on_detector("retinanet_resnet50_fpn", "backbone.body", 256, 16),
    "ssd300_vgg16": _on_detector("ssd300_vgg16", "backbone", 300, 4, ("identity", "sequential")),
    "raft_small": Story(
        lambda: models.optical_flow.raft_small(weights=None),
        lambda: list(torch.rand(4, 2, 2, 3, 128, 128)),
        "feature_encoder",
        {"input_fn": tuple, "latency_batch": 2},
        lambda model, frames: model(*frames),
    ),
    "vit_b_32": Story(
        _vision_transformer,
        lambda: list(torch.rand(2, 8, 3, 224, 224)),
        None,
        {"latency_batch": 1},
        lambda model, batch: model(batch),
    ),
    "hugging_face_vit": Story(
        _hugging_face,
        lambda: [{"pixel_values": batch} for batch in torch.rand(4, 4, 3, 224, 224)],
        None,
        {"latency_batch": 1},
        lambda model, batch: model(**batch),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stories, print the table and leave JSON in `benchmarks/results/stories.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stories", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", type=subjects.words, default=tuple(STORIES), help=f"of {','.join(STORIES)}")
    parser.add_argument("--k", type=int, default=2, help="regions to cut (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", help="name of the result file")
    arguments = parser.parse_args(argv)
    settings = {"k": arguments.k, "threads": arguments.threads, "versions": environment.versions()}
    notebook = subjects.Notebook(arguments.out or "stories", settings, arguments.seed)
    with using_threads(arguments.threads):
        for name in arguments.only:
            torch.manual_seed(arguments.seed)
            figures = notebook.entries.get(name) or tell(STORIES[name], arguments.k, arguments.seed)
            notebook.put(name, figures)
            print(f"{name}: without {', '.join(figures['chosen'])}", flush=True)
    print(_table(notebook.entries))


def recipe() -> Recipe:
    """The default recipe, cut down to a few iterations."""
    fast = RECIPES["fast"]
    return dataclasses.replace(
        fast,
        adaptor=dataclasses.replace(fast.adaptor, iterations=ITERATIONS, batch_size=4),
        mimic=dataclasses.replace(fast.mimic, iterations=ITERATIONS, batch_size=4),
    )


def tell(story: Story, k: int, seed: int) -> dict[str, Any]:
    """Compress a network, run it, export what was compressed and measure it.

    Raises:
        FxpruneError: A stage refused the network, or the exported file disagrees with torch.
        MeasurementError: The latency in the report was not measured.
    """
    model, loader = story.build().eval(), story.loader()
    begun = time.perf_counter()
    small = fxprune.compress(
        model,
        loader,
        k=k,
        recipe=recipe(),
        submodule=story.submodule,
        seed=seed,
        progress=False,
        **story.settings,
    )
    seconds = time.perf_counter() - begun
    made = fxprune.report(small)
    latency = made.latency
    with torch.inference_mode():
        story.call(small, loader[0])
    part = small if story.submodule is None else small.get_submodule(story.submodule)
    with tempfile.TemporaryDirectory() as folder:
        record = fxprune.export_onnx(part, Path(folder) / "part.onnx")
    return {
        "part": story.submodule or "",
        "regions": len(made.plan.scores),
        "chosen": list(made.plan.chosen),
        "parameters": made.parameters,
        "ratio": latency.ratio,
        "interval": dataclasses.asdict(latency.interval),
        "fold_error": made.fold_error,
        "onnx_max_abs_diff": record.max_abs_diff,
        "seconds": seconds,
        "notes": list(made.notes),
    }


def _table(entries: Mapping[str, Any]) -> str:
    headers = ("network", "part", "regions", "cut", "latency ratio", "95 % interval", "fold", "onnx", "s")
    rows = []
    for name, row in entries.items():
        between = f"{row['interval']['low']:.3f} to {row['interval']['high']:.3f}"
        errors = [
            f"{row[key]:.1e}" if row[key] is not None else "" for key in ("fold_error", "onnx_max_abs_diff")
        ]
        cut = ", ".join(row["chosen"])
        rows.append(
            (
                name,
                row["part"],
                row["regions"],
                cut,
                f"{row['ratio']:.3f}",
                between,
                *errors,
                f"{row['seconds']:.0f}",
            )
        )
    return render(headers, rows)


if __name__ == "__main__":
    main()
