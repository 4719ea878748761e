"""Evaluation mode, of whatever a model is made of, and never of the model itself."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import TraceError
from fxprune.tracing.evaluation import evaluation_copy, to_evaluation


class Holds(nn.Module):
    """A module that holds a graph of torch.export, which refuses both modes."""

    def __init__(self) -> None:
        super().__init__()
        program = torch.export.export(nn.Dropout().eval(), (torch.ones(2, 3),))
        self.body, self.graph = nn.Dropout(), program.module()

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(self.body(x))


def test_a_copy_is_in_evaluation_mode_whatever_it_holds() -> None:
    model = Holds()
    x = torch.ones(2, 3)
    duplicate = evaluation_copy(model)
    assert torch.equal(duplicate(x), x)
    assert not any(module.training for module in duplicate.modules())
    assert model.training and model.body.training
    duplicate.train().eval()


def test_in_place_too() -> None:
    model = Holds()
    with pytest.raises(NotImplementedError):
        model.eval()
    assert to_evaluation(model) is model
    assert torch.equal(model(torch.ones(2, 3)), torch.ones(2, 3))


def test_a_mode_of_the_models_own_is_respected() -> None:
    class Always(nn.Dropout):
        def train(self, mode: bool = True) -> Always:
            return super().train(True)

    assert evaluation_copy(nn.Sequential(Always())).get_submodule("0").training


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TraceError, match="Linear cannot be copied"):
        evaluation_copy(model)
