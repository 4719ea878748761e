"""Every motif yields exactly the regions and rejections derived by hand, through both front ends."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import fxprune
from benchmarks.judges.hooked_reference import NoBypass, call, find_bypass, run_bypassed
from fxprune.graph.regions import Discovery, Kind, Reason, Region, Rejection
from fxprune.passes import DropRegions
from tests.motifs import MOTIFS, Cut, Motif, Refusal

ALL_KINDS = ("identity", "projection", "sequential")
DENSE = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear, torch.nn.MultiheadAttention)
CASES = [pytest.param(m, end, id=f"{m.name}-{end}") for m in MOTIFS for end in m.front_ends]
NAMES = {m.name: m for m in MOTIFS}


@cache
def traced(motif: Motif, front_end: str) -> tuple[torch.nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = motif.build().eval()
    return model, fxprune.trace(model, motif.inputs(), front_end=front_end)


@cache
def found(motif: Motif, front_end: str) -> tuple[torch.nn.Module, fx.GraphModule, Discovery]:
    model, gm = traced(motif, front_end)
    return model, gm, fxprune.discover(gm, kinds=ALL_KINDS)


def of_kind(discovery: Discovery, kind: Kind) -> list[Region]:
    return [region for region in discovery.regions if region.kind is kind]


def dense_paths(model: torch.nn.Module, region: Region) -> tuple[str, ...]:
    """The region's dense operators of the original network; inside a MultiheadAttention, the attention."""
    modules = dict(model.named_modules())
    paths: set[str] = set()
    for path in region.modules:
        parts = path.split(".")
        owners = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        paths.update([o for o in owners if isinstance(modules.get(o), DENSE)][:1])
    return tuple(sorted(paths))


def exit_name(gm: fx.GraphModule, region: Region) -> str:
    node = next(n for n in gm.graph.nodes if n.name == region.exit)
    target = gm.get_submodule(node.target) if node.op == "call_module" else node.target
    name = type(target).__name__ if node.op == "call_module" else getattr(target, "__name__", str(target))
    return "add" if "add" in name else "act"


def as_cuts(
    model: torch.nn.Module, gm: fx.GraphModule, regions: list[Region]
) -> list[tuple[str, tuple[str, ...], str]]:
    return sorted((r.label.partition("#")[0], dense_paths(model, r), exit_name(gm, r)) for r in regions)


def expected_cuts(
    cuts: tuple[Cut, ...], seen: list[tuple[str, tuple[str, ...], str]]
) -> list[tuple[str, tuple[str, ...], str]]:
    """The expectation in the form of `as_cuts`; an open label is taken from the region's operators."""
    labels = {dense: label for label, dense, _ in seen}
    rows = []
    for cut in cuts:
        dense = tuple(sorted(cut.dense))
        rows.append((labels.get(dense, "?") if cut.label is None else cut.label, dense, cut.exit))
    return sorted(rows)


def matches(refusal: Refusal, rejection: Rejection) -> bool:
    inside = (
        not refusal.label
        or rejection.label == refusal.label
        or rejection.label.startswith(f"{refusal.label}.")
    )
    return rejection.reason in refusal.reasons and inside


def run_values(gm: fx.GraphModule, inputs: Any) -> dict[str, Any]:
    """Every node's value, recorded by an interpreter of its own."""
    values: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    order = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    if isinstance(inputs, dict):
        arguments = [inputs[str(name)] for name in order]
    else:
        arguments = list(inputs) if isinstance(inputs, tuple) else [inputs]
    # An exported graph flattens its inputs and outputs; the interpreter is to see them as the graph has them.
    with torch.no_grad():
        Recorder(gm).run(*arguments, enable_io_processing=False)
    return values


def holds_floats(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, (tuple, list)) and any(holds_floats(v) for v in value)


def data_nodes(gm: fx.GraphModule, inputs: Any) -> set[fx.Node]:
    """Nodes whose float values depend on the input's floats: neither parameters nor sizes."""
    values = run_values(gm, inputs)
    data: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "output" or not holds_floats(values[node.name]):
            continue
        if node.op == "placeholder" or any(n in data for n in node.all_input_nodes):
            data.add(node)
    return data


