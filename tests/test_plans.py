"""Plans: blocks found again on whichever graph of a network is at hand, or named where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import optimization
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxprune
from fxprune.discovery.planned import plan_of
from fxprune.errors import ArtifactError, OptionError, PreconditionError
from fxprune.graph.call import Inputs
from fxprune.graph.examples import describe, example_for, example_of
from fxprune.options import FrontEnd
from fxprune.passes import Cut, FoldBatchNorm
from fxprune.plan import Plan, PlannedCut
from tests.doubles import brief, count_latency, forbid_work
from tests.tiny import images, tiny


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def normed(width: int = 6) -> nn.Sequential:
    """A stem, three blocks of one convolution and one batch norm, a head."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, width, 3), *(Block(width) for _ in range(3)), nn.Conv2d(width, 2, 1))
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return network.eval()


def image_batch() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def plan(*labels: str, network: nn.Module | None = None, front_end: FrontEnd = "auto") -> Plan:
    gm = fxprune.trace(network or normed(), image_batch(), front_end=front_end)
    regions = [r for r in fxprune.discover(gm).regions if r.label in labels]
    assert len(regions) == len(labels)
    return plan_of(regions, ("identity",), describe(Inputs((image_batch(),))))


def expected(without: set[int]) -> nn.Module:
    return nn.Sequential(*(m for i, m in enumerate(normed()) if i not in without)).eval()


def torchs_fuse(gm: fx.GraphModule) -> PassResult:
    return PassResult(optimization.fuse(gm), True)


@torch.no_grad()
@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("made_by", ["fx", "export"])
def test_a_plan_cuts_the_same_blocks_of_every_graph(made_by: FrontEnd, front_end: FrontEnd) -> None:
    gm = fxprune.trace(normed(), image_batch(), front_end=front_end)
    again = Plan.from_json(plan("1", "3", front_end=made_by).to_json())
    assert Cut(again)(gm).modified
    torch.testing.assert_close(gm(image_batch()), expected({1, 3})(image_batch()))


@torch.no_grad()
@pytest.mark.parametrize("order", ["fused before", "fused after", "folded before", "folded after"])
def test_torchs_manager_runs_it_before_and_after_foldings(order: str) -> None:
    fold = torchs_fuse if order.startswith("fused") else FoldBatchNorm()
    cut = Cut(plan("1", "3"))
    passes = [fold, cut] if order.endswith("before") else [cut, fold]
    manager = PassManager(passes=passes, run_checks_after_each_pass=True)
    result = manager(fxprune.trace(normed(), image_batch()))
    assert result is not None
    small = result.graph_module
    torch.testing.assert_close(small(image_batch()), expected({1, 3})(image_batch()))
    assert not [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def test_torch_compiles_and_exports_what_was_cut() -> None:
    gm = fxprune.trace(normed(), image_batch())
    Cut(plan("2"))(gm)
    wanted = expected({2})(image_batch())
    torch.testing.assert_close(torch.compile(gm, backend="aot_eager")(image_batch()), wanted)
    torch.testing.assert_close(torch.export.export(gm, (image_batch(),)).module()(image_batch()), wanted)


def test_a_plan_is_cut_once() -> None:
    gm = fxprune.trace(normed(), image_batch())
    cut = Cut(plan("1"))
    assert cut(gm).modified and not cut(gm).modified
    assert Cut(plan("3"))(gm).modified and not cut(gm).modified  # nor when more than its blocks are gone


def without_first(network: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(network[0], nn.Identity(), *network[2:])


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (without_first(normed()), "the plan names 1, and no region is called that; there are: 2, 3"),
        (normed(width=7), r"the plan names 1, an identity region of shape \[6, 8, 8\].* shape \[7, 8, 8\]"),
    ],
)
def test_blocks_that_are_missing_or_others_are_named(network: nn.Module, words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        Cut(plan("1", "3"))(fxprune.trace(network, image_batch()))


def test_a_block_of_another_kind_is_named() -> None:
    made = plan("1")
    (cut,) = made.cuts
    with pytest.raises(PreconditionError, match=r"names 1, a projection region .* which here is an identity"):
        Cut(replace(made, cuts=(replace(cut, kind="projection"),)))(fxprune.trace(normed(), image_batch()))


def test_a_block_that_cannot_be_cut_says_why() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x + self.norm(self.conv(x)).relu()

    network = normed()
    network[1] = Scaled(6).eval()
    with pytest.raises(PreconditionError, match="the plan names 1, which cannot be cut: "):
        Cut(plan("1"))(fxprune.trace(network, image_batch()))


def test_a_graph_that_forgot_its_modules_is_told_what_to_do() -> None:
    gm = fxprune.trace(normed(), image_batch(), front_end="export")
    with pytest.raises(PreconditionError, match=r"names 1, .*run such a pass after the cut"):
        Cut(plan("1"))(optimization.fuse(gm))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "here is no plan, or damaged"),
        ("[]", "here is no plan, or damaged"),
        ('{"format": 1}', "here is no plan, or damaged"),
        ('{"format": 2, "cuts": []}', "here has format 2, .* reads format 1: install a newer"),
        ("[" * 100_000, "here is no plan, or damaged"),
    ],
)
def test_what_is_no_plan_is_named(text: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        Plan.from_json(text, "here")


def test_every_field_of_a_plan_is_checked_for_its_type() -> None:
    whole = json.loads(plan("1").to_json())
    for field, wrong in [("cuts", [{}]), ("cuts", 3), ("kinds", [3])]:
        with pytest.raises(ArtifactError, match="no plan"):
            Plan.from_json(json.dumps(whole | {field: wrong}))
    for field, wrong in [("label", 1), ("kind", None), ("shape", ["x"]), ("modules", [None])]:
        with pytest.raises(ArtifactError, match="no plan"):
            Plan.from_json(json.dumps(whole | {"cuts": [whole["cuts"][0] | {field: wrong}]}))


def test_inputs_come_back_in_their_structure() -> None:
    given = Inputs(
        (torch.zeros(2, 3), [torch.zeros(2, 1, dtype=torch.int64), (None, 2.5)]),
        {"mask": torch.ones(2, dtype=torch.bool), "scale": torch.tensor(0.5), "more": {"on": True}},
    )
    again = example_of(json.loads(json.dumps(describe(given))))
    (first, (second, rest)), kwargs = again.args, again.kwargs
    assert first.shape == (2, 3) and first.std() > 0
    assert second.dtype == torch.int64 and rest == (None, 2.5)
    assert kwargs["mask"].dtype == torch.bool and kwargs["scale"] == 0.5 and kwargs["more"] == {"on": True}
    assert torch.equal(example_of(describe(given)).args[0], first)


def test_inputs_follow_the_weights() -> None:
    described = describe(Inputs((torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))))
    one, other = example_for(nn.Linear(2, 2).half(), described).args
    assert one.dtype == torch.float16 and other.dtype == torch.int64


