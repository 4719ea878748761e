"""Compressing a part of a model: what reaches it, where it is mimicked, and putting it back."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import detection, optical_flow, segmentation

from fxprune.discovery.discovery import discover
from fxprune.discovery.taps import output_tap
from fxprune.errors import CalibrationError, GraphError, OptionError, TraceError
from fxprune.graph.regions import Region
from fxprune.options import recipe_named
from fxprune.passes import Canonicalize, DropRegions
from fxprune.recovery.original import Original
from fxprune.recovery.recover import recover
from fxprune.submodules.capture import capture_inputs
from fxprune.submodules.replacement import replace_submodule
from fxprune.tracing.trace import trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Body(nn.Module):
    """Two feature maps in an OrderedDict, as torchvision's detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.one, self.two = Block(), Block()
        self.out_channels = 4
        self.strides = {"one": [1, 1]}
        self.hook = print
        self._private = 1

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.one(self.stem(x if scale is None else x * scale))
        return OrderedDict(one=x, two=self.two(x))


class Detector(nn.Module):
    """Untraceable as a whole: it loops over images, and branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(OrderedDict(body=Body()))
        self.head = nn.Linear(self.backbone.body.out_channels, 2)
        self.spare = nn.Linear(1, 1)
        self.calls = 0

    def forward(self, images: Any, twice: bool = False) -> list[Tensor]:
        try:
            features = self.backbone(torch.stack(list(images)) * 2)
        except Exception:  # the private exception of capturing has to get through
            return []
        self.calls += 1
        assert list(features) == ["one", "two"]
        features.move_to_end("one")
        pooled = features["two"].mean((2, 3))
        found = [self.head(row) for row in pooled if row.sum() > -1e9]
        assert len(pooled[0]) == self.backbone.body.out_channels
        return found


def images(count: int, *, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def differ(one: Any, other: Any) -> float:
    assert pytree.tree_structure(one) == pytree.tree_structure(other)
    pairs = list(zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.detach() - b.detach()).abs().max()) if a.numel() else 0.0 for a, b in pairs)


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    return Detector().train()


def test_inputs_are_what_the_submodule_gets_and_the_model_stays(model: Detector) -> None:
    before = copy.deepcopy(model.state_dict())
    found = capture_inputs(model, "backbone.body", [images(3), images(2)], limit=10).images
    assert torch.equal(found.inputs.args[0], torch.cat([images(3), images(2)]) * 2)
    assert found.inputs.kwargs == {}
    assert model.training and model.backbone.body.training and model.calls == 0
    assert not model.backbone.body._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "batch",
    [
        images(2),
        (images(2), torch.zeros(2)),
        [images(2), torch.zeros(2)],
        (list(images(2)), [{}, {}]),
        (tuple(images(2)), ({}, {})),
        {"images": images(2), "twice": True},
        {"images": list(images(2))},
    ],
)
def test_batches_are_given_to_the_model(model: Detector, batch: Any) -> None:
    found = capture_inputs(model, "backbone.body", [batch]).images
    assert torch.equal(found.inputs.args[0], images(2) * 2)


@pytest.mark.parametrize(
    "input_fn",
    [
        lambda batch: batch["pixels"],
        lambda batch: list(batch["pixels"]),
        lambda batch: (batch["pixels"], True),
        lambda batch: {"images": batch["pixels"]},
    ],
)
def test_input_fn_is_taken_literally(model: Detector, input_fn: Callable[[Any], Any]) -> None:
    found = capture_inputs(model, "backbone.body", [{"pixels": images(2)}], input_fn=input_fn).images
    assert torch.equal(found.inputs.args[0], images(2) * 2)


def test_limit_ends_the_reading(model: Detector) -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield images(4)

    assert capture_inputs(model, "backbone.body", endless(), limit=6).images.size == 6
    assert read == 2


@pytest.mark.parametrize("as_dataset", [False, True])
def test_tensors_and_data_loaders_are_drawn_from(model: Detector, as_dataset: bool) -> None:
    numbered = torch.arange(100.0).view(-1, 1, 1, 1).expand(100, 3, 4, 4)
    loader = DataLoader(TensorDataset(numbered), batch_size=5) if as_dataset else numbered
    rows = [
        capture_inputs(model, "backbone.body", loader, limit=10, seed=s).images.inputs.args[0]
        for s in (0, 0, 1)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert len(rows[0]) == 10 and rows[0].max() > 2 * 30


def test_keywords_and_the_first_of_several_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def forward(self, x: Tensor) -> Tensor:
            first = self.body(scale=torch.ones(len(x), 1, 1, 1), x=x)
            return self.body(first["two"][:, :3])["one"]

    found = capture_inputs(Twice(), "body", [images(2)]).images
    assert found.inputs.kwargs == {} and len(found.inputs.args) == 2
    assert torch.equal(found.inputs.args[0], images(2)) and found.inputs.args[1].shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("path", "hint"), [("backbone.bdy", "'backbone.body'"), ("zzz", "'head'"), ("", "whole model")]
)
def test_an_unknown_path_names_the_nearest(model: Detector, path: str, hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        capture_inputs(model, path, [images(2)])
    with pytest.raises(OptionError, match=hint):
        replace_submodule(model, path, fx.symbolic_trace(nn.ReLU()))


def test_a_submodule_that_is_never_called_is_named(model: Detector) -> None:
    with pytest.raises(GraphError, match=r"'spare', a Linear, is never called .*\(3 batches\)"):
        capture_inputs(model, "spare", [images(1)] * 3)
    with pytest.raises(GraphError, match=r"never called .*\(20 batches\)"):
        capture_inputs(model, "spare", [images(1)] * 300)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([images(1, size=6), images(1, size=8)], r"'backbone\.body'.*\(3, 8, 8\).*\(3, 6, 6\).*one size"),
        ([images(1) / 0], "NaN or infinite"),
        ([], "no batch"),
        ([None], "the batch is a NoneType: pass input_fn="),
        ([[]], "the batch is a list: pass input_fn="),
        (
            [{"img": images(1)}],
            r"failed on batch 0 .*TypeError.*model\(img=<tensor \[1, 3, 6, 6\]>\).*input_fn=",
        ),
        (7, "not an iterable"),
    ],
)
def test_unusable_loaders_are_refused(model: Detector, loader: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        capture_inputs(model, "backbone.body", loader)


def test_more_refusals(model: Detector) -> None:
    with pytest.raises(OptionError, match="limit is 0"):
        capture_inputs(model, "backbone.body", [images(1)], limit=0)
    with pytest.raises(CalibrationError, match=r"input_fn failed on batch 0: ZeroDivisionError"):
        capture_inputs(model, "backbone.body", [images(1)], input_fn=lambda batch: 1 / 0)
    with pytest.raises(CalibrationError, match=r"input_fn returned a str"):
        capture_inputs(model, "backbone.body", [images(1)], input_fn=lambda batch: "x")
    model.rows = (row for row in ())
    with pytest.raises(TraceError, match="cannot be copied"):
        capture_inputs(model, "backbone.body", [images(1)])


def part_of(model: nn.Module, path: str, example: Any, front_end: str = "auto") -> fx.GraphModule:
    gm = trace(model.get_submodule(path), example, front_end=front_end)
    Canonicalize()(gm)
    return gm


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_an_unchanged_part_changes_nothing(model: Detector, front_end: str) -> None:
    calibration = capture_inputs(model, "backbone.body", [images(4)]).images
    model.backbone.body.stem.requires_grad_(False)
    part = part_of(model, "backbone.body", calibration.example(2).args, front_end)
    code = part.code
    whole = replace_submodule(model, "backbone.body", part, example=calibration.example(2))
    assert part.code == code and model.training and isinstance(model.backbone.body, Body)
    for copied in (whole, copy.deepcopy(whole)):
        assert isinstance(copied.backbone.body, fx.GraphModule) and not copied.training
        assert copied.backbone.body.out_channels == 4
        assert copied.backbone.body.strides == {"one": [1, 1]}
        assert not hasattr(copied.backbone.body, "hook") and not hasattr(copied.backbone.body, "_private")
        assert type(copied.backbone.body(images(2))) is OrderedDict
        assert differ(copied(images(3)), copy.deepcopy(model).eval()(images(3))) < 1e-6
        copied.train()  # an exported part stays in evaluation mode instead of refusing
        copied.eval()
    assert copied.backbone.body.strides is not model.backbone.body.strides
    if front_end == "fx":
        frozen = {name for name, p in whole.backbone.body.named_parameters() if not p.requires_grad}
        assert frozen == {"stem.0.weight", "stem.0.bias"}


def test_dropping_in_a_part_equals_skipping_the_block(model: Detector) -> None:
    calibration = capture_inputs(model, "backbone.body", [images(4)]).images
    part = part_of(model, "backbone.body", calibration.example(2).args)
    (two,) = [region for region in discover(part).regions if region.label == "two"]
    DropRegions([two])(part)
    whole = replace_submodule(model, "backbone.body", part, example=calibration.example(2))
    reference = copy.deepcopy(model).eval()
    reference.backbone.body.two = nn.Identity()
    assert differ(whole(images(3)), reference(images(3))) == 0.0
    assert differ(whole(images(3)), copy.deepcopy(model).eval()(images(3))) > 1e-3


def test_a_part_with_other_outputs_is_refused(model: Detector) -> None:
    calibration = capture_inputs(model, "backbone.body", [images(2)]).images
    for part in (nn.Identity(), nn.Conv2d(3, 4, 3)):
        with pytest.raises(GraphError, match=r"'backbone\.body' returns .*, the original .*\[2, 4, 6, 6\]"):
            replace_submodule(
                model, "backbone.body", fx.symbolic_trace(nn.Sequential(part)), example=calibration.example(2)
            )


def test_items_of_containers_are_replaced_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.Flatten())
    whole = replace_submodule(model, "1", part_of(model, "1", images(2)[:, :1].expand(-1, 4, -1, -1)))
    assert [name for name, _ in whole.named_children()] == ["0", "1", "2"]
    assert differ(whole(images(2)), model.eval()(images(2))) == 0.0


def test_the_tap_is_every_floating_output(caplog: pytest.LogCaptureFixture) -> None:
    class Outputs(nn.Module):
        def forward(self, x: Tensor) -> Any:
            pooled = nn.functional.adaptive_avg_pool2d(x.relu(), 1)
            return {"a": (pooled, [x.sigmoid()]), "b": pooled.argmax(1), "c": x}

    gm = trace(Outputs(), images(2), front_end="fx")
    with caplog.at_level(logging.WARNING, logger="fxprune"):
        assert output_tap(gm) == ("adaptive_avg_pool2d", "sigmoid")
    assert "not mimicked, as they are no floating-point tensors: argmax" in caplog.text
    assert output_tap(trace(Body(), images(2), front_end="export")) == ("relu_1", "relu_2")

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(GraphError, match="no output of this part is a floating-point tensor"):
        output_tap(trace(Whole(), images(2), front_end="fx"))


def first_two(regions: tuple[Region, ...]) -> list[Region]:
    chosen: list[Region] = []
    for region in regions:
        if len(chosen) < 2 and not any(region.overlaps(other) for other in chosen):
            chosen.append(region)
    return chosen


def compress_part(
    model: nn.Module,
    path: str,
    loader: Any,
    kinds: tuple[str, ...],
    call: Callable[[nn.Module], Any],
    **settings: Any,
) -> nn.Module:
    """Two regions out of one part, and two iterations of mimicking its outputs."""
    before = copy.deepcopy(model.state_dict())
    calibration = capture_inputs(model, path, loader, limit=4, **settings).images
    example = calibration.example(2)
    part = part_of(model, path, example.args).requires_grad_(False)
    regions = first_two(discover(part, kinds=kinds).regions)
    assert len(regions) == 2
    settings = replace(recipe_named("fast").mimic, iterations=2, batch_size=2, learning_rate=1e-6)
    recovered = recover(Original(part, output_tap(part), calibration), regions, {}, settings)
    assert recovered.loss_before > 0
    model.eval()
    with torch.no_grad():
        same = replace_submodule(model, path, part, example=example)
        assert differ(call(same), call(model)) == 0.0
        whole = replace_submodule(model, path, recovered.graph, example=example)
        call(copy.deepcopy(whole))
    assert sum(p.numel() for p in whole.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return whole


def detected(model: nn.Module, size: int = 64) -> Any:
    pictures = list(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)))
    found = model(pictures)
    assert len(found) == 2 and all({"boxes", "labels", "scores"} <= set(one) for one in found)
    return found


IDENTITY, CHAINS = ("identity",), ("sequential",)
DETECTORS = [
    ("fasterrcnn_mobilenet_v3_large_fpn", "backbone.body", IDENTITY, False),
    ("fasterrcnn_resnet50_fpn", "backbone.body", IDENTITY, True),
    ("fasterrcnn_resnet50_fpn", "backbone", IDENTITY, True),
    ("fasterrcnn_resnet50_fpn_v2", "roi_heads.box_head", CHAINS, True),
    ("retinanet_resnet50_fpn", "backbone.body", IDENTITY, True),
    ("retinanet_resnet50_fpn", "backbone", IDENTITY, True),
    ("fcos_resnet50_fpn", "backbone.body", IDENTITY, True),
    ("maskrcnn_resnet50_fpn", "backbone.body", IDENTITY, True),
    ("keypointrcnn_resnet50_fpn", "backbone.body", IDENTITY, True),
    ("ssdlite320_mobilenet_v3_large", "backbone", IDENTITY, True),
    ("ssd300_vgg16", "backbone", CHAINS, True),
]


@pytest.mark.parametrize(
    ("name", "path", "kinds"),
    [pytest.param(*row[:3], marks=[pytest.mark.slow] if row[3] else []) for row in DETECTORS],
)
def test_detectors_end_to_end(name: str, path: str, kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    small = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **small)
    loader = [(list(torch.rand(2, 3, 64, 64)), [{}, {}])]
    whole = compress_part(model, path, loader, kinds, detected)
    assert isinstance(whole.get_submodule(path), fx.GraphModule)


def test_raft_end_to_end() -> None:
    torch.manual_seed(0)
    model = optical_flow.raft_small(weights=None)
    frames = torch.rand(2, 1, 3, 128, 128)

    def flow(network: nn.Module) -> Any:
        return network(frames[0], frames[1], num_flow_updates=2)

    whole = compress_part(model, "feature_encoder", [frames], IDENTITY, flow, input_fn=tuple)
    assert [tuple(step.shape) for step in flow(whole)] == [(1, 2, 128, 128)] * 2


def test_both_frames_of_raft_are_images() -> None:
    frames = torch.rand(2, 3, 3, 128, 128)
    found = capture_inputs(
        optical_flow.raft_small(weights=None), "feature_encoder", [frames], input_fn=tuple, limit=5
    ).images
    assert found.size == 5
    assert found.inputs.args[0].shape == (5, 3, 128, 128)


@pytest.mark.slow
def test_segmentation_end_to_end() -> None:
    torch.manual_seed(0)
    model = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    x = torch.rand(2, 3, 64, 64)
    compress_part(model, "backbone", x, IDENTITY, lambda network: network(x))
