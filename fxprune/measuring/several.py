"""The same networks on several backends, one after another; one that is not to be had is told, not left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fxprune.backends import runs_modules
from fxprune.errors import DeviceError, MeasurementError, OptionError
from fxprune.measuring import fresh
from fxprune.measuring.record import record, require_loadgen
from fxprune.reports.measurement import all_measured, measurement
from fxprune.timing.rounds import TimingSettings

__all__ = ["measure_networks"]


def measure_networks(
    networks: Sequence[str],
    inputs: Sequence[Tensor],
    backends: Sequence[str],
    *,
    processes: int,
    device: str | None,
    settings: TimingSettings,
    record_in: Path | None = None,
    record_seconds: float = 600.0,
) -> dict[str, Any]:
    """Times networks on backends.

    Args:
        networks: The first, and what is compared with it, by names as in the shell.
        inputs: The tensors of one call.
        backends: Where, one after another.
        processes: In how many processes each.
        device: Of the backends of torch; the others imply theirs.
        settings: How long to measure, in each process.
        record_in: Folder for runs of MLPerf's LoadGen, none by default.
        record_seconds: How long each of these lasts at least.

    Returns:
        What `fxprune measure --json` prints.

    Raises:
        DeviceError: None of the backends is to be had; that is what the first said.
        MeasurementError: Likewise, none of them can run the networks.
        OptionError: As `fresh.compare`; or a device is given that no backend takes, or LoadGen is missing.
    """
    if device is not None and not any(map(runs_modules, backends)):
        raise OptionError(
            f"device={device!r} is of torch's backends; {', '.join(backends)} imply theirs: leave it out"
        )
    if record_in is not None:
        require_loadgen()
    measured, failed = [], {}
    for backend in dict.fromkeys(backends):
        place = device if runs_modules(backend) else None
        try:
            found = fresh.compare(
                networks[0],
                networks[1:],
                inputs,
                processes=processes,
                backend=backend,
                device=place,
                settings=settings,
            )
        except (DeviceError, MeasurementError) as error:
            failed[backend] = error
            continue
        conditions = found.processes[0].conditions
        cards = [one.card for one in found.processes]
        one = measurement(networks, found.comparisons, asdict(settings), conditions, cards)
        if record_in is not None:
            one["record"] = record(
                networks,
                inputs,
                backend,
                record_in,
                seconds=record_seconds,
                device=place,
                threads=settings.threads,
            )
        measured.append(one)
    if not measured:
        raise next(iter(failed.values()))
    return all_measured(measured, {backend: str(error) for backend, error in failed.items()})
