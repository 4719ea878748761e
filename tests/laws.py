"""How laws are tried: on the same few examples at every run, or on many drawn anew."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

__all__ = ["THOROUGH", "law"]

THOROUGH = "FXPRUNE_THOROUGH"
"""Environment variable with which `python -m tests.check --thorough` has examples drawn anew."""


def law(examples: int = 12) -> Any:
    """Settings of a law; ten times the examples, and shrinking what fails, where they are drawn anew."""
    anew = bool(os.environ.get(THOROUGH))
    quick = (Phase.explicit, Phase.generate)  # shrinking would trace hundreds of networks
    return settings(
        max_examples=10 * examples if anew else examples,
        deadline=None,
        derandomize=not anew,
        database=None,
        phases=tuple(Phase) if anew else quick,
        print_blob=anew,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
