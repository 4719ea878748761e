"""Batches as all kinds of loader yield them: what is passed on, what is left out and said, what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.reading import read_batch
from fxprune.errors import CalibrationError
from fxprune.graph.call import input_names
from fxprune.submodules.capture import capture_inputs
from tests.doubles import brief

X, Y, LABELS = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
HUGGING_FACE = {"pixel_values": False, "labels": False, "output_attentions": False}
PAIR = {"left": True, "right": True, "mask": False}


def read(batch: Any, names: dict[str, bool], index: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = read_batch(batch, index, names=names)
    return inputs.args, inputs.kwargs


@pytest.mark.parametrize(
    ("batch", "names", "args", "kwargs"),
    [
        ({"pixel_values": X, "labels": LABELS}, HUGGING_FACE, (), {"pixel_values": X}),
        ({"pixel_values": X, "label": LABELS, "id": ["a"] * 4}, HUGGING_FACE, (), {"pixel_values": X}),
        ({"x": X, "labels": LABELS}, {"x": True, "labels": True}, (), {"x": X, "labels": LABELS}),
        ({"image": X, "target": Y}, {"x": True}, (X,), {}),
        ({"left": X, "right": Y, "disparity": X}, PAIR, (), {"left": X, "right": Y}),
        ({"left": X, "right": Y, "mask": X}, PAIR, (), {"left": X, "right": Y, "mask": X}),
        ({"right": Y, "left": X}, PAIR, (), {"left": X, "right": Y}),
        ((X, Y), PAIR, (X, Y), {}),
        ((X, Y, LABELS), PAIR, (X, Y), {}),
        (((X, Y), LABELS), PAIR, (X, Y), {}),
        (({"left": X, "right": Y}, LABELS), PAIR, (), {"left": X, "right": Y}),
        ((X, LABELS), {"x": True, "scale": False}, (X,), {}),
    ],
)
def test_what_the_network_requires_is_passed_on_and_labels_are_not(
    batch: Any, names: dict[str, bool], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    found = read(batch, names)
    assert len(found[0]) == len(args) and all(a is b for a, b in zip(found[0], args, strict=True))
    assert list(found[1]) == list(kwargs) and all(found[1][key] is kwargs[key] for key in kwargs)


def test_labels_that_are_left_out_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for index in range(3):
        read({"pixel_values": X, "labels": LABELS}, HUGGING_FACE, index)
    assert [record.message for record in caplog.records] == [
        "Batches are mappings: pixel_values passed on, labels ignored."
    ]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (X, r"network takes left, right: pass input_fn="),
        ((X,), r"network takes left, right: pass input_fn="),
        ({"left": X}, r"keys 'left'.*pass input_fn="),
    ],
)
def test_too_few_inputs_are_refused_with_the_way_out(batch: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        read(batch, PAIR)


def test_batches_of_detectors_lead_to_submodule() -> None:
    with pytest.raises(CalibrationError, match=r"list of tensors, as those of detectors.*submodule="):
        read(([X[0], X[1]], [{}, {}]), {"images": True, "targets": False})


class Pair(nn.Module):
    """Compares two images by one encoder; like Hugging Face's, it would end in its loss if it were given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), _Block(), _Block())

    def forward(self, left: Tensor, right: Tensor, labels: Tensor | None = None) -> Tensor:
        distance = (self.encoder(left) - self.encoder(right)).square().mean((1, 2, 3))
        return distance if labels is None else (distance - labels).square().mean()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


def test_the_names_of_inputs_tell_what_is_required() -> None:
    wanted = {"left": True, "right": True, "labels": False}
    assert input_names(Pair()) == wanted
    gm = fxprune.trace(Pair(), (X, Y))
    assert [name for name, required in input_names(gm).items() if required] == ["left", "right"]

    class Anything(nn.Module):
        def forward(self, *images: Tensor, **options: Any) -> Tensor:
            return images[0]

    assert input_names(Anything()) == {}


@pytest.mark.parametrize("batch", [(X, Y), {"left": X, "right": Y, "labels": LABELS.float()}])
def test_two_inputs_are_compressed_whole_and_in_part(batch: Any) -> None:
    whole = fxprune.compress(Pair(), [batch], regions=["encoder.1#all"], recipe=brief(), progress=False)
    assert whole(X, Y).shape == (4,)
    captured = capture_inputs(Pair(), "encoder", [batch]).images
    assert torch.equal(captured.inputs.args[0], X)
