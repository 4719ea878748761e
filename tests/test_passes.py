"""The contract of a pass, and what each pass does and refuses to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

import fxprune
from fxprune.errors import (
    FoldError,
    GraphError,
    PassError,
    PostconditionError,
    PreconditionError,
)
from fxprune.graph.extract import share
from fxprune.graph.regions import AdaptorSite, Region, Side
from fxprune.options import FrontEnd
from fxprune.passes import (
    Adaptor,
    Canonicalize,
    Cut,
    DropRegions,
    FoldAdaptors,
    FoldBatchNorm,
    FxPass,
    InsertAdaptors,
    Prepare,
    PropagateShapes,
    Sequential,
    StoreWeights,
)
from fxprune.placement.placement import find_sites
from tests.strategies import BlockSpec, NetSpec, image_batch, skipped

SPEC = NetSpec((4, 6), (2,), (True,), ((BlockSpec("basic"),) * 2, (BlockSpec("bottleneck"),) * 3))


def network() -> fx.GraphModule:
    return fxprune.trace(SPEC.build(), image_batch())


def regions(gm: fx.GraphModule, kinds: tuple[str, ...] = ("identity",)) -> dict[str, Region]:
    return {region.label: region for region in fxprune.discover(gm, kinds=kinds).regions}


def names(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


# --- the base class ---


class Given(FxPass):
    """A pass whose `call` is given."""

    def __init__(self, call: Callable[[fx.GraphModule], PassResult]) -> None:
        self._call = call

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return self._call(graph_module)


def test_a_foreign_exception_becomes_a_pass_error_with_its_cause() -> None:
    def fail(gm: fx.GraphModule) -> PassResult:
        raise KeyError("lost")

    with pytest.raises(PassError, match="Given failed: KeyError: 'lost'") as caught:
        Given(fail)(network())
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_tree_stays_what_it_is() -> None:
    error = FoldError("as it was", nodes=["here"])

    def fail(gm: fx.GraphModule) -> PassResult:
        raise error

    with pytest.raises(FoldError) as caught:
        Given(fail)(network())
    assert caught.value is error


def test_another_object_is_the_authors_mistake() -> None:
    with pytest.raises(PostconditionError, match=r"Given works in place.*author must return"):
        Given(lambda gm: PassResult(copy.deepcopy(gm), False))(network())


def test_a_result_that_does_not_lint_is_found() -> None:
    def break_(gm: fx.GraphModule) -> PassResult:
        first, second = gm.graph.find_nodes(op="call_module")[:2]
        first.replace_input_with(first.all_input_nodes[0], second)  # reads what is computed later
        return PassResult(gm, True)

    with pytest.raises(PostconditionError, match="does not lint"):
        Given(break_)(network())


def test_the_result_is_recompiled_and_then_checked() -> None:
    seen: list[str] = []

    class Renames(FxPass):
        def requires(self, graph_module: fx.GraphModule) -> None:
            seen.append(f"requires {'relu' in graph_module.code}")

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
                node.target = torch.sigmoid
            return PassResult(graph_module, True)

        def ensures(self, graph_module: fx.GraphModule) -> None:
            seen.append(f"ensures {'sigmoid' in graph_module.code}")

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    gm = fx.symbolic_trace(Net())
    Renames()(gm)
    assert seen == ["requires True", "ensures True"]
    assert torch.equal(gm(torch.zeros(1)), torch.tensor([0.5]))


def test_passes_run_in_torchs_own_manager() -> None:
    gm = network()
    label, region = next(iter(regions(gm).items()))
    sites = find_sites(gm, [region]).sites
    net = SPEC.build()
    manager = PassManager(
        passes=[
            PropagateShapes(image_batch()),
            DropRegions([region]),
            InsertAdaptors(sites),
            FoldAdaptors(),
            Canonicalize(),
        ],
        run_checks_after_each_pass=True,
    )
    result = manager(gm)
    with torch.no_grad(), skipped(net, label):
        assert torch.allclose(result.graph_module(image_batch()), net(image_batch()), rtol=0, atol=1e-12)


def test_torchs_manager_shows_our_error_as_the_cause() -> None:
    missing = AdaptorSite("nowhere", Side.PRE, 4, 1)
    with pytest.raises(Exception, match="InsertAdaptors") as caught:
        PassManager(passes=[InsertAdaptors([missing])])(network())
    assert isinstance(caught.value.__cause__, GraphError)


class Checks(FxPass):
    """A pass whose checks raise what they are given."""

    def __init__(self, before: Exception | None = None, after: Exception | None = None) -> None:
        self._before, self._after = before, after

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self._before is not None:
            raise self._before

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if self._after is not None:
            raise self._after


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GraphError("no such node", nodes=["here"]), "Checks: no such node"),
        (KeyError("lost"), "Checks: KeyError: 'lost'"),
        (PreconditionError("unfit", nodes=["here"]), "Checks: unfit"),
        (PostconditionError("broken", nodes=["here"]), "Checks: broken"),
    ],
)
def test_what_checks_raise_becomes_an_error_of_the_contract(error: Exception, words: str) -> None:
    for kind, checks in ((PreconditionError, Checks(error)), (PostconditionError, Checks(None, error))):
        with pytest.raises(kind) as caught:
            checks(network())
        assert str(caught.value) == words
        assert caught.value.nodes == getattr(error, "nodes", ())
        assert caught.value.__cause__ is error


STRAY = AdaptorSite("head", Side.PRE, 6, -1)


def unfit(kind: type[FxPass]) -> tuple[FxPass, fx.GraphModule, tuple[str, ...]]:
    """A pass, a graph that it must refuse, and the nodes to name."""
    gm = network()
    if kind is DropRegions:
        region = next(iter(regions(gm).values()))
        return DropRegions([replace(region, entry="nowhere")]), gm, ("nowhere",)
    if kind is InsertAdaptors:
        return InsertAdaptors([AdaptorSite("nowhere", Side.PRE, 4, 1)]), gm, ("nowhere",)
    gm.add_submodule("stray", Adaptor(STRAY))
    return FoldAdaptors(), gm, ("head",)


@pytest.mark.parametrize("kind", [DropRegions, InsertAdaptors, FoldAdaptors])
def test_passes_refuse_under_torchs_manager_as_they_promise(kind: type[FxPass]) -> None:
    rewrite, gm, nodes = unfit(kind)
    before = names(gm)
    with pytest.raises(Exception, match=kind.__name__) as caught:
        PassManager(passes=[Canonicalize(), rewrite])(gm)
    cause = caught.value.__cause__
    assert isinstance(cause, PreconditionError)
    assert str(cause).startswith(f"{kind.__name__}: ")
    assert cause.nodes == nodes
    assert names(gm) == before


# --- Sequential, Prepare, Cut ---


def test_a_sequence_runs_its_passes_in_order_and_is_a_pass() -> None:
    ran: list[str] = []

    def step(name: str, modified: bool) -> FxPass:
        return Given(lambda gm: (ran.append(name), PassResult(gm, modified))[1])

    gm = network()
    assert not Sequential()(gm).modified
    assert not Sequential(step("a", False), step("b", False))(gm).modified
    result = PassManager(passes=[Sequential(step("c", True), Sequential(step("d", False)))])(gm)
    assert result.graph_module is gm
    assert result.modified
    assert ran == ["a", "b", "c", "d"]


def test_an_error_in_a_sequence_names_the_pass_and_what_ran_before() -> None:
    error = GraphError("no such node", nodes=["here"])
    with pytest.raises(PreconditionError) as caught:
        Sequential(Canonicalize(), StoreWeights(), Checks(error), FoldAdaptors())(network())
    assert str(caught.value) == (
        "Sequential, in Checks after Canonicalize, StoreWeights: Checks: no such node"
    )
    assert caught.value.nodes == ("here",)
    assert isinstance(caught.value.__cause__, PreconditionError)


def test_preparing_is_canonicalising_and_storing_weights() -> None:
    class Net(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.nothing(super().forward(x))

    gm = fxprune.trace(Net().double().eval(), image_batch())
    by_hand = copy.deepcopy(gm)
    assert Canonicalize()(by_hand).modified
    assert StoreWeights()(by_hand).modified
    assert Prepare()(gm).modified
    assert gm.code == by_hand.code
    assert not Prepare()(gm).modified


@torch.no_grad()
def test_a_cut_is_its_three_passes_by_hand_and_runs_once() -> None:
    gm = network()
    (region,) = [r for label, r in regions(gm).items() if label == "stages.0.1"]
    sites = find_sites(gm, [region]).sites
    maps = {s: torch.eye(s.channels) + 0.1 * torch.randn(s.channels, s.channels) for s in sites}
    assert len(sites) > 1
    by_hand, bare, open_ = (copy.deepcopy(gm) for _ in range(3))
    DropRegions([region])(by_hand)
    Cut([region])(bare)
    assert bare.code == by_hand.code
    InsertAdaptors(sites)(by_hand)
    for module in by_hand.modules():
        if isinstance(module, Adaptor):
            module.weight.copy_(maps[module.site])
    Cut([region], maps, fold=False)(open_)
    assert torch.equal(open_(image_batch()), by_hand(image_batch()))
    FoldAdaptors()(by_hand)
    result = PassManager(passes=[Cut([region], maps)], steps=3)(gm)
    assert result.modified
    assert gm.code == by_hand.code
    assert torch.equal(gm(image_batch()), by_hand(image_batch()))
    assert not torch.equal(gm(image_batch()), bare(image_batch()))
    assert not Cut([region], maps)(gm).modified
    with pytest.raises(PreconditionError, match=r"of 2 regions only stages\.0\.0 are still there"):
        Cut([region, regions(network())["stages.0.0"]], maps)(gm)


def test_a_map_that_does_not_fit_its_site_is_refused() -> None:
    gm = network()
    site = AdaptorSite("stages_0_0_branch_0", Side.PRE, 4, 1)
    with pytest.raises(PreconditionError, match=r"has 4 channels, and the map is \[1, 4\]"):
        InsertAdaptors({site: torch.ones(1, 4)})(gm)  # copying would spread it over all rows


# --- DropRegions ---


def test_overlapping_regions_are_refused_by_name() -> None:
    gm = network()
    found = regions(gm, ("identity", "sequential"))
    inner = next(
        r for r in found.values() if r.kind.value == "sequential" and r.label.startswith("stages.0.0")
    )
    with pytest.raises(PreconditionError, match=r"overlap") as caught:
        DropRegions([found["stages.0.0"], inner])
    assert inner.label in str(caught.value)
    assert "stages.0.0" in str(caught.value)


def test_regions_of_another_graph_are_refused_and_nothing_is_cut() -> None:
    other = fxprune.trace(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()), image_batch().float())
    strange = next(iter(regions(network()).values()))
    before = names(other)
    with pytest.raises(GraphError, match="discover the regions on this very graph") as caught:
        DropRegions([strange])(other)
    assert caught.value.nodes
    assert names(other) == before
    with pytest.raises(GraphError, match="this very graph"):
        find_sites(other, [strange])


def test_the_order_in_which_regions_are_given_does_not_matter() -> None:
    texts = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]):
        gm = network()
        found = [r for label, r in regions(gm).items() if label.startswith("stages.1")]
        DropRegions([found[i] for i in order])(gm)
        texts.add(gm.code)
    assert len(found) == 3
    assert len(texts) == 1


def test_what_was_dropped_is_gone_for_good() -> None:
    gm = network()
    region = regions(gm)["stages.0.1"]
    assert DropRegions([region])(gm).modified
    assert not set(region.body) & set(names(gm))
    assert not any(name.startswith("stages.0.1.") for name, _ in gm.named_parameters())
    assert not DropRegions([region])(gm).modified


class Shared(nn.Module):
    """A block between an in-place reader and a second reader of its entry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = x if self.skip else x + self.conv2(F.relu(self.conv1(x)))
        out = F.relu_(out.clone() if self.skip else out)
        return out + 2 * x


