"""What a graphics card says of its clocks, for a record: a time on one that slowed down means little."""

from __future__ import annotations

import subprocess

import torch

__all__ = ["card_state"]

_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_SLOWED = (
    "sw_power_cap",
    "hw_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "sw_thermal_slowdown",
)
_SECONDS = 20


def card_state(place: torch.device) -> dict[str, object] | str:
    """Clocks in MHz, temperature in degrees Celsius, power in watts and what holds the clocks down, by nvidia-smi.

    Returns:
        In place of them a sentence where nothing can be known.
    """
    asked = [*_STATE, *(f"clocks_event_reasons.{name}" for name in _SLOWED)]
    try:
        card = f"GPU-{torch.cuda.get_device_properties(place).uuid}"  # numbers differ from CUDA's
        said = subprocess.run(
            ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"not recorded: {error}"
    values = [value.strip() for value in said.stdout.strip().split(",")]
    if said.returncode or len(values) != len(asked):
        return f"not recorded: nvidia-smi says {' '.join((said.stdout + said.stderr).split())!r}"
    state, slowed = values[: len(_STATE)], values[len(_STATE) :]
    return {
        **{name: _number(value) for name, value in zip(_STATE, state, strict=True)},
        "slowed_by": [name for name, value in zip(_SLOWED, slowed, strict=True) if value == "Active"],
    }


def _number(value: str) -> float | None:
    """None where the card does not say, as `[N/A]`."""
    try:
        return float(value)
    except ValueError:
        return None
