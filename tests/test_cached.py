"""The fast scorer against the slow one, and within its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxprune
from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.calibration.rows import rows_of
from fxprune.discovery.dominance import flow_nodes
from fxprune.discovery.taps import find_tap
from fxprune.errors import OptionError
from fxprune.graph.extract import between
from fxprune.graph.regions import Region
from fxprune.options import RECIPES
from fxprune.passes import Canonicalize
from fxprune.placement.dense import OperatorIndex
from fxprune.processes.threads import using_threads
from fxprune.recovery.adaptors import Candidate, adaptor_weights
from fxprune.recovery.original import Original
from fxprune.scoring.activations import Activations, bytes_per_image
from fxprune.scoring.cached import CachedScorer
from fxprune.scoring.changed_part import ChangedPart
from fxprune.scoring.end_to_end import EndToEndScorer
from fxprune.scoring.joint_losses import JointLosses
from fxprune.scoring.scorer import fit_all
from tests.segmenter import Segmenter
from tests.strategies import BlockSpec, NetSpec, image_batch
from tests.tiny import tiny

SETTINGS = replace(RECIPES["fast"].adaptor, iterations=0, batch_size=4)
KINDS = ("basic", "bottleneck", "preactivation", "inverted", "squeeze", "depthwise")


def network(kind: str = "basic", *, inplace: bool = False) -> fx.GraphModule:
    block = BlockSpec(kind, inplace=inplace)
    spec = NetSpec((4, 6), (2,), (True,), ((block,) * 3, (block,) * 2), seed=3)
    gm = fxprune.trace(spec.build(torch.float32), image_batch(dtype=torch.float32))
    Canonicalize()(gm)
    return gm.requires_grad_(False)


def images(count: int = 10) -> CalibrationSet:
    return draw(image_batch(count, dtype=torch.float32))


def scorer(gm: fx.GraphModule, count: int = 10, *, iterations: int = 0, **options: int) -> CachedScorer:
    settings = replace(SETTINGS, iterations=iterations)
    return CachedScorer(Original(gm, find_tap(gm), images(count)), settings, **options)


def sets(gm: fx.GraphModule) -> list[list[Region]]:
    found = list(fxprune.discover(gm).regions)
    return [[region] for region in found] + [[found[0], found[1]], [found[1], found[-1]]]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_loss_is_that_of_the_whole_network(kind: str, inplace: bool) -> None:
    gm = network(kind, inplace=inplace)
    code = gm.code
    fast = scorer(gm)
    for regions in sets(gm):
        slow = EndToEndScorer(Original(gm, find_tap(gm), images()), SETTINGS).fit(regions)
        assert fast.fit(regions).loss_before == pytest.approx(slow.loss_before, rel=1e-5)
    assert gm.code == code


def test_released_activations_come_back_as_they_were() -> None:
    gm = network()
    fast, regions = scorer(gm, iterations=3), sets(gm)[-1]
    first = fast.fit(regions)
    fast.release()
    assert fast._cache is None
    again = fast.fit(regions)
    assert again.loss == first.loss
    assert all(torch.equal(again.maps[site], first.maps[site]) for site in first.maps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fitted_loss_is_that_of_the_maps_it_comes_with(kind: str) -> None:
    from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
    from fxprune.recovery.recover import cut_and_fold

    gm = network(kind)
    fast, tap = scorer(gm, iterations=3), find_tap(gm)
    for regions in sets(gm):
        fit = fast.fit(regions)
        small, error = cut_and_fold(Original(gm, tap, images()), regions, fit.maps)
        assert error is not None
        assert error < 1e-4
        readers = FeatureReader(gm, tap), FeatureReader(small, surviving_tap(tap, regions))
        assert mean_feature_loss(*readers, images(), device="cpu") == pytest.approx(fit.loss, rel=1e-3)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "inverted"])
def test_fitting_does_not_make_a_cut_worse(kind: str) -> None:
    gm = network(kind)
    start, fast = scorer(gm, 32), scorer(gm, 32, iterations=30)
    for regions in sets(gm):
        fit = fast.fit(regions)
        assert fit.loss <= fit.loss_before
        assert fit.loss <= 1.001 * start.fit(regions).loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_begins_at_the_sum_of_what_its_parts_changed(kind: str) -> None:
    gm = network(kind)
    pair = sets(gm)[-1]
    parts = [scorer(gm, iterations=4).fit([region]) for region in pair]
    begun = scorer(gm).fit(pair, parts)
    assert begun.maps
    for site, weights in begun.maps.items():
        eye = torch.eye(site.channels)
        wanted = eye + sum(part.maps[site] - eye for part in parts if site in part.maps)
        assert torch.allclose(weights, wanted, atol=1e-6)
    assert not torch.equal(weights, eye)


def test_fits_of_the_parts_are_a_better_start_than_none() -> None:
    gm = network()
    fast = scorer(gm, 32, iterations=40)
    pair = sets(gm)[-1]
    parts = [fast.fit([region]) for region in pair]
    assert fast.estimate(pair, parts) < fast.estimate(pair, ())
    assert fast.fit(pair, parts).loss < 1.05 * fast.fit(pair).loss  # in half of the iterations


def changed_part(
    gm: fx.GraphModule, regions: Sequence[Region], shown: CalibrationSet | None = None
) -> ChangedPart:
    rows = rows_of(gm, shown or images(), "cpu")
    return ChangedPart(gm, Candidate(gm, regions, find_tap(gm)), OperatorIndex(gm), rows)


def test_the_waist_is_where_all_changes_meet() -> None:
    """Of a cut in the first stage that is the sum in the transition block, both of whose branches have adaptors."""
    gm = network()
    regions = {region.label: region for region in fxprune.discover(gm).regions}
    waists = {label: changed_part(gm, [region]).waist for label, region in regions.items()}
    assert waists == {
        **dict.fromkeys(("stages.0.0", "stages.0.1", "stages.0.2"), ("add_3",)),
        "stages.1.1": ("add_5",),
        "stages.1.2": (),  # nothing lies between this cut and the tap
    }
    both = changed_part(gm, [regions["stages.0.1"], regions["stages.1.1"]])
    assert both.waist == ("add_5",)


def test_far_behind_the_cut_nothing_is_compared_but_right_behind_it() -> None:
    """Where a decoder follows, fits run from the frontier to what is read elsewhere, and the loss alone to the end."""
    gm, shown = fxprune.trace(Segmenter(), torch.randn(2, 3, 16, 16)), draw(torch.randn(3, 3, 16, 16))
    regions = {region.label: region for region in fxprune.discover(gm).regions}
    parts = {label: changed_part(gm, [region], shown) for label, region in regions.items()}
    assert all(part.far for part in parts.values())
    # the transition reads the stream, and so does the decoder, in the original at the end of the last block
    assert {label: set(part.waist) for label, part in parts.items()} == {
        "wide.0": {"down", "add_2"},
        "wide.1": {"down", "add_2"},
        "wide.2": {"down", "add_2"},
        "narrow.0": {"up"},
        "narrow.1": {"up"},
    }
    assert not any(
        "decoder" in str(node.target) for part in parts.values() for node in part.to_waist.graph.nodes
    )
    both = changed_part(gm, [regions["wide.1"], regions["wide.2"]], shown)
    assert set(both.waist) == {
        "down",
        "add_2",
    }  # the bypass stands for the exit of the last block that is gone
    assert set(adaptor_weights(both.to_waist)) == set(adaptor_weights(both.part))


def test_fits_right_behind_the_cut_lower_the_loss_at_the_end() -> None:
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    gm = fxprune.trace(Segmenter(), pixels[:2])
    fast = CachedScorer(Original(gm, find_tap(gm), draw(pixels)), RECIPES["fast"].adaptor)
    singles = [[region] for region in fxprune.discover(gm).regions]
    fast.prepare(singles)
    fits = [fast.fit(regions) for regions in singles]
    assert all(fit.loss < 0.8 * fit.loss_before for fit in fits)
    held = fast.peak_bytes
    pair = fast.fit([singles[0][0], singles[3][0]], [fits[0], fits[3]])
    assert pair.loss < pair.loss_before and fast.peak_bytes == held  # what a set needs is in the cache


@pytest.mark.parametrize("kind", KINDS)
def test_the_waist_takes_no_more_memory_than_the_frontier(kind: str) -> None:
    """A wide value, such as the inside of an inverted residual, would fill the cache."""
    gm = network(kind)
    for regions in sets(gm):
        work = changed_part(gm, regions)
        if work.waist:
            largest = max(bytes_per_image(gm, [name]) for name in work.frontier)
            assert bytes_per_image(gm, work.waist) <= largest


def test_sets_have_their_waists_where_single_regions_do() -> None:
    """Else the original would run again for a value of their own, as it did for pairs in MobileNetV2."""
    model = torchvision.models.mobilenet_v2(width_mult=0.25).eval()
    gm = fxprune.trace(model, torch.randn(2, 3, 64, 64))
    Canonicalize()(gm)
    fast = CachedScorer(Original(gm, find_tap(gm), draw(torch.randn(4, 3, 64, 64))), SETTINGS, loss_images=2)
    regions = fxprune.discover(gm).regions
    fast.prepare([[region] for region in regions])
    cache = fast._cache
    for other in regions[1:]:
        fast.fit([regions[0], other])
        assert fast._cache is cache


@pytest.mark.parametrize(("network", "count"), [(tiny, 4), (Segmenter, 2)])
def test_fits_of_a_dense_network_see_fewer_images_a_step(
    network: Callable[[], nn.Module], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = Activations.select

    def select(self: Activations, name: str, chosen: Tensor) -> Any:
        asked.append(len(chosen))
        return plain(self, name, chosen)

    monkeypatch.setattr(Activations, "select", select)
    pictures = torch.randn(6, 3, 16, 16)
    gm = fxprune.trace(network().eval(), pictures)
    settings = replace(SETTINGS, iterations=2, batch_size=4, dense_pixels=2 * 16 * 16)
    fast = CachedScorer(Original(gm, find_tap(gm), draw(pictures)), settings)
    fast.fit(fxprune.discover(gm).regions[1:2])
    assert asked and set(asked) == {count}


@pytest.mark.parametrize("kind", KINDS)
def test_fits_side_by_side_are_those_of_one_thread(kind: str) -> None:
    gm = network(kind)
    single, joint = sets(gm)[:-2], sets(gm)[-2:]
    with using_threads(1):
        one = scorer(gm, iterations=4)
        alone = fit_all(one, single)
        pairs = JointLosses(one, {regions[0].label: fit for regions, fit in zip(single, alone, strict=True)})
        estimates = pairs(joint, ())
    with using_threads(3):
        many = scorer(gm, iterations=4)
        assert many.workers >= 3
        beside = fit_all(many, single)
        pairs = JointLosses(
            many, {regions[0].label: fit for regions, fit in zip(single, beside, strict=True)}
        )
        # activations are rounded by the number of threads, and Adam's first steps are as long for a rounding error
        # as for a gradient: on some processors that shows in the fifth digit
        assert [fit.loss for fit in beside] == pytest.approx([fit.loss for fit in alone], rel=1e-4)
        assert pairs(joint, ()) == pytest.approx(estimates, rel=1e-4)
        again = fit_all(many, single)  # in whatever order they ended
    for fit, other in zip(beside, again, strict=True):
        assert fit.loss == other.loss
        assert all(torch.equal(fit.maps[site], other.maps[site]) for site in fit.maps)


def test_fits_under_way_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = network()
    rows = rows_of(gm, images(), "cpu")
    monkeypatch.setattr("fxprune.scoring.cached.rows_of", lambda *_: rows)  # there may be no GPU
    held = bytes_per_image(gm, flow_nodes(gm)) * SETTINGS.batch_size
    tap = find_tap(gm)
    for device, budget, workers in (
        ("cpu", 12 * held, 3),
        ("cpu", 12 * held - 1, 2),
        ("cpu", held, 1),
        ("cuda", 12 * held, 1),
    ):
        fast = CachedScorer(Original(gm, tap, images(), device), SETTINGS, cache_bytes=budget)
        assert fast.workers == workers


@pytest.mark.parametrize("kind", KINDS)
def test_down_to_the_waist_the_network_is_that_of_the_candidate(kind: str) -> None:
    gm = network(kind)
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for regions in sets(gm):
        work = changed_part(gm, regions)
        if not work.waist:
            continue
        seen += 1
        assert set(adaptor_weights(work.to_waist)) == set(adaptor_weights(work.part))
        for weight in adaptor_weights(work.part):
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
        batch = image_batch(dtype=torch.float32)
        placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        cached = between(gm, placeholders, work.frontier)(batch)
        wanted = between(work.candidate.graph, placeholders, work.waist)(batch)
        torch.testing.assert_close(work.to_waist(*cached), wanted, rtol=1e-4, atol=1e-4)
    assert seen >= 3


def test_scoring_is_repeatable_and_independent_of_the_order() -> None:
    gm = network()
    work = sets(gm)
    first, second = scorer(gm, iterations=3), scorer(gm, iterations=3)
    second.prepare(work)
    one = [first.fit(regions).loss for regions in work]
    other = [second.fit(regions).loss for regions in reversed(work)][::-1]
    assert one == other


def test_announcing_the_work_runs_the_original_once() -> None:
    gm = network()
    runs: list[int] = []
    fast = scorer(gm)
    gm.get_submodule("stem.0").register_forward_hook(lambda *_: runs.append(1))
    fast.prepare(sets(gm))
    assert len(runs) == 1
    for regions in sets(gm):
        fast.fit(regions)
    assert len(runs) == 1
    assert fast.peak_bytes > 0


def test_the_original_keeps_its_weights() -> None:
    gm = network()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    fast = scorer(gm, iterations=3)
    for regions in sets(gm):
        fast.fit(regions)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert not any(p.requires_grad for p in gm.parameters())


def test_a_budget_for_fewer_images_uses_fewer() -> None:
    gm = network()
    names = ["stem_2", "stages_0_2_behind"]
    size = bytes_per_image(gm, names)
    assert size == 2 * 4 * 8 * 8 * 4
    whole = Activations(gm, names, {}, images(), device="cpu", budget=10 * size)
    half = Activations(gm, names, {}, images(), device="cpu", budget=5 * size + 1, batch_size=3)
    assert (whole.images, half.images) == (10, 5)
    assert (whole.bytes, half.bytes) == (10 * size, 5 * size)
    for name in names:
        assert torch.equal(half.first(name, 5), whole.first(name, 5))
        assert half.first(name, 5).shape == (5, 4, 8, 8)
    chosen = torch.tensor([4, 0])
    assert torch.equal(half.select(names[0], chosen), whole.first(names[0], 5)[chosen])


def test_a_scorer_on_half_the_budget_judges_by_the_first_images() -> None:
    gm = network()
    (region, *_) = fxprune.discover(gm).regions
    full = scorer(gm)
    full.fit([region])
    half = scorer(gm, cache_bytes=full.peak_bytes // 2)
    few = draw(image_batch(10, dtype=torch.float32)[:5])
    slow = EndToEndScorer(Original(gm, find_tap(gm), few), SETTINGS).fit([region])
    assert half.fit([region]).loss_before == pytest.approx(slow.loss_before, rel=1e-5)
    assert half.peak_bytes <= full.peak_bytes // 2


def test_a_budget_below_two_images_is_refused() -> None:
    gm = network()
    (region, *_) = fxprune.discover(gm).regions
    with pytest.raises(OptionError, match=r"does not hold two images.*cache_bytes"):
        scorer(gm, cache_bytes=1000).fit([region])