@torch.no_grad()
def test_an_in_place_reader_gets_a_clone_where_the_bypass_is_read_elsewhere() -> None:
    net = Shared().double().eval()
    gm = fxprune.trace(net, image_batch())
    (region,) = [r for r in fxprune.discover(gm).regions if "conv1" in r.modules]
    DropRegions([region])(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_method"] == ["clone"]
    net.skip = True
    assert torch.equal(gm(image_batch()), net(image_batch()))


@torch.no_grad()
def test_no_clone_where_nothing_else_reads_the_bypass() -> None:
    net = NetSpec((4,), (), (), ((BlockSpec("basic", inplace=True),) * 3,)).build()
    gm = fxprune.trace(net, image_batch())
    DropRegions(fxprune.discover(gm).regions[:2])(gm)
    assert not gm.graph.find_nodes(op="call_method", target="clone")
    with skipped(net, "stages.0.0", "stages.0.1"):
        assert torch.equal(gm(image_batch()), net(image_batch()))


@torch.no_grad()
def test_the_networks_input_is_not_changed_by_what_the_cut_leaves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(x + self.conv2(F.relu(self.conv1(x))))

    gm = fxprune.trace(Net().double(), image_batch())
    DropRegions(fxprune.discover(gm).regions)(gm)
    batch = image_batch()
    assert torch.equal(gm(batch), F.relu(image_batch()))
    assert torch.equal(batch, image_batch())


@torch.no_grad()
def test_a_projection_keeps_its_shortcut() -> None:
    net = SPEC.build()
    gm = fxprune.trace(net, image_batch())
    (region,) = [r for r in regions(gm, ("projection",)).values() if r.kind.value == "projection"]
    DropRegions([region])(gm)
    kept = {name for name, _ in gm.named_modules()}
    assert "stages.1.0.shortcut" in kept
    assert "stages.1.0.conv" not in kept
    transition = net.stages[1][0]
    transition.forward = lambda x: F.relu(transition.shortcut(x))  # type: ignore[method-assign]
    assert torch.allclose(gm(image_batch()), net(image_batch()), rtol=0, atol=1e-12)


# --- InsertAdaptors and FoldAdaptors ---


def test_sites_that_do_not_fit_are_refused_before_anything_changes() -> None:
    gm = network()
    before = names(gm)
    fitting = AdaptorSite("stages_0_0_branch_0", Side.PRE, 4, 1)
    with pytest.raises(GraphError, match="no dense operator") as caught:
        InsertAdaptors([fitting, AdaptorSite("stem_1", Side.PRE, 4, 1)])(gm)
    assert caught.value.nodes == ("stem_1",)
    with pytest.raises(PreconditionError, match="has 4 channels, not 5"):
        InsertAdaptors([fitting, AdaptorSite("stages_0_0_branch_0", Side.POST, 5, 1)])(gm)
    assert names(gm) == before


def test_grouped_operators_take_no_adaptor() -> None:
    net = NetSpec((4,), (), (), ((BlockSpec("depthwise"),),)).build()
    gm = fxprune.trace(net, image_batch())
    with pytest.raises(PreconditionError, match="grouped"):
        InsertAdaptors([AdaptorSite("stages_0_0_branch_0", Side.PRE, 4, 1)])(gm)


def test_adaptors_stand_where_their_sites_say() -> None:
    gm = network()
    sites = [AdaptorSite("stages_0_0_branch_0", side, 4, 1) for side in (Side.PRE, Side.POST)]
    assert InsertAdaptors(sites)(gm).modified
    assert not InsertAdaptors(sites)(gm).modified
    conv = next(n for n in gm.graph.nodes if n.name == "stages_0_0_branch_0")
    (before,), (after,) = conv.all_input_nodes, conv.users
    assert isinstance(gm.get_submodule(before.target), Adaptor)
    assert isinstance(gm.get_submodule(after.target), Adaptor)
    assert [n.name for n in before.all_input_nodes] == ["stem_2"]
    assert [n.name for n in after.users] == ["stages_0_0_branch_1"]
    shortcut = next(n for n in gm.graph.nodes if n.name == "add")
    assert any(n.name == "stem_2" for n in shortcut.all_input_nodes)  # the shortcut keeps the plain stream
    assert before.meta["tensor_meta"].shape == (2, 4, 8, 8)


def test_adaptors_have_weights_like_their_operator_and_no_bias() -> None:
    gm = network()
    site = AdaptorSite("head", Side.PRE, 6, -1)
    InsertAdaptors([site])(gm)
    (adaptor,) = [m for m in gm.modules() if isinstance(m, Adaptor)]
    assert [name for name, _ in adaptor.named_parameters()] == ["weight"]
    assert adaptor.weight.dtype == torch.float64
    assert torch.equal(adaptor.weight, torch.eye(6, dtype=torch.float64))
    assert "head, pre, channels=6" in repr(adaptor)


@torch.no_grad()
def test_both_sides_of_one_operator_fold_together() -> None:
    gm = network()
    InsertAdaptors([AdaptorSite("stages_0_0_branch_0", side, 4, 1) for side in Side])(gm)
    for module in gm.modules():
        if isinstance(module, Adaptor):
            module.weight.add_(0.2 * torch.randn(4, 4, dtype=torch.float64))
    inserted = gm(image_batch())
    FoldAdaptors()(gm)
    assert torch.allclose(gm(image_batch()), inserted, rtol=0, atol=1e-10)


def test_an_adaptor_whose_operator_is_gone_cannot_fold() -> None:
    gm = network()
    InsertAdaptors([AdaptorSite("stages_0_0_branch_0", Side.PRE, 4, 1)])(gm)
    next(n for n in gm.graph.nodes if n.name == "stages_0_0_branch_0").name = "renamed"
    with pytest.raises(FoldError, match="stages_0_0_branch_0") as caught:
        FoldAdaptors()(gm)
    assert caught.value.nodes == ("stages_0_0_branch_0",)


def test_an_adaptor_that_nobody_calls_is_found() -> None:
    gm = network()
    gm.add_submodule("stray", Adaptor(AdaptorSite("head", Side.PRE, 6, -1)))
    with pytest.raises(FoldError, match="adaptors remain at head"):
        FoldAdaptors()(gm)


class Attends(nn.Module):
    """Packed self-attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.outer = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.outer(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("side", list(Side))
@torch.no_grad()
def test_adaptors_fold_into_packed_attention(side: Side) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    net = Attends().double().eval()
    nn.init.normal_(net.attention.out_proj.bias)
    gm = fxprune.trace(net, x)
    plain, nodes = gm(x), names(gm)
    InsertAdaptors([AdaptorSite("attention", side, 8, -1)])(gm)
    assert torch.allclose(gm(x), plain, rtol=0, atol=1e-14)
    for module in gm.modules():
        if isinstance(module, Adaptor):
            module.weight.add_(0.3 * torch.randn(8, 8, dtype=torch.float64))
    inserted = gm(x)
    assert not torch.allclose(inserted, plain)
    FoldAdaptors()(gm)
    assert torch.allclose(gm(x), inserted, rtol=0, atol=1e-10)
    assert names(gm) == nodes


# --- FoldBatchNorm ---


@torch.no_grad()
def test_batch_norms_fold_into_convolutions() -> None:
    gm = network()
    before = gm(image_batch())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in gm.modules())
    assert FoldBatchNorm()(gm).modified
    assert norms > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in gm.modules())
    assert torch.allclose(gm(image_batch()), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
def test_folding_batch_norms_leaves_shared_modules_alone(trained: bool) -> None:
    gm = network()
    for module in gm.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(trained)  # whatever the norms' is
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    other = share(gm)
    FoldBatchNorm()(other)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    convolutions = [m for m in other.modules() if isinstance(m, nn.Conv2d)]
    assert {p.requires_grad for m in convolutions for p in m.parameters()} == {trained}
    assert torch.allclose(other(image_batch()), gm(image_batch()), rtol=0, atol=1e-12)


class Own(nn.Conv2d):
    pass


class OwnNorm(nn.BatchNorm2d):
    pass


class Norms(nn.Module):
    """Cases that must be left alone, each with a convolution and a norm."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3, track_running_stats=case != "no statistics")
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.case == "convolution twice":
            return self.bn(self.conv(x)) + self.other(self.conv(x + 1))
        if self.case == "norm twice":
            return self.bn(self.bn(self.conv(x)))
        out = self.conv(x)
        return self.bn(out) + out if self.case == "output read" else self.bn(out)


@pytest.mark.parametrize(
    "case",
    [
        "convolution twice",
        "norm twice",
        "output read",
        "no statistics",
        "training",
        "own convolution",
        "own norm",
        "hooked",
    ],
)
@torch.no_grad()
def test_pairs_that_do_not_qualify_are_left_alone(case: str) -> None:
    gm = fxprune.trace(Norms(case).double(), image_batch())
    if case == "hooked":
        gm.get_submodule("conv").register_forward_hook(lambda module, args, output: 2 * output)
    if case == "training":
        gm.get_submodule("bn").train()
    if case == "own convolution":  # a tracer that took it for a leaf has met it
        gm.get_submodule("conv").__class__ = Own
    if case == "own norm":
        gm.get_submodule("bn").__class__ = OwnNorm
    code, before = gm.code, {k: v.clone() for k, v in gm.state_dict().items()}
    assert not FoldBatchNorm()(gm).modified
    assert gm.code == code
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())


