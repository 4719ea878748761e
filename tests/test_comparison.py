"""What mimicking compares: where networks begin to differ, junctions behind the cuts, weights of errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.calibration.drawing import draw
from fxprune.discovery.taps import find_tap
from fxprune.graph.call import Inputs
from fxprune.graph.extract import between
from fxprune.placement.placement import find_sites
from fxprune.recovery.comparison import Pair
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.original import Original
from fxprune.recovery.recover import cut_and_fold
from fxprune.recovery.training import trainable_parameters
from tests.segmenter import Segmenter
from tests.strategies import BlockSpec, NetSpec


def resnet() -> nn.Module:
    """Stem, three blocks of 4 channels, a transition, three blocks of 6, pooling, classifier."""
    block = BlockSpec("basic")
    spec = NetSpec((4, 6), (2,), (True,), ((block,) * 3, (block,) * 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spec.build().float().eval()


def paired(network: nn.Module, *labels: str) -> tuple[Pair, Original, fx.GraphModule]:
    batch = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gm = fxprune.trace(network, batch[:2]).requires_grad_(False)
    regions = [region for region in fxprune.discover(gm).regions if region.label in labels]
    assert len(regions) == len(labels)
    original = Original(gm, find_tap(gm), draw([batch]))
    student, _ = cut_and_fold(original, regions, {})
    with torch.no_grad():
        for region in regions:  # so that the networks differ before the cut too, as after folding
            first = find_sites(gm, [region]).sites[0].operator
            module = student.get_submodule(str(next(n.target for n in gm.graph.nodes if n.name == first)))
            assert isinstance(module.weight, Tensor)
            module.weight.mul_(1.5)
    operators = [site.operator for site in find_sites(gm, regions).sites]
    return Pair(original, student, regions, operators), original, student


def test_the_comparison_begins_at_the_first_change() -> None:
    pair, original, student = paired(resnet(), "stages.1.2")
    assert pair.frontier != [node.name for node in original.graph.graph.find_nodes(op="placeholder")]
    part = pair.at_tap(changed_only=True, junctions=False).student
    trained = {name for name, _ in part.named_parameters()}
    assert trained and all(name.startswith("stages.1") for name in trained)
    assert len(trainable_parameters(part, student)) == len(trained)
    everything = pair.at_tap(changed_only=False, junctions=False).student
    assert {name for name, _ in everything.named_parameters()} > trained


class Sized(nn.Module):
    """The block that is cut alone reads how many images there are, as attention of exported graphs does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.two = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self.stem(images).relu())
        return (x + self.two(x).view(images.shape[0], 4, 8, 8)).mean((2, 3))


def test_the_original_is_given_what_only_the_cut_block_reads() -> None:
    torch.manual_seed(0)
    pair, original, _ = paired(Sized().eval(), "two")
    assert pair.frontier == ["images", "relu"]
    for junctions in (False, True):
        compared = pair.at_tap(changed_only=True, junctions=junctions)
        assert compared.error(original.images, "cpu") > 0


@pytest.mark.parametrize("changed_only", [False, True])
@pytest.mark.parametrize("junctions", [False, True])
def test_the_error_is_that_of_the_whole_networks(changed_only: bool, junctions: bool) -> None:
    pair, original, student = paired(resnet(), "stages.0.1", "stages.1.1")
    comparison = pair.at_tap(changed_only=changed_only, junctions=junctions)
    readers = (FeatureReader(original.graph, original.tap), FeatureReader(student, pair.tap))
    expected = mean_feature_loss(*readers, original.images, device="cpu")
    assert expected > 0
    assert comparison.error(original.images, "cpu") == pytest.approx(expected, rel=1e-5)


def test_junctions_lie_behind_a_cut_and_the_near_ones_end_where_all_changes_have_met() -> None:
    pair, original, _ = paired(resnet(), "stages.0.1")
    exits = {region.label: region.exit for region in fxprune.discover(original.graph).regions}
    into = next(name for name in pair.junctions if name not in exits.values())  # the transition's join
    assert pair.junctions == (exits["stages.0.2"], into, exits["stages.1.1"], exits["stages.1.2"])
    assert pair.near == (exits["stages.0.2"], into)


def test_where_changes_reach_the_tap_no_junction_is_near() -> None:
    pair, *_ = paired(resnet(), "stages.1.2")
    assert pair.near == ()
    assert pair.at_near_junctions() is None


def test_each_junction_weighs_by_its_variance_and_the_tap_as_much_as_all_of_them() -> None:
    pair, original, student = paired(resnet(), "stages.0.1")
    inputs = original.images.example(6)
    names = [*original.tap, *pair.junctions]
    wanted = FeatureReader(original.graph, names)(inputs)
    got = FeatureReader(student, [*pair.tap, *pair.junctions])(inputs)
    errors = [float((g - w).square().mean() / w.var(correction=0)) for g, w in zip(got, wanted, strict=True)]
    loss = pair.at_tap(changed_only=True, junctions=True).loss(inputs)
    assert float(loss) == pytest.approx(errors[0] + sum(errors[1:]) / len(errors[1:]), rel=1e-4)
    near = pair.at_near_junctions()
    assert near is not None
    count = len(pair.near)
    assert float(near.loss(inputs)) == pytest.approx(sum(errors[1 : 1 + count]) / count, rel=1e-4)
    plain = pair.at_tap(changed_only=True, junctions=False).loss(inputs)
    assert float(plain) == pytest.approx(float((got[0] - wanted[0]).square().mean()), rel=1e-4)


