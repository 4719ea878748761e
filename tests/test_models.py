"""Known networks hold as many regions as their architectures say, whatever the modules are called."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

import fxprune
from fxprune.graph.regions import Discovery, Kind, Region
from tests.expected_counts import EXPECTED, Expected


def build(row: Expected) -> nn.Module:
    """The network with random weights, in evaluation mode."""
    library, _, name = row.name.partition(":")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            timm = pytest.importorskip("timm")
            return timm.create_model(name, pretrained=False, **row.options).eval()
        models = importlib.import_module("torchvision.models")
        return models.get_model(name, weights=None, **row.options).eval()


def is_composite(region: Region, discovery: Discovery) -> bool:
    """Whether the region ends where a smaller identity region inside it ends: several branches in a row."""
    body = set(region.body)
    inner = (
        r for r in discovery.regions if r.kind is Kind.IDENTITY and r != region and r.exit == region.exit
    )
    return any(body.issuperset(r.body) for r in inner)


def counts(discovery: Discovery) -> dict[str, int]:
    identity = [r for r in discovery.regions if r.kind is Kind.IDENTITY]
    layers = sum(is_composite(r, discovery) for r in identity)
    kinds = Counter(r.kind.value for r in discovery.regions)
    return {
        "identity": len(identity) - layers,
        "layers": layers,
        "projection": kinds["projection"],
        "sequential": kinds["sequential"],
    }


def check(row: Expected) -> None:
    gm = fxprune.trace(build(row), torch.randn(2, *row.size))
    discovery = fxprune.discover(gm, kinds=("identity", "projection", "sequential"))
    expected = {
        "identity": row.identity,
        "layers": row.layers,
        "projection": row.projection,
        "sequential": row.sequential,
    }
    wanted = {kind: count for kind, count in expected.items() if count is not None}
    seen = {kind: count for kind, count in counts(discovery).items() if kind in wanted}
    assert seen == wanted
    labels = [region.label for region in discovery.regions]
    assert len(labels) == len(set(labels))
    for rejection in discovery.rejections:
        assert rejection.detail


@pytest.mark.parametrize("row", [r for r in EXPECTED if r.fast], ids=lambda r: r.name)
def test_counts_of_the_classics(row: Expected) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in EXPECTED if not r.fast], ids=lambda r: r.name)
def test_counts_of_the_others(row: Expected) -> None:
    check(row)


def test_the_table_names_each_network_once_and_is_long_enough() -> None:
    names = [row.name for row in EXPECTED]
    assert len(names) == len(set(names))
    assert len(names) >= 30


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_both_front_ends_agree(name: str) -> None:
    row = next(r for r in EXPECTED if r.name == f"torchvision:{name}")
    model, example = build(row), torch.randn(2, *row.size)
    kinds = ("identity", "projection")
    seen = [
        [
            (r.label, r.kind, r.shape)
            for r in fxprune.discover(fxprune.trace(model, example, front_end=end), kinds=kinds).regions
        ]
        for end in ("fx", "export")
    ]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_network_without_its_names_has_the_same_regions(name: str) -> None:
    row = next(r for r in EXPECTED if r.name == f"torchvision:{name}")
    gm = fxprune.trace(build(row), torch.randn(2, *row.size))
    before = counts(fxprune.discover(gm, kinds=("identity", "projection", "sequential")))
    for index, node in enumerate(list(gm.graph.nodes)):
        if node.op not in ("placeholder", "output"):
            node.name = f"n{index}"
    gm.recompile()
    assert counts(fxprune.discover(gm, kinds=("identity", "projection", "sequential"))) == before
