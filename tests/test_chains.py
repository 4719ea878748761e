"""Chains of operators that keep their input's shape: what may be cut besides residual blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Chains(nn.Module):
    """Two convolutions in a residual branch: the first reads what the join reads, the second has its source alone."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.between = between
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.second(self.first(self.between(x)).relu())


@pytest.mark.parametrize(
    "between", [nn.Sequential(), nn.Identity(), nn.Sequential(nn.Identity(), nn.Dropout())]
)
def test_a_source_that_something_else_reads_begins_no_chain(between: nn.Module) -> None:
    gm = fxprune.trace(Chains(between).eval(), torch.zeros(2, 3, 8, 8))
    found = fxprune.discover(gm, kinds="sequential")
    assert [region.label for region in found.regions] == ["second"]


class Behind(Chains):
    """The same, the join behind what lies in between."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.stem(x))
        return x + self.second(self.first(x).relu())


def test_an_identity_that_something_else_reads_begins_no_chain() -> None:
    gm = fxprune.trace(Behind(nn.Sequential(nn.Identity(), nn.Dropout())).eval(), torch.zeros(2, 3, 8, 8))
    found = fxprune.discover(gm, kinds="sequential")
    assert [region.label for region in found.regions] == ["second"]
