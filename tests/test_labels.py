"""Labels are unique, and `ignore` finds what it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.discovery.labels import with_unique_labels
from fxprune.errors import OptionError
from fxprune.graph.regions import Kind, Reason, Region
from tests.strategies import BlockSpec, NetSpec, Squeeze, image_batch

NET = NetSpec(
    (4, 6),
    (2,),
    (True,),
    (
        (BlockSpec("basic"), BlockSpec("squeeze")),
        (BlockSpec("basic"), BlockSpec("bottleneck"), BlockSpec("inverted", behind=False)),
    ),
)
ALL = ["stages.0.0", "stages.0.1", "stages.1.1", "stages.1.2", "stages.1.3"]


def labels(ignore: Any = (), front_end: str = "fx") -> list[str]:
    gm = fxprune.trace(NET.build(), image_batch(), front_end=front_end)
    found = fxprune.discover(gm, ignore=ignore)
    ignored = {r.label for r in found.rejections if r.reason is Reason.IGNORED}
    assert ignored == set(ALL) - {r.label for r in found.regions}
    return [region.label for region in found.regions]


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        ((), ALL),
        ("stages.0.0", ALL[1:]),
        (["stages.0.0", "stages.1.3"], ALL[1:4]),
        ("stages.0.*", ALL[2:]),
        ("stages.?.1", [ALL[0], ALL[3], ALL[4]]),
        ("*.fc1", [ALL[0], *ALL[2:]]),
        ("stages.[01].1", [ALL[0], ALL[3], ALL[4]]),
        ("stages.1", ALL[:2]),
        ("stages.0.0.branch.0", ALL[1:]),
        ("stages", []),
        ("*", []),
        (nn.ReLU6, ALL[:4]),
        pytest.param(lambda region: region.shape[-1] == 8, ALL[2:], id="predicate"),
        pytest.param(
            ("stages.0", lambda region: region.label.endswith("3")), ALL[2:4], id="label and predicate"
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_what_ignore_names_stays(ignore: Any, kept: list[str], front_end: str) -> None:
    assert labels(ignore, front_end) == kept


def test_a_type_of_the_users_own_is_known_by_where_it_was() -> None:
    assert labels(Squeeze) == [label for label in ALL if label != "stages.0.1"]


@pytest.mark.parametrize(
    "ignore", ["stages.7", ["stages.0.0", "layer*"], nn.LSTM, lambda region: False, "stage"]
)
def test_an_entry_that_matches_nothing_lists_what_there_is(ignore: Any) -> None:
    with pytest.raises(OptionError, match=r"matches no region; the regions are: stages\.0\.0, stages\.0\.1"):
        labels(ignore)


def test_an_entry_of_another_type_is_refused() -> None:
    with pytest.raises(OptionError, match="neither a string"):
        labels([3])
    with pytest.raises(OptionError, match=r"a Linear: give its path, as in ignore='layer1\.0', or its class"):
        labels([nn.Linear(2, 2)])


def region(label: str, *body: str, kind: Kind = Kind.IDENTITY) -> Region:
    return Region("x", body[-1], "x", body, kind, label, (label,), (1, 4), "torch.float32")


def test_a_region_around_the_others_keeps_the_plain_label() -> None:
    found = [region("layer", "a"), region("layer", "b"), region("layer", "a", "b")]
    assert [r.label for r in with_unique_labels(found)] == ["layer#1", "layer#2", "layer"]


def test_branches_are_named_after_their_operators_where_those_tell_them_apart() -> None:
    def branch(end: str, *modules: str) -> Region:
        return replace(region("layer", end), modules=tuple(f"layer.{name}" for name in modules))

    found = [branch("a", "norm1", "attn.qkv", "attn.proj"), branch("b", "norm2", "mlp.0", "mlp.3")]
    norms = {"layer.norm1", "layer.norm2"}
    assert [r.label for r in with_unique_labels(found, norms)] == ["layer.attn", "layer.mlp"]
    assert [r.label for r in with_unique_labels(found)] == ["layer#1", "layer#2"]
    alike = [branch("a", "mlp.0"), branch("b", "mlp.0")]
    assert [r.label for r in with_unique_labels(alike)] == ["layer#1", "layer#2"]
    claimed = [*found, region("layer.mlp", "c")]
    assert [r.label for r in with_unique_labels(claimed, norms)] == ["layer.attn", "layer#1", "layer.mlp"]
    other = [*found, region("layer.mlp", "c", kind=Kind.SEQUENTIAL)]
    assert [r.label for r in with_unique_labels(other, norms)] == ["layer.attn", "layer.mlp", "layer.mlp#1"]


def test_a_class_protects_the_branches_of_its_modules() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x).relu()
            return x + self.mlp(x).relu()

    gm = fxprune.trace(nn.Sequential(Layer(), nn.Linear(4, 4)), torch.randn(2, 4))
    assert [r.label for r in fxprune.discover(gm).regions] == ["0.attn", "0", "0.mlp"]
    assert not fxprune.discover(gm, ignore=Layer).regions


def test_labels_are_unique_whatever_shares_them() -> None:
    found = [
        region("layer", "a"),
        region("layer", "b"),
        region("layer", "c", kind=Kind.PROJECTION),
        region("layer#1", "d"),
        region("other", "e", kind=Kind.SEQUENTIAL),
    ]
    named = [r.label for r in with_unique_labels(found)]
    assert len(set(named)) == len(named)
    assert named[4] == "other"
    assert named[:2] == ["layer#1", "layer#2"] or "layer#1" in named


def test_identity_regions_take_the_plain_label_first() -> None:
    found = [region("block", "a", kind=Kind.SEQUENTIAL), region("block", "a", "b")]
    assert [r.label for r in with_unique_labels(found)] == ["block#1", "block"]


def test_labels_do_not_depend_on_the_batch() -> None:
    gm = fxprune.trace(NET.build(), image_batch(5))
    assert [r.label for r in fxprune.discover(gm).regions] == ALL
    torch.manual_seed(1)
    assert [r.label for r in fxprune.discover(fxprune.trace(NET.build(), image_batch(1))).regions] == ALL
