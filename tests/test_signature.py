"""Regions of one signature save the same time."""

from __future__ import annotations

import fxprune
from fxprune.timing.savings import signature
from tests.strategies import BlockSpec, NetSpec, image_batch


def signatures(spec: NetSpec, size: int = 8, front_end: str = "fx") -> dict[str, tuple[str, ...]]:
    gm = fxprune.trace(spec.build(), image_batch(size=size), front_end=front_end)
    return {region.label: signature(gm, region) for region in fxprune.discover(gm).regions}


def test_equal_blocks_have_one_signature_and_others_their_own() -> None:
    basic = BlockSpec("basic")
    found = signatures(
        NetSpec((4, 4), (2,), (False,), ((basic, basic, BlockSpec("bottleneck")), (basic, basic)))
    )
    assert found["stages.0.0"] == found["stages.0.1"]
    assert found["stages.1.1"] == found["stages.1.2"]
    assert len({found["stages.0.0"], found["stages.0.2"], found["stages.1.1"]}) == 3


def test_width_norm_and_size_count() -> None:
    one = signatures(NetSpec((4,), (), (), ((BlockSpec("basic"), BlockSpec("basic", norm=False)),)))
    assert one["stages.0.0"] != one["stages.0.1"]
    two = signatures(NetSpec((5,), (), (), ((BlockSpec("basic"),),)))
    larger = signatures(NetSpec((4,), (), (), ((BlockSpec("basic"),),)), size=12)
    assert len({one["stages.0.0"], two["stages.0.0"], larger["stages.0.0"]}) == 3


def test_exported_graphs_have_signatures_too() -> None:
    basic = BlockSpec("basic")
    spec = NetSpec((4, 4), (2,), (False,), ((basic, basic), (basic,)))
    found = signatures(spec, front_end="export")
    assert found["stages.0.0"] == found["stages.0.1"] != found["stages.1.1"]
    other = signatures(
        NetSpec((4, 4), (2,), (False,), ((BlockSpec("depthwise"),), (basic,))), front_end="export"
    )
    assert other["stages.0.0"] != found["stages.0.0"]
