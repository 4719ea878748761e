from __future__ import annotations

import gc

import pytest

import fxprune
from fxprune.errors import GraphError
from fxprune.timing.collector import collector_paused
from tests.tiny import tiny


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_paused_inside_and_as_before_afterwards(running: bool) -> None:
    try:
        (gc.enable if running else gc.disable)()
        with pytest.raises(ValueError, match="inside"), collector_paused():
            assert not gc.isenabled()
            with collector_paused():
                pass
            assert not gc.isenabled()
            raise ValueError("inside")
        assert gc.isenabled() is running
    finally:
        gc.enable()


def test_a_discovery_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(GraphError, match="no shapes"):
        fxprune.discover(fxprune.trace(tiny()))
    assert gc.isenabled()
