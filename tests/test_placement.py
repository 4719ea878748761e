"""Adaptor sites, derived by hand: producers of the stream before the cut, consumers behind it (PRACTISE, figure 4)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import GraphError
from fxprune.placement.placement import find_sites
from tests.strategies import BlockSpec, NetSpec, image_batch


def placed(
    gm: fx.GraphModule, *labels: str, kinds: tuple[str, ...] = ("identity",)
) -> tuple[set[str], set[str], set[str]]:
    """Module paths with a POST adaptor, with a PRE adaptor, and those refused."""
    chosen = [region for region in fxprune.discover(gm, kinds=kinds).regions if region.label in labels]
    assert len(chosen) == len(labels)
    placement = find_sites(gm, chosen)
    path = {node.name: str(node.target) for node in gm.graph.nodes}
    order = list(path)
    assert [s.operator for s in placement.sites] == sorted(
        (s.operator for s in placement.sites), key=order.index
    )
    sides = {"post": set[str](), "pre": set[str]()}
    for site in placement.sites:
        sides[site.side.value].add(path[site.operator])
    return sides["post"], sides["pre"], {path[refusal.operator] for refusal in placement.refused}


def resnet(kind: str = "basic", *, projection: bool = True) -> fx.GraphModule:
    """Stem, three blocks of 4 channels, a transition, two blocks of 6, pooling, classifier."""
    block = BlockSpec(kind)
    spec = NetSpec((4, 6), (2,), (projection,), ((block,) * 3, (block,) * 2))
    return fxprune.trace(spec.build(), image_batch())


# a basic block's convolutions are branch.0 and branch.3; the transition into the second stage is stages.1.0
INTO = {"stages.1.0.conv", "stages.1.0.shortcut"}
CUTS = {
    "stages.0.0": ({"stem.0"}, {"stages.0.1.branch.0", "stages.0.2.branch.0", *INTO}),
    "stages.0.1": ({"stem.0", "stages.0.0.branch.3"}, {"stages.0.2.branch.0", *INTO}),
    "stages.0.2": ({"stem.0", "stages.0.0.branch.3", "stages.0.1.branch.3"}, INTO),
    "stages.1.1": (INTO, {"stages.1.2.branch.0", "head"}),
    "stages.1.2": ({*INTO, "stages.1.1.branch.3"}, {"head"}),
}


@pytest.mark.parametrize("label", CUTS)
def test_a_residual_network_as_in_the_paper(label: str) -> None:
    assert placed(resnet(), label) == (*CUTS[label], set())


def test_without_a_projection_the_transition_alone_reads_the_stream() -> None:
    post, pre, _ = placed(resnet(projection=False), "stages.0.2")
    assert post == CUTS["stages.0.2"][0]
    assert pre == {"stages.1.0.conv"}


def test_two_cuts_share_their_sites_and_none_lies_inside_a_cut() -> None:
    post, pre, _ = placed(resnet(), "stages.0.0", "stages.0.1")
    assert post == {"stem.0"}
    assert pre == {"stages.0.2.branch.0", *INTO}
    post, pre, _ = placed(resnet(), "stages.0.1", "stages.1.1")
    assert post == {"stem.0", "stages.0.0.branch.3", *INTO}
    assert pre == {"stages.0.2.branch.0", *INTO, "stages.1.2.branch.0", "head"}


def test_sites_know_their_widths_and_where_channels_lie() -> None:
    gm = resnet()
    (region,) = [r for r in fxprune.discover(gm).regions if r.label == "stages.1.2"]
    found = {s.operator: (s.channels, s.channel_dim) for s in find_sites(gm, [region]).sites}
    assert found["stages_1_0_conv"] == (6, 1)
    assert found["head"] == (6, -1)  # it reads pooled features: pooling commutes with the map


def test_a_cut_projection_leaves_its_shortcut_as_the_producer() -> None:
    post, pre, _ = placed(resnet(), "stages.1.0", kinds=("projection",))
    assert post == {"stages.1.0.shortcut"}
    assert pre == {"stages.1.1.branch.0", "stages.1.2.branch.0", "head"}


def test_inverted_residuals() -> None:
    # expansion branch.0, depthwise branch.3, projection branch.6
    post, pre, refused = placed(resnet("inverted"), "stages.0.1")
    assert post == {"stem.0", "stages.0.0.branch.6"}
    assert pre == {"stages.0.2.branch.0", *INTO}
    assert refused == set()


def test_pre_activation_blocks_write_with_their_last_convolution() -> None:
    # norm branch.0, convolutions branch.2 and branch.5
    post, pre, _ = placed(resnet("preactivation"), "stages.0.1")
    assert post == {"stem.0", "stages.0.0.branch.5"}
    assert pre == {"stages.0.2.branch.2", *INTO}


def test_a_depthwise_reader_is_passed_over_to_the_next_dense_operator() -> None:
    # depthwise branch.0, pointwise branch.3
    post, pre, refused = placed(resnet("depthwise"), "stages.0.1")
    assert post == {"stem.0", "stages.0.0.branch.3"}
    assert pre == {"stages.0.2.branch.3", *INTO}
    assert refused == {"stages.0.2.branch.0"}


def test_a_gate_is_not_part_of_the_stream() -> None:
    # convolutions branch.0 and branch.3, gate branch.5 with fc1 and fc2
    post, pre, _ = placed(resnet("squeeze"), "stages.0.1")
    assert post == {"stem.0", "stages.0.0.branch.3"}
    assert pre == {"stages.0.2.branch.0", *INTO}


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.gamma * self.fc2(F.gelu(self.fc1(out)))
        return x + out.permute(0, 3, 1, 2)


class Blocks(nn.Module):
    """An embedding, blocks, and a head over the mean."""

    def __init__(self, embed: nn.Module, blocks: list[nn.Module], dims: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.Sequential(*blocks), nn.Linear(8, 5)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(self.dims))


def test_convnext_blocks_pass_the_depthwise_convolution_over() -> None:
    net = Blocks(nn.Conv2d(3, 8, 2, stride=2), [ConvNeXtBlock() for _ in range(3)], (2, 3))
    gm = fxprune.trace(net.double(), image_batch())
    post, pre, refused = placed(gm, "blocks.1")
    assert post == {"embed", "blocks.0.fc2"}
    assert pre == {"blocks.2.fc1", "head"}
    assert refused == {"blocks.2.depthwise"}
    dims = {
        s.operator: s.channel_dim
        for r in fxprune.discover(gm).regions
        if r.label == "blocks.1"
        for s in find_sites(gm, [r]).sites
    }
    assert dims == {"embed": 1, "blocks_0_fc2": -1, "blocks_2_fc1": -1, "head": -1}


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize(
    ("label", "post", "pre"),
    [
        ("1", {"0.attention", "0.fc2"}, {"2.attention", "2.fc1"}),
        ("1#1", {"0.attention", "0.fc2"}, {"1.fc1", "2.attention", "2.fc1"}),
        ("1#2", {"0.attention", "0.fc2", "1.attention"}, {"2.attention", "2.fc1"}),
    ],
)
def test_transformer_layers_and_their_branches(label: str, post: set[str], pre: set[str]) -> None:
    net = Blocks(nn.Linear(3, 8), [Layer() for _ in range(3)], (1,)).double()
    gm = fxprune.trace(net, torch.randn(2, 6, 3, dtype=torch.float64))
    found = {r.label: r.modules for r in fxprune.discover(gm).regions if r.label.startswith("blocks.1")}
    branches = {"1": 0, "1#1": 0, "1#2": 0}
    by_label = {key: f"blocks.{key}" for key in branches}
    by_label["1#1"] = next(name for name, modules in found.items() if modules[-1].endswith("attention"))
    by_label["1#2"] = next(
        name for name, modules in found.items() if not any("attention" in m for m in modules)
    )
    assert placed(gm, by_label[label]) == (
        {"embed", *(f"blocks.{p}" for p in post)},
        {"head", *(f"blocks.{p}" for p in pre)},
        set(),
    )


def test_a_classifier_over_positions_reads_another_width() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv1, self.conv2 = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
            self.head = nn.Linear(4 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.conv2(F.relu(self.conv1(x)))
            return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))

    gm = fxprune.trace(Flat(), image_batch(dtype=torch.float32))
    (region,) = fxprune.discover(gm).regions
    assert [(s.operator, s.side.value) for s in find_sites(gm, [region]).sites] == [("stem", "post")]


def test_shared_producers_are_refused_and_named() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.shared, self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(F.relu(self.stem(x)))
            x = x + self.conv2(F.relu(self.conv1(x)))
            return self.shared(x)

    gm = fxprune.trace(Shares(), image_batch(dtype=torch.float32))
    region = next(r for r in fxprune.discover(gm).regions if "conv1" in r.modules)
    placement = find_sites(gm, [region])
    assert placement.sites == ()
    assert {(r.operator, r.side.value) for r in placement.refused} == {
        ("shared", "post"),
        ("shared_1", "pre"),
    }
    assert all("more than once" in refusal.reason for refusal in placement.refused)


@pytest.mark.parametrize("kind", ["basic", "inverted", "depthwise"])
def test_exported_graphs_have_the_same_sites(kind: str) -> None:
    block = BlockSpec(kind)
    spec = NetSpec((4, 6), (2,), (True,), ((block,) * 3, (block,)))
    found = []
    for front_end in ("fx", "export"):
        gm = fxprune.trace(spec.build(), image_batch(), front_end=front_end)  # type: ignore[arg-type]
        weights = [
            [(s.side, s.channels, s.channel_dim) for s in find_sites(gm, [region]).sites]
            for region in fxprune.discover(gm).regions
        ]
        found.append(weights)
    assert found[0] == found[1]


def test_an_entry_of_unknown_shape_gets_no_adaptors() -> None:
    gm = resnet()
    region = next(region for region in fxprune.discover(gm).regions if region.label == "stages.0.1")
    (bypass,) = (node for node in gm.graph.nodes if node.name == region.bypass)
    known = bypass.meta.pop("tensor_meta")
    assert find_sites(gm, [region]).sites == ()
    bypass.meta["tensor_meta"] = known._replace(shape=known.shape[:1])
    assert find_sites(gm, [region]).sites == ()


def test_values_of_unknown_shape_on_the_way_are_walked_through() -> None:
    gm = resnet()
    region = next(region for region in fxprune.discover(gm).regions if region.label == "stages.0.1")
    expected = find_sites(gm, [region])
    assert len(expected.sites) == 5
    for node in gm.graph.nodes:
        if node.name != region.bypass:
            node.meta.pop("tensor_meta")
    assert find_sites(gm, [region]) == expected


def test_no_regions_no_sites_and_strange_regions_are_refused() -> None:
    gm = resnet()
    assert find_sites(gm, []).sites == ()
    region = fxprune.discover(gm).regions[0]
    other = fxprune.trace(nn.Conv2d(3, 4, 1), image_batch(dtype=torch.float32))
    with pytest.raises(GraphError, match="which this graph does not hold") as caught:
        find_sites(other, [region])
    assert region.entry in caught.value.nodes