# --- Canonicalize and PropagateShapes ---


@torch.no_grad()
def test_identities_and_dead_nodes_go_and_in_place_operators_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.nothing = nn.Conv2d(3, 3, 1), nn.Identity()
            self.unread, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor, unused: Tensor) -> Tensor:
            self.unread(x)
            out = self.nothing(self.conv(x))
            out.add_(1.0)
            F.relu_(out)
            self.act(out)
            return out

    given = (image_batch(), image_batch())
    gm = fx.symbolic_trace(Net().double().eval())
    before = gm(*given)
    assert Canonicalize()(gm).modified
    assert torch.equal(gm(*given), before)
    assert names(gm) == ["x", "unused", "conv", "add_", "relu_", "act", "output"]
    assert {name for name, _ in gm.named_children()} == {"conv", "act"}
    assert not Canonicalize()(gm).modified


def test_a_subclass_of_identity_may_compute_something() -> None:
    class Doubles(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    root = nn.Sequential(Doubles())
    gm = fx.GraphModule(root, Tracer().trace(root))
    assert not Canonicalize()(gm).modified
    assert gm(torch.ones(1)) == 2


def test_shapes_follow_the_given_inputs() -> None:
    gm = network()
    PropagateShapes(image_batch(5, size=12))(gm)
    conv = next(n for n in gm.graph.nodes if n.name == "stem_0")
    assert conv.meta["tensor_meta"].shape == (5, 4, 12, 12)
    with pytest.raises(GraphError, match=r"does not run on example inputs of shape \[\(2, 4, 8, 8\)\]"):
        PropagateShapes(torch.zeros(2, 4, 8, 8, dtype=torch.float64))(gm)
    with pytest.raises(GraphError, match="'x' of the network was not given"):
        PropagateShapes()(gm)


# --- StoreWeights ---


class Standardised(nn.Module):
    """A convolution that standardises and scales its weight on every call, as NF-ResNets have them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.gain = nn.Parameter(torch.rand(channels, 1, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) * self.gain, self.bias, padding=1)


class Residual(nn.Module):
    """Stem, one block and a second convolution, all of them standardised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.tail = Standardised(3), Standardised(3), Standardised(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.tail(x)


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_computed_weights_are_stored_and_take_adaptors(front_end: FrontEnd) -> None:
    model = Residual().double().eval()
    gm = fxprune.trace(model, image_batch(), front_end=front_end)
    (region,) = fxprune.discover(gm).regions
    assert not find_sites(gm, [region]).sites
    with torch.no_grad():
        before = gm(image_batch())
        assert StoreWeights()(gm).modified
        assert torch.equal(gm(image_batch()), before)
    stored = {name.rpartition(".")[2] for name, _ in gm.named_parameters()}
    assert stored == {"stored_weight", "bias"}
    assert len(list(gm.parameters())) == 6
    (region,) = fxprune.discover(gm).regions
    assert len(find_sites(gm, [region]).sites) == 2
    assert not StoreWeights()(gm).modified


def test_what_a_weight_was_computed_from_stays_where_something_else_reads_it() -> None:
    class Net(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.stem.gain.sum()

    gm = fxprune.trace(Net().double().eval(), image_batch())
    StoreWeights()(gm)
    assert {name for name, _ in gm.named_parameters() if name.startswith("stem")} == {
        "stem.stored_weight",
        "stem.bias",
        "stem.gain",
    }


def test_a_weight_that_depends_on_the_input_is_left_alone() -> None:
    class Dynamic(Standardised):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean(), self.bias)

    gm = fxprune.trace(Dynamic(3).double().eval(), image_batch())
    assert not StoreWeights()(gm).modified
