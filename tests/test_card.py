"""What is recorded of a graphics card's clocks, by an nvidia-smi that answers as told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fxprune.timing.card import card_state

PLACE = torch.device("cuda", 0)


def answering(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """A card with a known name, and an nvidia-smi that notes what it is asked."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(uuid="1234-ab"))


def test_clocks_and_what_holds_them_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = "Not Active, Not Active, Not Active, Not Active, Active"
    answering(monkeypatch, tmp_path, f"echo '1755, 2619, 61, [N/A], {reasons}'")
    assert card_state(PLACE) == {
        "clocks.sm": 1755.0,
        "clocks.mem": 2619.0,
        "temperature.gpu": 61.0,
        "power.draw": None,
        "slowed_by": ["sw_thermal_slowdown"],
    }
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "--id=GPU-1234-ab"
    names = asked[1].removeprefix("--query-gpu=").split(",")
    assert names[:4] == ["clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    assert names[-1] == "clocks_event_reasons.sw_thermal_slowdown"


def test_a_field_that_the_driver_does_not_know_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, tmp_path, "echo 'Field \"x\" is not a valid field to query.'; exit 2")
    state = card_state(PLACE)
    assert isinstance(state, str) and state.startswith("not recorded: ") and "not a valid field" in state


def test_without_the_program_nothing_is_recorded_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, tmp_path, "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    state = card_state(PLACE)
    assert isinstance(state, str) and state.startswith("not recorded: ") and "nvidia-smi" in state
