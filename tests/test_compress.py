"""`compress` from end to end on networks of a few thousand weights, and what it says to wrong input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import (
    ArtifactError,
    CalibrationError,
    DeviceError,
    FxpruneError,
    GraphError,
    NoRegionError,
    OptionError,
    TraceError,
)
from fxprune.graph.examples import example_for
from fxprune.graph.regions import Kind, Reason
from fxprune.measurements import LatencyComparison
from fxprune.passes import Adaptor, Canonicalize, DropRegions
from fxprune.reports.compression import CompressionReport
from tests.doubles import brief, comparison, count_latency, forbid_work
from tests.strategies import BlockSpec, NetSpec, ResidualNet, image_batch, skipped

BASIC = BlockSpec("basic")
SPEC = NetSpec(
    (4, 6), (2,), (True,), ((BASIC,) * 2, (BlockSpec("inverted"), BlockSpec("basic", inplace=True)))
)
LABELS = ["stages.0.0", "stages.0.1", "stages.1.1", "stages.1.2"]


def network(spec: NetSpec = SPEC) -> ResidualNet:
    return spec.build(torch.float32)


def images(count: int = 8, size: int = 8) -> Tensor:
    return image_batch(count, dtype=torch.float32, size=size)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is the number of parameters."""
    count_latency(monkeypatch)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither timing nor fitting may begin."""
    forbid_work(monkeypatch)


def compress(model: Any = None, loader: Any = None, k: int | None = 1, **options: Any) -> fx.GraphModule:
    options.setdefault("recipe", brief())
    return fxprune.compress(
        network() if model is None else model,
        images() if loader is None else loader,
        k,
        progress=False,
        **options,
    )


# --- the way through ---


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("recipe", ["fast", "practise"])
@torch.no_grad()
def test_the_result_has_the_nodes_of_the_cut_network_and_no_others(recipe: str, k: int) -> None:
    small = compress(k=k, recipe=brief(recipe, adaptor=2, mimic=2))
    assert isinstance(small, fx.GraphModule)
    plan = fxprune.report(small).plan
    assert len(plan.chosen) == k
    cut = fxprune.trace(network(), images(2))
    Canonicalize()(cut)
    DropRegions([r for r in fxprune.discover(cut).regions if r.label in plan.chosen])(cut)
    assert [n.name for n in small.graph.nodes] == [n.name for n in cut.graph.nodes]
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in cut.named_parameters()
    }
    assert not any(isinstance(module, Adaptor) for module in small.modules())
    assert not any(module.training for module in small.modules())
    assert all(p.requires_grad for p in small.parameters())
    assert small(images(3)).shape == (3, 5)  # any batch size
    small.graph.lint()


@pytest.mark.usefixtures("counted")
def test_the_report_tells_what_was_done() -> None:
    small = compress(k=2)
    made = fxprune.report(small)
    assert isinstance(made, CompressionReport)
    assert [score.region.label for score in made.plan.scores] == LABELS
    assert set(made.plan.chosen) < set(LABELS)
    assert list(made.plan.chosen) == [label for label in LABELS if label in made.plan.chosen]
    assert all(score.recovery_loss >= 0 for score in made.plan.scores)
    assert all(0 < score.cost.saving < 1 for score in made.plan.scores)
    before, after = made.parameters
    assert before == sum(p.numel() for p in network().parameters())
    assert after == sum(p.numel() for p in small.parameters()) < before
    assert made.images == 8
    with torch.no_grad():
        agreeing = int((network()(images()).argmax(1) == small(images()).argmax(1)).sum())
    assert made.agreement == agreeing / 8
    assert made.recovery_loss_after <= made.recovery_loss_before
    assert made.fold_error is not None
    assert made.fold_error < 1e-4
    assert isinstance(made.latency, LatencyComparison)
    assert made.latency.ratio < 1
    assert {r.reason for r in made.rejections} == {Reason.KIND} | {
        r.reason for r in fxprune.discover(fxprune.trace(network(), images(2))).rejections
    }
    text = str(made)
    assert all(label in text for label in LABELS)
    assert text.count("cut ") >= 2
    plain = json.loads(made.to_json())
    assert plain["plan"]["chosen"] == list(made.plan.chosen)
    assert plain["settings"]["k"] == 2
    assert plain["seed"] == 0
    assert set(made.durations) >= {"trace", "latency", "scoring", "recovery", "measurement"}


def test_a_network_of_another_origin_has_no_report() -> None:
    with pytest.raises(GraphError, match=r"does not come from|carries no report"):
        fxprune.report(fxprune.trace(network(), images(2)))


@pytest.mark.parametrize("recipe", ["fast", "practise"])
@pytest.mark.usefixtures("counted")
def test_the_same_seed_gives_the_same_network(recipe: str) -> None:
    torch.manual_seed(1)
    one = compress(k=2, recipe=brief(recipe, adaptor=2, mimic=3), seed=5)
    torch.manual_seed(2)
    other = compress(k=2, recipe=brief(recipe, adaptor=2, mimic=3), seed=5)
    assert fxprune.report(one).plan == fxprune.report(other).plan
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.usefixtures("counted")
def test_the_callers_random_state_stays() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    network_, batch = network(), images()
    torch.manual_seed(3)
    compress(network_, batch)
    assert torch.equal(torch.rand(4), wanted)


def test_with_real_latencies() -> None:
    wide = NetSpec((32,), (), (), ((BASIC, BASIC, BASIC),))
    small = compress(network(wide), images(8, size=16), latency_batch=16)
    made = fxprune.report(small)
    assert made.plan.scores[0].cost.distinguishable
    assert isinstance(made.latency, LatencyComparison)
    assert made.latency.ratio < 1
    assert made.before.backend == "torch"


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("selection", ["independent", "greedy", "exact"])
def test_every_selection_ends_in_a_plan_without_overlaps(selection: str) -> None:
    made = fxprune.report(compress(k=2, selection=selection))
    first, second = made.plan.regions
    assert not first.overlaps(second)


@torch.no_grad()
def judged_bare(criterion: str, label: str) -> float:
    """What a criterion says of a network that skips one block by its own forward."""

    def answers(net: ResidualNet) -> tuple[Tensor, Tensor]:
        features = net.stem(images())
        for stage in net.stages:
            features = stage(features)
        return features, net(images())

    net = network()
    wanted = answers(net)
    with skipped(net, label):
        found = answers(net)
    if criterion == "l2":
        return F.mse_loss(found[0], wanted[0]).item()
    return F.kl_div(found[1].log_softmax(1), wanted[1].softmax(1), reduction="batchmean").item()


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("criterion", ["l2", "kl"])
def test_criteria_that_judge_the_bare_cut(criterion: str) -> None:
    made = fxprune.report(compress(criterion=criterion))
    for score in made.plan.scores:
        by_hand = judged_bare(criterion, score.region.label)
        assert score.recovery_loss == score.bare_loss == pytest.approx(by_hand, rel=1e-4)
    scores = [score.score for score in made.plan.scores]
    (chosen,) = made.plan.chosen
    assert LABELS[scores.index(min(scores))] == chosen


@pytest.mark.usefixtures("counted")
def test_a_criterion_of_ones_own(tmp_path: Path) -> None:
    """Averaged over batches of different sizes, and never answered from a folder: it may have changed."""
    for scale in (1.0, 2.0):

        def scaled(found: Tensor, wanted: Tensor, scale: float = scale) -> Tensor:
            return scale * F.l1_loss(found, wanted)

        made = fxprune.report(compress(criterion=scaled, out=tmp_path))
        net = network()
        for score in made.plan.scores:
            with skipped(network_without := network(), score.region.label), torch.no_grad():
                by_hand = scale * F.l1_loss(network_without(images()), net(images())).item()
            assert score.recovery_loss == pytest.approx(by_hand, rel=1e-4)
        assert "scaled" in json.loads((tmp_path / "report.json").read_text())["settings"]["criterion"]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda found, wanted: float("nan"), "returned nan; it must be a finite number"),
        (lambda found, wanted: found, "failed on the outputs of a batch: (Value|Runtime)Error"),
    ],
)
def test_a_criterion_that_gives_no_number_is_named(criterion: Any, message: str) -> None:
    with pytest.raises(OptionError, match=f"criterion .*lambda.* {message}"):
        compress(criterion=criterion)


@pytest.mark.usefixtures("counted")
def test_the_smallest_score_is_cut() -> None:
    made = fxprune.report(compress(selection="independent"))
    scores = {score.region.label: score.score for score in made.plan.scores}
    assert made.plan.chosen == (min(scores, key=scores.__getitem__),)


# --- settings that reach the stages ---


@pytest.mark.usefixtures("counted")
def test_the_user_may_name_the_tap() -> None:
    named = fxprune.report(compress(tap="head"))
    assert list(named.settings["tap"]) == ["head"]
    found = fxprune.report(compress())
    assert list(found.settings["tap"]) == ["stages_1_2_behind"]
    with pytest.raises(GraphError, match="neither a node nor a module"):
        compress(tap="stages.9")


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("recipe", ["fast", "practise"])
def test_a_tap_in_front_of_a_region_cannot_judge_it(recipe: str) -> None:
    made = fxprune.report(compress(tap="stages.0.1.behind", recipe=brief(recipe)))
    behind = [r.label for r in made.rejections if r.reason is Reason.BEHIND_TAP]
    assert "stages.1.1" in behind
    assert not set(behind) & {score.region.label for score in made.plan.scores}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("recipe", ["fast", "practise"])
def test_a_region_with_no_adaptor_in_front_of_the_tap_is_scored_bare(recipe: str) -> None:
    net = network(NetSpec((4,), (), (), ((BASIC,),)))
    parametrizations.weight_norm(net.stem[0])  # the only producer takes no adaptor; the classifier takes one
    made = fxprune.report(compress(net, recipe=brief(recipe)))
    (score,) = made.plan.scores
    assert score.recovery_loss == score.bare_loss


@pytest.mark.usefixtures("counted")
def test_kinds_and_ignore_limit_what_is_cut() -> None:
    made = fxprune.report(compress(kinds=("projection",)))
    assert [r.kind for r in made.plan.regions] == [Kind.PROJECTION]
    made = fxprune.report(compress(ignore=["stages.0", "stages.1.2"]))
    assert made.plan.chosen == ("stages.1.1",)
    assert [r.label for r in made.rejections if r.reason is Reason.IGNORED] == [
        "stages.0.0",
        "stages.0.1",
        "stages.1.2",
    ]


@pytest.mark.usefixtures("counted")
def test_a_target_instead_of_a_number() -> None:
    made = fxprune.report(compress(k=None, target_speedup=1.2))
    assert isinstance(made.latency, LatencyComparison)
    assert made.latency.ratio <= 1 / 1.2
    assert len(made.plan.chosen) < 4
    with pytest.raises(OptionError, match="out of reach"):
        compress(k=None, target_speedup=50.0)


@pytest.mark.usefixtures("counted")
def test_the_folder_holds_the_report(tmp_path: Path) -> None:
    small = compress(out=tmp_path / "made" / "here")
    written = json.loads((tmp_path / "made" / "here" / "report.json").read_text())
    assert written["plan"]["chosen"] == list(fxprune.report(small).plan.chosen)
    assert {path.name for path in (tmp_path / "made" / "here").iterdir()} == {
        *(
            "model.pt2",
            "model.safetensors",
            "plan.json",
            "report.html",
            "report.json",
            "recipe.json",
            "scores",
        )
    }


@pytest.mark.usefixtures("counted")
def test_the_result_carries_none_of_the_images() -> None:
    small = compress(k=2)
    example = example_for(small, small.meta["fxprune_origin"].plan.inputs)
    assert [tuple(t.shape) for t in example.tensors()] == [(2, 3, 8, 8)]
    kept = pytree.tree_leaves([small.meta, [node.meta for node in small.graph.nodes], small.state_dict()])
    kept += example.tensors()
    shown = images()
    for tensor in (x for x in kept if isinstance(x, Tensor) and x.shape[-3:] == shown.shape[1:]):
        assert not any(torch.equal(a, b) for a in tensor.reshape(-1, 3, 8, 8) for b in shown)


# --- models and loaders of every sort ---


@pytest.mark.usefixtures("counted")
def test_graphs_and_exported_programs_are_compressed_too() -> None:
    traced = fxprune.trace(network(), images(2))
    symbolic = fx.symbolic_trace(network())
    program = torch.export.export(network(), (images(2),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    plans = [fxprune.report(compress(model)).plan.chosen for model in (network(), traced, symbolic, program)]
    assert len(set(plans)) == 1


@cache
def expected() -> fx.GraphModule:
    """What a plain tensor of images gives; called where latencies are counted."""
    return compress()


def batches() -> Iterator[Tensor]:
    yield from images().split(3)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("loader", "input_fn"),
    [
        (list(images().split(3)), None),
        (DataLoader(TensorDataset(images(), torch.arange(8)), batch_size=3), None),
        (TensorDataset(images(), torch.arange(8)), None),
        ([(part, torch.zeros(len(part))) for part in images().split(3)], None),
        ([{"pixel_values": part, "labels": torch.zeros(len(part))} for part in images().split(3)], None),
        ([{"x": part} for part in images().split(3)], None),
        ([{"data": [part]} for part in images().split(3)], lambda batch: batch["data"][0]),
        ([{"data": part} for part in images().split(3)], lambda batch: {"x": batch["data"]}),
        (batches(), None),
    ],
    ids=["batches", "loader", "dataset", "labels", "known key", "name", "input_fn", "keywords", "generator"],
)
def test_loaders_of_every_sort_give_the_same_network(loader: Any, input_fn: Any) -> None:
    small = compress(loader=loader, input_fn=input_fn)
    plain = expected()
    assert fxprune.report(small).images == 8
    assert fxprune.report(small).plan.chosen == fxprune.report(plain).plan.chosen
    with torch.no_grad():
        assert torch.allclose(small(images(2)), plain(images(2)), atol=1e-4)


@pytest.mark.usefixtures("counted")
def test_at_most_so_many_images_are_used() -> None:
    assert fxprune.report(compress(loader=images(30), images=6)).images == 6
    assert fxprune.report(compress(loader=images(1))).images == 1


@pytest.mark.usefixtures("counted")
def test_several_inputs_and_structured_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = network(), nn.Linear(3, 5)

        def forward(self, image: Tensor, extra: Tensor) -> dict[str, Tensor]:
            return {"class": self.body(image) + self.other(extra), "extra": extra}

    given = {"image": images(), "extra": images().mean((2, 3))}
    small = compress(Two(), [given])
    answer = small(**{name: value[:3] for name, value in given.items()})
    assert answer["class"].shape == (3, 5)
    assert torch.equal(answer["extra"], given["extra"][:3])


# --- wrong input ---


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 0}, OptionError, "k is 0"),
        ({"k": -1}, OptionError, "k is -1"),
        ({"k": 1.5}, OptionError, "whole number"),
        ({"k": True}, OptionError, "whole number"),
        ({"k": None}, OptionError, "exactly one of k, target_speedup, target_latency_ms, regions and plan"),
        ({"target_speedup": 1.3}, OptionError, "exactly one"),
        ({"k": None, "target_speedup": 0.9}, OptionError, "above 1"),
        ({"k": None, "target_latency_ms": 0.0}, OptionError, "positive"),
        ({"min_agreement": 1.5}, OptionError, "min_agreement"),
        ({"k": 5}, OptionError, "k is 5, but at most 4 regions"),
        ({"recipe": "slow"}, OptionError, r"'slow'; choose from \['fast', 'practise'\]"),
        ({"criterion": "l1"}, OptionError, "criterion is 'l1'"),
        ({"selection": "random"}, OptionError, "selection is 'random'"),
        ({"backend": "abacus"}, OptionError, "backend is 'abacus'"),
        ({"images": 0}, OptionError, "images is 0"),
        ({"latency_batch": 0}, OptionError, "latency_batch is 0"),
        ({"threads": 0}, OptionError, "threads is 0"),
        ({"kinds": ("residual",)}, OptionError, "kinds is"),
        ({"ignore": "layer9"}, OptionError, "matches no region; the regions are: stages"),
        ({"tap": "layer9"}, GraphError, "tap 'layer9'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_met(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compress(**options)


def with_nan() -> Tensor:
    bad = images()
    bad[5, 0, 0, 0] = float("nan")
    return bad


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([], "no batch"),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (with_nan(), r"NaN or infinite values \(image 5"),
        (torch.full((4, 3, 8, 8), float("inf")), "infinite"),
        (torch.zeros(4, 5, 8, 8), r"does not accept the calibration images of shape \[\(4, 5, 8, 8\)\]"),
        (torch.zeros(4, 8), "does not accept|need a batch dimension"),
        ((255 * images()).to(torch.uint8), "not floating-point"),
        (images().double(), "float64, the network's weights torch.float32"),
        (images().half(), "float16, the network's weights torch.float32"),
        ([images(2), images(2, size=12)], "mixed sizes"),
        ([{"picture": images()}], "'picture'"),
        ([["a.png"]], "no tensor"),
        (3, "not an iterable"),
    ],
    ids=[
        "empty",
        "no images",
        "nan",
        "inf",
        "channels",
        "flat",
        "bytes",
        "double",
        "half",
        "sizes",
        "key",
        "str",
        "int",
    ],
)
def test_images_that_cannot_be_used(loader: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        compress(loader=loader)


@pytest.mark.usefixtures("no_work")
def test_weights_that_cannot_be_used() -> None:
    with pytest.raises(GraphError, match=r"weights are torch\.float16; recovery needs float32"):
        compress(network().half(), images().half())
    with pytest.raises(GraphError, match=r"weights are torch\.bfloat16"):
        compress(network().bfloat16(), images().bfloat16())
    with torch.device("meta"):
        empty = network()
    with pytest.raises(GraphError, match="meta device: load them"):
        compress(empty)


@pytest.mark.usefixtures("no_work")
def test_networks_that_cannot_be_used() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.mean() > 0 else x

    with pytest.raises(TraceError, match=r"if x\.mean\(\) > 0"):
        compress(Branches())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    with pytest.raises(NoRegionError, match="there is no join at all"):
        compress(plain)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([x, self.conv(x)], 1))

    with pytest.raises(NoRegionError, match=r"joined by concatenation.*\n.*kinds=") as caught:
        compress(Dense())
    assert isinstance(caught.value, FxpruneError)
    with pytest.raises(NoRegionError, match="ignored at the user's request"):
        compress(ignore="*")


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_cuda_without_a_card() -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        compress(device="cuda")
    with pytest.raises(DeviceError, match="no CUDA device"):
        compress(device="cuda:3")


@pytest.mark.usefixtures("no_work")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="file"):
        compress(out=tmp_path / "file")
    with pytest.raises(ArtifactError, match="file"):
        compress(out=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


def test_savings_lost_in_the_noise_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio(candidate: nn.Module) -> float:
        held = {name for name, _ in candidate.named_modules()}
        first_stage = {"stages.0.0", "stages.0.1"} <= held
        return 0.8 if first_stage else 0.99

    monkeypatch.setattr(
        "fxprune.timing.latency.compare",
        lambda before, candidates, inputs, **rest: tuple(
            comparison(1.0, ratio(candidate), spread=0.02) for candidate in candidates
        ),
    )
    words = (
        r"only 2 regions .* save time beyond the noise; no saving was seen for: stages\.0\.0, stages\.0\.1"
    )
    with pytest.raises(OptionError, match=words):
        compress(k=3)


@pytest.mark.usefixtures("counted")
@pytest.mark.filterwarnings("ignore:.*")
def test_weights_that_are_not_finite_stop_with_an_error() -> None:
    broken = network()
    with torch.no_grad():
        broken.stem[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="nan"):
        compress(broken)


# --- values that come from elsewhere ---


def test_a_predicate_that_fails_is_named() -> None:
    def broken(region: Any) -> bool:
        raise KeyError("label")

    with pytest.raises(
        OptionError, match=r"ignore entry .*broken.* failed on region stages.0.0: KeyError: 'label'"
    ):
        compress(ignore=broken)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("batch", [images().to_sparse(), images().to("meta")], ids=["sparse", "meta"])
def test_images_without_plain_values_are_refused(batch: Tensor) -> None:
    with pytest.raises(CalibrationError, match="sparse tensor or one on the meta device"):
        compress(loader=[batch])


@pytest.mark.usefixtures("counted")
def test_another_default_device_makes_no_difference() -> None:
    model, pictures, plain = network(), images(), compress()
    with torch.device("meta"):
        small = compress(model, pictures)
    assert fxprune.report(small).plan.chosen == fxprune.report(plain).plan.chosen
    assert all(
        torch.equal(a, b)
        for a, b in zip(small.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_an_export_needs_a_path() -> None:
    with pytest.raises(OptionError, match="path is empty"):
        fxprune.export_onnx(network(), "", images())