def test_where_nothing_before_the_tap_is_another_everything_may_be_trained() -> None:
    pair, original, student = paired(resnet(), "stages.1.3")
    last = fxprune.discover(original.graph).regions[-1]
    assert last.exit in original.tap
    bare = Pair(original, student, [last], [])  # as where no operator takes an adaptor
    assert bare.frontier == [node.name for node in student.graph.find_nodes(op="placeholder")]
    assert bare.junctions == bare.near == ()
    part = bare.at_tap(changed_only=True, junctions=True).student
    everything = pair.at_tap(changed_only=False, junctions=False).student
    assert [*dict(part.named_parameters())] == [*dict(everything.named_parameters())]


class Overwriting(nn.Module):
    """Both networks begin with an in-place operator that is not idempotent, on the very value where they part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.squash = nn.Hardswish(inplace=True)
        self.tail = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(self.tail(self.squash(x)).mean((2, 3)))


def test_in_place_operators_of_one_network_do_not_reach_the_other() -> None:
    torch.manual_seed(0)
    network = Overwriting().eval()
    batch = torch.randn(4, 3, 8, 8)
    gm = fxprune.trace(network, batch[:2]).requires_grad_(False)
    regions = fxprune.discover(gm).regions
    original = Original(gm, find_tap(gm), draw([batch]))
    student, _ = cut_and_fold(original, regions, {})
    comparison = Pair(original, student, regions, []).at_tap(changed_only=True, junctions=True)
    readers = FeatureReader(gm, original.tap), FeatureReader(student, surviving_tap(original.tap, regions))
    expected = mean_feature_loss(*readers, original.images, device="cpu")
    assert comparison.error(original.images, "cpu") == pytest.approx(expected, rel=1e-5)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    comparison.loss(Inputs((batch,))).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def test_shared_values_stand_in_for_the_images() -> None:
    pair, original, _ = paired(resnet(), "stages.1.2")
    comparison = pair.at_tap(changed_only=True, junctions=False)
    kept = comparison.keep(original.images, "cpu", budget=2**20)
    assert kept is not None and kept.size == original.images.size
    (values,) = kept.inputs.tensors()
    expected = comparison.error(original.images, "cpu")
    before = values.clone()
    assert comparison.behind().error(kept, "cpu") == pytest.approx(expected, rel=1e-5)
    assert torch.equal(values, before)
    (handed_on,) = comparison.behind().shared(kept.inputs)  # a copy: an in-place operator may come first
    assert torch.equal(handed_on, values) and handed_on.data_ptr() != values.data_ptr()
    assert comparison.keep(original.images, "cpu", budget=values.nbytes) is not None
    assert comparison.keep(original.images, "cpu", budget=values.nbytes - 1) is None


def test_images_are_not_kept_as_shared_values() -> None:
    pair, original, _ = paired(resnet(), "stages.1.2")
    comparison = pair.at_tap(changed_only=False, junctions=False)
    assert comparison.keep(original.images, "cpu", budget=2**20) is None


@torch.no_grad()
def test_of_a_network_with_a_decoder_what_it_reads_of_the_changes_is_near() -> None:
    gm = fxprune.trace(Segmenter(), torch.randn(2, 3, 16, 16))
    regions = [region for region in fxprune.discover(gm).regions if region.label in ("wide.1", "wide.2")]
    original = Original(gm, find_tap(gm), draw(torch.randn(4, 3, 16, 16)))
    student, _ = cut_and_fold(original, regions, {})
    operators = [site.operator for site in find_sites(gm, regions).sites]
    pair = Pair(original, student, regions, operators)
    near = pair.at_near_junctions()
    assert (
        set(pair.near) == {"add", "down"} and near is not None
    )  # the first block's sum stands for the last one's
    inputs = original.images.example(4)
    values = {name: between(gm, ["x"], [name])(*inputs.args)[0] for name in ("add_2", "down")}
    found = {name: between(student, ["x"], [name])(*inputs.args)[0] for name in ("add", "down")}
    by_hand = [
        float((found[ours] - values[theirs]).square().mean() / values[theirs].var(correction=0))
        for ours, theirs in (("add", "add_2"), ("down", "down"))
    ]
    assert float(near.loss(inputs)) == pytest.approx(sum(by_hand) / 2, rel=1e-4)


class Split(nn.Module):
    """Channels split in two behind a changed layer: the one half goes through blocks, both go to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, 1)
        parts = [first, second]
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]).relu())
        return self.head(torch.cat(parts, 1))


@torch.no_grad()
def test_of_several_tensors_in_one_value_those_that_are_read_are_near() -> None:
    gm = fxprune.trace(Split().eval(), torch.randn(2, 3, 8, 8))
    regions = [region for region in fxprune.discover(gm).regions if region.label == "blocks.0"]
    original = Original(gm, find_tap(gm), draw(torch.randn(4, 3, 8, 8)))
    student, _ = cut_and_fold(original, regions, {})
    pair = Pair(original, student, regions, ["stem"])
    near = pair.at_near_junctions()
    assert pair.near == ("getitem", "getitem_1") and near is not None
    inputs = original.images.example(4)
    bypass, exit_ = (between(gm, ["x"], [name])(*inputs.args)[0] for name in ("getitem_1", regions[0].exit))
    by_hand = (bypass - exit_).square().mean() / exit_.var(correction=0)
    assert float(near.loss(inputs)) == pytest.approx(float(by_hand) / 2, rel=1e-4)