def check_single_entry_single_exit(gm: fx.GraphModule, region: Region, data: set[fx.Node]) -> None:
    nodes = {n.name: n for n in gm.graph.nodes}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    body = [nodes[name] for name in region.body]
    entry, exit_, bypass = nodes[region.entry], nodes[region.exit], nodes[region.bypass]
    assert entry not in body
    assert exit_ in body
    assert [order[n] for n in body] == sorted(order[n] for n in body)
    for node in (n for n in body if n in data):  # others read sizes and parameters
        allowed = {entry, bypass, *body}
        strangers = [n for n in node.all_input_nodes if n in data and n not in allowed]
        assert not strangers, f"{node} reads {strangers} beside the entry {entry}"
        if node is not exit_ and node is not bypass:
            outside = [u for u in node.users if u not in body and (u in data or u.op == "output")]
            assert not outside, f"{node} inside {region.label} is used by {outside}"


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_regions_are_exactly_the_expected_ones(motif: Motif, front_end: str) -> None:
    model, gm, discovery = found(motif, front_end)
    for kind, cuts in ((Kind.IDENTITY, motif.identity), (Kind.PROJECTION, motif.projection)):
        seen = as_cuts(model, gm, of_kind(discovery, kind))
        assert seen == expected_cuts(cuts, seen), kind
    if motif.sequential is not None:
        chains = [dense_paths(model, r) for r in of_kind(discovery, Kind.SEQUENTIAL)]
        assert sorted(chains) == sorted((path,) for path in motif.sequential)


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_rejections_are_exactly_the_expected_ones(motif: Motif, front_end: str) -> None:
    _, gm, discovery = found(motif, front_end)
    left = list(discovery.rejections)
    for refusal in motif.rejections:
        hit = next((r for r in left if matches(refusal, r)), None)
        assert hit is not None, f"no rejection for {refusal}; there are {discovery.rejections}"
        left.remove(hit)
    assert not left
    nodes = {n.name for n in gm.graph.nodes}
    for rejection in discovery.rejections:
        assert rejection.exit in nodes
        assert rejection.entry in nodes | {""}
        assert nodes.issuperset(rejection.nodes)
        assert rejection.detail


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_regions_have_one_entry_and_one_exit(motif: Motif, front_end: str) -> None:
    _, gm, discovery = found(motif, front_end)
    data = data_nodes(gm, motif.inputs())
    for region in discovery.regions:
        check_single_entry_single_exit(gm, region, data)


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_entry_bypass_and_exit_have_one_shape(motif: Motif, front_end: str) -> None:
    _, gm, discovery = found(motif, front_end)
    values = run_values(gm, motif.inputs())
    for region in discovery.regions:
        bypass, exit_ = values[region.bypass], values[region.exit]
        assert bypass.shape == exit_.shape
        assert bypass.dtype == exit_.dtype
        assert tuple(exit_.shape) == region.shape
        assert str(exit_.dtype) == region.dtype
        assert (region.bypass == region.entry) == (region.kind is not Kind.PROJECTION)


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_dropping_equals_the_original_without_the_branch(motif: Motif, front_end: str) -> None:
    model, gm, discovery = found(motif, front_end)
    if motif.name == "wider_type":
        pytest.skip("casts to float32 by itself, so it has no form in double precision")
    model, gm = copy.deepcopy(model).double(), copy.deepcopy(gm).double()
    inputs = pytree.tree_map_only(torch.Tensor, Tensor.double, motif.inputs())
    for region in discovery.regions:
        bypass = find_bypass(model, gm, region, inputs)
        if isinstance(bypass, NoBypass):
            assert region.kind is Kind.SEQUENTIAL or len(region.modules) > 1, bypass.reason
            continue
        dropped = copy.deepcopy(gm)
        DropRegions((region,))(dropped)
        expected = pytree.tree_leaves(run_bypassed(model, bypass, inputs))
        with torch.no_grad():
            seen = pytree.tree_leaves(call(dropped, copy.deepcopy(inputs)))
        for one, other in zip(expected, seen, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_default_finds_the_identity_regions_and_says_what_else_there_was(
    motif: Motif, front_end: str
) -> None:
    model, gm = traced(motif, front_end)
    default, everything = fxprune.discover(gm), fxprune.discover(gm, kinds=ALL_KINDS)
    assert as_cuts(model, gm, list(default.regions)) == as_cuts(model, gm, of_kind(everything, Kind.IDENTITY))
    not_asked = Counter(r.exit for r in default.rejections if r.reason is Reason.KIND)
    assert {r.exit for r in of_kind(everything, Kind.PROJECTION)} <= set(not_asked)
    assert not [r for r in everything.rejections if r.reason is Reason.KIND]


@pytest.mark.parametrize(("motif", "front_end"), CASES)
def test_labels_are_unique(motif: Motif, front_end: str) -> None:
    labels = [r.label for r in found(motif, front_end)[2].regions]
    assert len(labels) == len(set(labels))
    assert all(labels)


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_branches_of_a_layer_are_named_after_what_is_in_them(front_end: str) -> None:
    model, _, discovery = found(NAMES["transformer_unpacked"], front_end)
    regions = {r.label: dense_paths(model, r) for r in of_kind(discovery, Kind.IDENTITY)}
    assert set(regions) == {"block", "block.attn", "block.mlp"}
    assert regions["block.attn"] == ("block.attn.proj", "block.attn.qkv")
    assert regions["block.mlp"] == ("block.mlp.fc1", "block.mlp.fc2")


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("name", ["projection", "projection_average", "option_a"])
def test_a_projection_region_keeps_its_shortcut(name: str, front_end: str) -> None:
    _, gm, discovery = found(NAMES[name], front_end)
    (region,) = of_kind(discovery, Kind.PROJECTION)
    assert not [path for path in region.modules if "shortcut" in path]
    assert region.bypass in {n.name for n in gm.graph.nodes}


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_composite_overlaps_its_branches_and_they_not_each_other(front_end: str) -> None:
    discovery = found(NAMES["transformer_unpacked"], front_end)[2]
    by_label = {r.label: r for r in of_kind(discovery, Kind.IDENTITY)}
    assert by_label["block"].overlaps(by_label["block.attn"])
    assert by_label["block"].overlaps(by_label["block.mlp"])
    assert not by_label["block.attn"].overlaps(by_label["block.mlp"])


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_names_of_motifs_are_unique_and_records_survive_a_copy(front_end: str) -> None:
    assert len(NAMES) == len(MOTIFS)
    motif = NAMES["nested"]
    _, gm = traced(motif, front_end)
    assert fxprune.discover(gm) == fxprune.discover(gm)