def test_inputs_that_json_cannot_say_are_left_out() -> None:
    assert describe(Inputs((torch.zeros(1), object()))) is None
    with pytest.raises(ArtifactError, match="describes no inputs"):
        example_of(None)


@pytest.mark.parametrize(
    "described",
    [
        {"shape": [2**30], "dtype": "float32"},
        {"shape": [2**20, 2**20], "dtype": "float32"},
        {"shape": [-1], "dtype": "float32"},
        {"shape": [1], "dtype": "save"},
        {"shape": [1], "dtype": "nothing"},
        {"dtype": "float32"},
        {"set": []},
    ],
)
def test_malformed_inputs_are_refused(described: Any) -> None:
    with pytest.raises(ArtifactError, match="describes no inputs"):
        example_of({"args": [described], "kwargs": {}})


# --- compress(plan=) ---


def compress(**settings: Any) -> fx.GraphModule:
    model = settings.pop("model", None) or tiny()
    return fxprune.compress(
        model, images(), recipe=brief(), progress=False, latency_batch=2, threads=1, **settings
    )


def test_compress_cuts_what_an_earlier_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)
    first = compress(regions=["body.0", "body.2"], out=tmp_path)
    again = compress(plan=tmp_path / "plan.json")
    assert fxprune.report(again).plan.chosen == ("body.0", "body.2")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert fxprune.report(again).settings["plan"]["cuts"][1]["label"] == "body.2"


def test_compress_looks_for_the_kinds_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    first = compress(model=chain, regions="1", kinds="sequential", out=tmp_path)
    again = compress(model=chain, plan=Plan.read(tmp_path / "plan.json"))
    assert again.code == first.code and "_1" not in dict(again.named_children())


def test_compress_names_blocks_that_are_missing_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_work(monkeypatch)
    lost = Plan((PlannedCut("body.9", "identity", (8, 16, 16), ()),), ("identity",), None)
    with pytest.raises(OptionError, match=r"the plan names body.9, and no region .* did you mean body\."):
        compress(plan=lost)
    other = Plan((PlannedCut("body.1", "identity", (8, 8, 8), ()),), ("identity",), None)
    with pytest.raises(OptionError, match=r"of shape \[8, 8, 8\], which here is .*\[8, 16, 16\]"):
        compress(plan=other)


def test_a_plan_is_a_goal_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"exactly one of k, .* regions and plan"):
        compress(plan=plan("1"), k=1)
    with pytest.raises(ArtifactError, match=r"nowhere\.json cannot be read"):
        compress(plan=tmp_path / "nowhere.json")
