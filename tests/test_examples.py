"""What networks that are only named take, and how they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import OptionError
from fxprune.export.onnx_file import export_onnx
from fxprune.sources.examples import inputs_of, positional_network
from tests.doubles import brief, count_latency
from tests.tiny import images, tiny

FACTORY = f"{Path(__file__).parent / 'tiny.py'}:tiny"


class Named(nn.Module):
    """Takes its images by a name, and may take more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None
        x = self.stem(pixel_values)
        return self.head((x + self.branch(x).relu()).mean((2, 3)))


def test_a_folder_says_what_its_network_takes_and_is_called_by_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_latency(monkeypatch)
    folder = str(tmp_path / "out")
    batch = {"pixel_values": images(4)}
    fxprune.compress(Named().eval(), [batch], regions=["branch"], recipe=brief(), out=folder)
    (x,) = inputs_of([FACTORY, folder], batch=3)
    assert x.shape == (3, *images(1).shape[1:])
    assert torch.equal(positional_network(folder)(x), fxprune.load(folder)(pixel_values=x))


def test_networks_that_take_different_inputs_are_named(tmp_path: Path) -> None:
    path = str(tmp_path / "tiny.onnx")
    export_onnx(tiny(), path, [images(2)], verify=False)
    assert inputs_of([FACTORY, path], batch=2)[0].shape == images(2).shape
    with pytest.raises(OptionError, match="give --input-shape"):
        inputs_of([FACTORY, FACTORY])
    (x,) = inputs_of([FACTORY, FACTORY], shapes=[(2, 3, 9, 9)])
    assert x.shape == (2, 3, 9, 9) and torch.equal(x, inputs_of([FACTORY], shapes=[(2, 3, 9, 9)])[0])
