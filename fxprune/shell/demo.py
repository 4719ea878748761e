"""The embedded demonstration: real handwritten digits, a network trained on the spot, all of it measured.

scikit-learn ships 1,797 scans of handwritten digits (8x8 grey levels; Alpaydin and Kaynak 1998), so nothing
is downloaded. A small residual network learns them, is compressed with 100 images whose labels are not looked
at, and is compared with what it came from on digits that neither training nor compression has seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

import fxprune
from fxprune.backends import Backend
from fxprune.errors import SourceError
from fxprune.files import check_writable, write_json_atomic
from fxprune.measurements import LatencyComparison
from fxprune.processes.threads import default_threads, using_threads
from fxprune.reports.tables import render

__all__ = ["Digits", "DigitsNet", "load_digits", "run", "train"]

EPOCHS = 10
BATCH = 64
HELD_OUT = 500
CALIBRATION = 100
DROPS = 3
BACKENDS: tuple[Backend, ...] = ("torch", "onnxruntime-cpu")


@dataclass(frozen=True, slots=True)
class Digits:
    """Two sets of digits with nothing in common: images `[N, 1, 16, 16]` in [-1, 1], labels `[N]`."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def _normalised(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """A basic block, with a 1x1 projection beside it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = _normalised(inputs, outputs, 3, stride)
        self.branch = nn.Sequential(first, nn.ReLU(), _normalised(outputs, outputs, 3))
        same = inputs == outputs
        self.projection = nn.Identity() if same else _normalised(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x) + self.projection(x))


class DigitsNet(nn.Module):
    """A residual network of three stages of three basic blocks, for grey images `[N, 1, 16, 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _normalised(1, 16, 3)
        self.stage1 = _stage(16, 16, stride=1)
        self.stage2 = _stage(16, 32, stride=2)
        self.stage3 = _stage(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, 1, 16, 16]` to logits `[N, 10]`."""
        x = functional.relu(self.stem(x))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(inputs, outputs, stride), _Block(outputs, outputs, 1), _Block(outputs, outputs, 1)
    )


def load_digits(seed: int) -> Digits:
    """Loads scikit-learn's digits, enlarged to 16x16, and holds 500 of them back, which `seed` chooses.

    Raises:
        SourceError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SourceError(
            "the demo needs scikit-learn, which brings the handwritten digits and is not installed: "
            'pip install "fxprune[demo]"'
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8.0 - 1.0
    images = functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
    targets = torch.as_tensor(labels, dtype=torch.long)
    return Digits(images[seen], targets[seen], images[held_out], targets[held_out])


def train(digits: Digits, *, seed: int, epochs: int = EPOCHS, progress: bool = True) -> DigitsNet:
    """Trains the network from nothing, by SGD with one cycle of the learning rate.

    Args:
        digits: The first set is learnt; the held-out one is not looked at.
        seed: Of the weights and of the order of the images.
        epochs: Passes over the training images.
        progress: Whether a bar shows.

    Returns:
        The network in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet().train()
        batches = len(digits.images) // BATCH
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * batches)
        with tqdm(total=epochs * batches, desc="train", unit="step", disable=not progress) as bar:
            for _ in range(epochs):
                # The last batch, an incomplete one, may be too small for batch norm: it is left out.
                for index in torch.randperm(len(digits.images))[: batches * BATCH].view(batches, BATCH):
                    loss = functional.cross_entropy(model(digits.images[index]), digits.labels[index])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    optimizer.step()
                    schedule.step()
                    bar.update()
    return model.eval()


def run(out: Path, *, seed: int = 0, threads: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Trains, compresses, exports, verifies and measures; writes everything into `out`.

    Args:
        out: Folder for what `compress` writes there, and for these figures, `demo.json`.
        seed: Of the split, the training and the compression.
        threads: Torch's threads meanwhile; by default as for `fxprune.compress`.
        progress: Whether bars show.

    Returns:
        All figures, JSON-able; `table` is a text for the terminal.

    Raises:
        ArtifactError: If `out` cannot be written.
        SourceError: If scikit-learn is not installed.
    """
    started = time.perf_counter()
    check_writable(out)
    digits = load_digits(seed)
    with using_threads(threads or default_threads()):
        model = train(digits, seed=seed, progress=progress)
        trained_s = time.perf_counter() - started
        small = fxprune.compress(
            model,
            digits.images[:CALIBRATION],
            k=DROPS,
            labels=[(digits.held_out_images, digits.held_out_labels)],
            latency_batch=BATCH,
            out=out,
            onnx=True,
            seed=seed,
            threads=threads,
            progress=progress,
        )
        example = digits.held_out_images[:BATCH]
        backends = tqdm(BACKENDS, desc="measure", disable=not progress)
        latency = {
            name: _latency(fxprune.measure(model, small, inputs=example, backend=name)) for name in backends
        }
    report = fxprune.report(small)
    figures = {"seed": seed, **_quality(model, small, digits)}
    figures |= {
        "dropped": list(report.plan.chosen),
        "latency": latency,
        "fold_error": report.fold_error,
        "seconds": {"train": trained_s, **report.durations, "all": time.perf_counter() - started},
    }
    figures["table"] = _table(figures)
    write_json_atomic(out / "demo.json", figures)
    return figures


def _quality(model: nn.Module, small: nn.Module, digits: Digits) -> dict[str, Any]:
    """What can be said without a clock: how often both networks are right, and their sizes."""
    with torch.inference_mode():
        before, after = (network(digits.held_out_images).argmax(1) for network in (model, small))

    def share(hits: Tensor) -> float:
        return int(hits.sum()) / len(hits)

    def size(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    labels = digits.held_out_labels
    return {
        "images": {"training": len(digits.images), "calibration": CALIBRATION, "held_out": HELD_OUT},
        "accuracy": {"before": share(before == labels), "after": share(after == labels)},
        "agreement": share(before == after),
        "parameters": {"before": size(model), "after": size(small)},
    }


def _latency(comparison: LatencyComparison) -> dict[str, Any]:
    interval = comparison.interval
    return {
        "before_s": comparison.before.median_s,
        "after_s": comparison.after.median_s,
        "ratio": comparison.ratio,
        "interval": [interval.low, interval.high],
        "device": comparison.after.device,
        "batch": comparison.after.batch_shape[0],
        "threads": comparison.after.threads,
    }


def _table(figures: dict[str, Any]) -> str:
    accuracy, parameters = figures["accuracy"], figures["parameters"]
    rows = [
        ("held-out accuracy", f"{accuracy['before']:.1%}", f"{accuracy['after']:.1%}", ""),
        ("same class named", "", f"{figures['agreement']:.1%}", ""),
        ("parameters", f"{parameters['before']:,}", f"{parameters['after']:,}", ""),
    ]
    for name, latency in figures["latency"].items():
        low, high = latency["interval"]
        before, after = (f"{latency[key] * 1e3:.2f} ms" for key in ("before_s", "after_s"))
        ratio = f"{latency['ratio']:.2f} of the time (95 %: {low:.2f} to {high:.2f})"
        rows.append((f"{name}, {latency['batch']} images", before, after, ratio))
    rows.append(("dropped", "", ", ".join(figures["dropped"]), ""))
    return render(("", "original", "compressed", ""), rows)
