"""The laws of the design, on random networks: what must hold for every graph, every site and every pass."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.export.artifact import load, save
from fxprune.graph.regions import Kind, Region
from fxprune.measurements import Latency, LatencyComparison
from fxprune.passes import (
    Adaptor,
    Canonicalize,
    DropRegions,
    FoldAdaptors,
    FoldBatchNorm,
    FxPass,
    InsertAdaptors,
    PropagateShapes,
)
from fxprune.placement.placement import find_sites
from fxprune.selection.planner import Planner
from fxprune.selection.plans import BlockScore
from fxprune.timing.rounds import Contestant, TimingSettings, race, ratios_by_round
from fxprune.tracing.trace import split_inputs
from tests.doubles import brief, count_latency
from tests.laws import law
from tests.motifs import MOTIFS, Motif
from tests.strategies import (
    BlockSpec,
    NetSpec,
    ResidualNet,
    image_batch,
    net_specs,
    skipped,
)

ALL_KINDS = ("identity", "projection", "sequential")
CASES = [
    pytest.param(m, end, id=f"{m.name}-{end}", marks=[pytest.mark.slow] if end == "export" else [])
    for m in MOTIFS
    for end in m.front_ends
    if m.name != "wider_type"  # its casts fix the types, so that it does not run in float64
]


def traced(spec: NetSpec) -> tuple[ResidualNet, fx.GraphModule, tuple[Region, ...]]:
    net = spec.build()
    gm = fxprune.trace(net, image_batch())
    return net, gm, fxprune.discover(gm).regions


def state(gm: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gm.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def names(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


@torch.no_grad()
def randomise(gm: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in gm.modules():
        if isinstance(module, Adaptor):
            noise = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
            module.weight.add_(noise.to(module.weight.dtype), alpha=0.3)


def leaves(value: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def error(one: Any, other: Any) -> float:
    """Largest difference, relative to the largest value."""
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    scale = max(1.0, *(float(a.abs().max()) for a, _ in pairs))
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


# --- laws 1, 2 and 4: adaptors ---


@law(8)
@given(net_specs(), st.data())
@torch.no_grad()
def test_law_1_identity_adaptors_change_nothing_and_fold_to_nothing(
    spec: NetSpec, data: st.DataObject
) -> None:
    _, gm, regions = traced(spec)
    region = data.draw(st.sampled_from(regions))
    DropRegions([region])(gm) if data.draw(st.booleans()) else None
    sites = find_sites(traced(spec)[1], [region]).sites
    sites = tuple(site for site in sites if site.operator in names(gm))
    before, nodes, answer = state(gm), names(gm), gm(image_batch())
    assert InsertAdaptors(sites)(gm).modified is bool(sites)
    assert torch.equal(gm(image_batch()), answer)
    assert FoldAdaptors()(gm).modified is bool(sites)
    assert same_state(before, state(gm))
    assert names(gm) == nodes
    assert torch.equal(gm(image_batch()), answer)


@law()
@given(net_specs(), st.data())
@torch.no_grad()
def test_law_2_random_adaptors_fold_exactly(spec: NetSpec, data: st.DataObject) -> None:
    _, gm, regions = traced(spec)
    chosen = data.draw(st.lists(st.sampled_from(regions), min_size=1, unique=True))
    sites = find_sites(gm, chosen).sites
    DropRegions(chosen)(gm)
    InsertAdaptors(sites)(gm)
    randomise(gm)
    inserted = gm(image_batch())
    FoldAdaptors()(gm)
    assert error(inserted, gm(image_batch())) <= 1e-10


@law(3)
@given(net_specs())
@torch.no_grad()
def test_law_4_every_site_of_every_region_folds(spec: NetSpec) -> None:
    _, gm, _ = traced(spec)
    for region in fxprune.discover(gm, kinds=ALL_KINDS).regions:
        for site in find_sites(gm, [region]).sites:
            one = copy.deepcopy(gm)
            InsertAdaptors([site])(one)
            randomise(one)
            inserted = one(image_batch())
            FoldAdaptors()(one)
            assert error(inserted, one(image_batch())) <= 1e-10, (region.label, site)


@pytest.mark.parametrize(("motif", "front_end"), CASES)
@torch.no_grad()
def test_law_4_holds_for_every_motif(motif: Motif, front_end: str) -> None:
    torch.manual_seed(0)
    inputs = motif.inputs()
    widened = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    gm = fxprune.trace(motif.build().double().eval(), widened, front_end=front_end)
    args, kwargs = split_inputs(widened)
    for region in fxprune.discover(gm, kinds=ALL_KINDS).regions:
        small = copy.deepcopy(gm)
        sites = find_sites(gm, [region]).sites
        DropRegions([region])(small)
        InsertAdaptors(sites)(small)
        randomise(small)
        inserted = small(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        FoldAdaptors()(small)
        folded = small(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        assert error(inserted, folded) <= 1e-10, region.label


# --- law 3: passes ---


@law(6)
@given(net_specs(), st.data())
@torch.no_grad()
def test_law_3_passes_are_idempotent_and_modified_is_exact(spec: NetSpec, data: st.DataObject) -> None:
    _, gm, _ = traced(spec)
    clean = copy.deepcopy(gm)
    Canonicalize()(clean)
    region = data.draw(st.sampled_from(fxprune.discover(clean).regions))
    sites = find_sites(clean, [region]).sites
    passes: list[FxPass] = [
        PropagateShapes(image_batch()),
        Canonicalize(),
        DropRegions([region]),
        InsertAdaptors(sites),
        FoldAdaptors(),
        FoldBatchNorm(),
    ]
    answer = None
    for rewrite in passes:
        code, before = gm.code, state(gm)
        first = rewrite(gm)
        assert first.modified is (gm.code != code or not same_state(before, state(gm))), rewrite
        code, before = gm.code, state(gm)
        assert rewrite(gm).modified is False, rewrite
        assert gm.code == code
        assert same_state(before, state(gm))
        gm.graph.lint()
        result = gm(image_batch())
        assert answer is None or isinstance(rewrite, DropRegions) or error(answer, result) <= 1e-10
        answer = result


# --- law 5: compress ---


def photograph(model: nn.Module) -> list[Any]:
    """Everything about a module that must stay, tensors apart."""
    return [
        (
            name,
            id(module),
            module.training,
            [*module._forward_hooks],
            [*module._forward_pre_hooks],
            {key: id(value) for key, value in module._parameters.items()},
            [p.requires_grad for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("recipe", ["fast", "practise"])
@law(2)
@given(spec=net_specs())
def test_law_5_compress_leaves_its_input_alone(recipe: str, spec: NetSpec) -> None:
    net = spec.build(torch.float32).train()
    net.head.weight.requires_grad_(False)
    calls: list[int] = []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    images = image_batch(6, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        count_latency(patch)
        before, view = state(net), photograph(net)
        fxprune.compress(net, images, k=1, recipe=brief(recipe), progress=False)
        assert same_state(before, state(net))
        assert photograph(net) == view
        graph = fxprune.trace(spec.build(torch.float32), images[:2])
        code, nodes, metas = graph.code, names(graph), [sorted(n.meta) for n in graph.graph.nodes]
        before, view, meta = state(graph), photograph(graph), dict(graph.meta)
        small = fxprune.compress(graph, images, k=1, recipe=brief(recipe), progress=False)
        assert same_state(before, state(graph))
        assert photograph(graph) == view
        assert (graph.code, names(graph), graph.meta) == (code, nodes, meta)
        assert [sorted(n.meta) for n in graph.graph.nodes] == metas
    mine = {p.data_ptr() for p in graph.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in small.parameters())


# --- laws 6 and 7: regions ---


def crossing_edges(gm: fx.GraphModule, region: Region) -> list[tuple[str, str]]:
    """Edges over a region's border that are neither entry's, exit's, nor a stored parameter's."""
    body = set(region.body)
    edges = []
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            into = node.name in body and source.name not in body
            out = source.name in body and node.name not in body
            if (into and source.name != region.entry and source.op != "get_attr") or (
                out and source.name != region.exit
            ):
                edges.append((source.name, node.name))
    return edges


@law()
@given(net_specs())
def test_law_6_regions_have_a_single_entry_and_a_single_exit(spec: NetSpec) -> None:
    _, gm, _ = traced(spec)
    found = fxprune.discover(gm, kinds=ALL_KINDS).regions
    assert found
    for region in found:
        assert crossing_edges(gm, region) == []
        assert region.entry not in region.body
        assert region.body[-1] == region.exit
        assert region.bypass == region.entry if region.kind is Kind.IDENTITY else True


def essence(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    regions = fxprune.discover(gm, kinds=ALL_KINDS).regions
    return [(r.label, r.kind, r.modules, r.shape) for r in regions]


@law()
@given(net_specs())
def test_law_7_names_do_not_matter(spec: NetSpec) -> None:
    _, gm, _ = traced(spec)
    before = essence(gm)
    for i, node in enumerate(list(gm.graph.nodes)):
        if node.op not in ("placeholder", "output"):
            node.name = f"thing_{i * 7 % 1000}_{i}"
    gm.recompile()
    assert essence(gm) == before


@law()
@given(net_specs(), st.data())
def test_law_7_identities_do_not_matter(spec: NetSpec, data: st.DataObject) -> None:
    _, gm, _ = traced(spec)
    before = essence(gm)
    edges = [(s, u) for s in gm.graph.nodes for u in s.users if u.op != "placeholder"]
    for i, (source, user) in enumerate(data.draw(st.lists(st.sampled_from(edges), max_size=12, unique=True))):
        gm.add_submodule(f"extra{i}", nn.Identity())
        with gm.graph.inserting_after(source):
            node = gm.graph.call_module(f"extra{i}", (source,))
        user.replace_input_with(source, node)
    gm.recompile()
    PropagateShapes(image_batch())(gm)
    assert essence(gm) == before
    Canonicalize()(gm)
    assert essence(gm) == before


# --- law 8: dropping ---


@law(20)
@given(net_specs(), st.data())
@torch.no_grad()
def test_law_8_dropping_equals_a_forward_that_skips_the_block(spec: NetSpec, data: st.DataObject) -> None:
    net, gm, regions = traced(spec)
    assert sorted(region.label for region in regions) == sorted(net.blocks())
    chosen = data.draw(st.lists(st.sampled_from(regions), min_size=1, unique=True))
    DropRegions(chosen)(gm)
    with skipped(net, *(region.label for region in chosen)):
        expected = net(image_batch())
    assert error(expected, gm(image_batch())) <= 1e-12


# --- law 9: scores ---


def region_named(label: str, body: tuple[str, ...]) -> Region:
    return Region("x", body[-1], "x", body, Kind.IDENTITY, label, (label,), (1, 4), "torch.float32")


def compared(before: list[float], candidates: list[list[float]]) -> tuple[LatencyComparison, ...]:
    """What comes of timing networks with a clock that shows these times, in whatever unit."""
    clocks = [iter(times) for times in (before, *candidates)]
    rounds = TimingSettings(min_rounds=len(before), max_rounds=len(before), resamples=20)
    contestants = [Contestant(str(i), partial(next, clock)) for i, clock in enumerate(clocks)]
    intervals = race(contestants, lambda call, _: call(), rounds)
    first, *others = (Latency("torch", "", (), 1, median(c.samples), 0.0, 0.0, 5) for c in contestants)
    return tuple(
        LatencyComparison(first, after, median(ratios), interval)
        for after, ratios, interval in zip(others, ratios_by_round(contestants), intervals, strict=True)
    )


def five(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=5, max_size=5)


@law(50)
@given(
    five(st.floats(0.5, 2)),
    st.lists(st.tuples(st.floats(0, 10), five(st.floats(0.05, 1.2))), min_size=2, max_size=8),
    st.sampled_from((2.0**-30, 2.0**-10, 2.0**10)),  # exact, so that what follows is the same to the bit
    st.integers(1, 2),
)
def test_law_9_the_unit_of_latency_does_not_matter(
    before: list[float], figures: list[tuple[float, list[float]]], unit: float, k: int
) -> None:
    def scores(scale: float) -> list[BlockScore]:
        candidates = [[b * r for b, r in zip(before, ratios, strict=True)] for _, ratios in figures]
        timed = compared([scale * b for b in before], [[scale * t for t in times] for times in candidates])
        return [
            BlockScore(region_named(str(i), (f"n{i}",)), loss, loss, latency)
            for i, ((loss, _), latency) in enumerate(zip(figures, timed, strict=True))
        ]

    seconds, others = scores(1.0), scores(unit)
    assert seconds[0].latency.before.median_s * unit == others[0].latency.before.median_s
    assert [s.score for s in seconds] == [s.score for s in others]
    if sum(s.cost.distinguishable for s in seconds) >= k:
        plans = [
            Planner(s, lambda sets, plan: [0.0] * len(sets), "independent").of_size(k)
            for s in (seconds, others)
        ]
        assert [r.label for r in plans[0]] == [r.label for r in plans[1]]


# --- law 10: leaving the process ---

LEAVING = NetSpec(
    (4, 6),
    (2,),
    (True,),
    (
        (BlockSpec("basic", inplace=True), BlockSpec("inverted", behind=False)),
        (BlockSpec("squeeze"), BlockSpec("preactivation", behind=False)),
    ),
)


@torch.no_grad()
def test_law_10_what_is_kept_and_read_back_is_the_same_function(tmp_path: Path) -> None:
    gm = fxprune.trace(LEAVING.build(torch.float32), image_batch(dtype=torch.float32))
    DropRegions(fxprune.discover(gm).regions[1:3])(gm)
    save(gm, tmp_path, example_inputs=(image_batch(dtype=torch.float32),))
    back = load(tmp_path / "model.pt2")
    for count in (1, 5):
        batch = image_batch(count, dtype=torch.float32)
        assert torch.equal(gm(batch), back(batch))


@torch.no_grad()
def test_law_10_the_exported_file_is_the_same_function(tmp_path: Path) -> None:
    import onnxruntime

    gm = fxprune.trace(LEAVING.build(torch.float32), image_batch(dtype=torch.float32))
    DropRegions(fxprune.discover(gm).regions[:2])(gm)
    fxprune.export_onnx(gm, tmp_path / "model.onnx", image_batch(dtype=torch.float32))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        batch = image_batch(count, dtype=torch.float32)
        (answer,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert error(gm(batch), torch.from_numpy(answer)) <= 1e-5
