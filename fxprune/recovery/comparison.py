"""What mimicking compares: two networks from where they begin to differ, at the tap and at junctions before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxprune.calibration.augment import augmentable
from fxprune.calibration.batches import CalibrationSet
from fxprune.discovery.dominance import Dominance, flow_nodes
from fxprune.graph.call import Inputs
from fxprune.graph.extract import ancestors, between, descendants, exits, is_returned
from fxprune.graph.operators import mutated_input, shape_of
from fxprune.graph.regions import Region, every_call
from fxprune.passes import FoldBatchNorm
from fxprune.recovery.features import FeatureReader, copied, exit_of, feature_loss, mean_error, surviving_tap
from fxprune.recovery.original import Original

__all__ = ["Comparison", "Pair", "compare_whole"]

_SCALED_BY = 16
"""Images whose features tell how large the values at each junction are."""

_KEPT_AT_ONCE = 32
"""Images in one call when shared values are kept."""
_JUDGED_AT_ONCE = 64
"""The same when both networks are compared without a step."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two networks, each from the same values on to what is compared.

    Attributes:
        shared: Computes those values from a network's inputs; they are the same in both.
        teacher: The original from there on, frozen, its batch norms folded to spare time.
        student: The other network from there on, sharing its modules.
        groups: How many of the features belong together, in their order: the tap's, one of a junction.
        weights: Of each group's mean squared error in the loss.
    """

    shared: Callable[[Inputs], tuple[Tensor, ...]]
    teacher: fx.GraphModule
    student: fx.GraphModule
    groups: tuple[int, ...]
    weights: tuple[float, ...]

    def keep(self, images: CalibrationSet, device: str, budget: int) -> CalibrationSet | None:
        """The values that both networks share, for some images, in their place; see `behind`.

        None where they cannot stand in for images that are changed at random, which takes one tensor of channels and
        pixels in place of one, where they are the images, or where they take more than `budget` bytes.
        """
        example = images.example(2)
        image, value = augmentable(example), self._kept_value(example, device)
        more = self._kept_value(images.inputs.select(torch.arange(3) % images.size), device)
        if image is None or value is None or more is None:
            return None
        if len(value) != example.batch_size or len(more) != 3:  # dimension 0 must be the batch, for any batch
            return None
        if value.shape == image.shape or value.nbytes * images.size > budget * example.batch_size:
            return None
        with torch.no_grad():
            parts = [self.shared(batch.to(device))[0].cpu() for batch in images.batches(_KEPT_AT_ONCE)]
        return CalibrationSet(Inputs((torch.cat(parts),)))

    @torch.no_grad()
    def _kept_value(self, inputs: Inputs, device: str) -> Tensor | None:
        """The shared values of a batch where they are one tensor of channels and pixels."""
        given = self.shared(inputs.to(device))
        return augmentable(Inputs(given)) if len(given) == 1 else None

    def behind(self) -> Comparison:
        """The same comparison for batches of the values that both networks share, in place of images."""
        # copies: the student may begin with an in-place operator
        return replace(self, shared=lambda inputs: tuple(map(copied, inputs.args)))

    def loss(self, inputs: Inputs) -> Tensor:
        """What a fit makes small for a batch: the weighted sum of the groups' errors (PRACTISE, eq. 1)."""
        got, wanted = self._features(inputs)
        losses = [
            weight * feature_loss(g, w)
            for weight, g, w in zip(self.weights, self._grouped(got), self._grouped(wanted), strict=True)
        ]
        return torch.stack(losses).sum()

    def error(self, images: CalibrationSet, device: str) -> float:
        """Mean squared error of the first group over all images, without augmentation."""
        return self.judge(images, device, 0)()

    def judge(self, images: CalibrationSet, device: str, budget: int) -> Callable[[], float]:
        """Tells that error whenever it is called; the teacher answers once, where that needs at most `budget` bytes."""
        kept = self._answers(images, device, budget)

        def error() -> float:
            answers = iter(kept or ())

            def features(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
                wanted = [t.to(device) for t in next(answers)] if kept else self._first(self.teacher, inputs)
                return self._first(self.student, inputs), wanted

            return mean_error(features, images, device, _JUDGED_AT_ONCE)

        return error

    @torch.no_grad()
    def _answers(self, images: CalibrationSet, device: str, budget: int) -> list[Sequence[Tensor]] | None:
        example = self._first(self.teacher, images.example().to(device))
        if sum(t.nbytes for t in example) * images.size > budget:
            return None
        batches = images.batches(_JUDGED_AT_ONCE)
        return [[t.cpu() for t in self._first(self.teacher, batch.to(device))] for batch in batches]

    def _first(self, network: fx.GraphModule, inputs: Inputs) -> Sequence[Tensor]:
        return next(self._grouped(network(*self.shared(inputs))))

    def _features(self, inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with torch.no_grad():
            values = self.shared(inputs)
            # copies: an in-place operator of the one network must not change what the other reads
            wanted = self.teacher(*map(copied, values))
        return self.student(*values), wanted

    def _grouped(self, features: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        start = 0
        for size in self.groups:
            yield features[start : start + size]
            start += size


def compare_whole(original: Original, student: fx.GraphModule, tap: Sequence[str]) -> Comparison:
    """Compares from the inputs on and at the tap alone (PRACTISE, eq. 1).

    Args:
        original: The teacher.
        student: The other network.
        tap: The student's nodes that hold the values of the original's tap.
    """
    return _between(original, student, _inputs(student), [(original.tap, tap)], [1.0])


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.find_nodes(op="placeholder")]


class Pair:
    """An original and the same network without some regions, to be set beside each other.

    Args:
        original: The teacher.
        student: The other, adaptors folded.
        regions: What it lacks.
        operators: Nodes whose weights are others than the original's, or are to become so.

    Attributes:
        tap: The student's nodes that hold the values of the original's tap.
        frontier: The values that are the same in both and that the first changes read; the inputs where nothing before
            the tap is another, for then anything may be trained.
        junctions: Values behind a cut that all paths from a change go through and that branches leave from: those of
            residual streams, mostly. Not those before it, which adaptors are there to change.
        near: Those of the junctions up to the first that all paths from all changes go through, in the student's names.
            Where there is none and the tap is what the network returns, which may be large and far behind the cuts:
            what is read elsewhere of all that lies between changes and cuts.
    """

    def __init__(
        self, original: Original, student: fx.GraphModule, regions: Sequence[Region], operators: Sequence[str]
    ) -> None:
        self._original, self._student = original, student
        self.tap = surviving_tap(original.tap, regions)
        nodes = {node.name: node for node in student.graph.nodes}
        bypasses = [nodes[region.bypass] for region in every_call(regions) if region.bypass in nodes]
        readers = [user.name for bypass in bypasses for user in bypass.users if user.op != "output"]
        before = ancestors(student, self.tap)  # what adaptors change behind the tap is not mimicked
        flow = flow_nodes(student)
        changes = [name for name in (*operators, *readers) if name in before and name in flow]
        known = flow.keys() - descendants(student, changes) if changes else set()
        # the original too: what was cut may be all that reads a size of the images
        needed = ancestors(student, self.tap, known) | ancestors(original.graph, original.tap, known)
        known |= set(_inputs(student))  # numbers among them too
        self.frontier = [name for name in nodes if name in needed and name in known]
        behind = descendants(student, readers) & before
        self.junctions, self.near = self._junctions(flow, changes, behind)
        self._regions = regions
        if not self.near and is_returned(original.graph, original.tap):
            cuts = [node.name for node in bypasses]
            self.near = tuple(
                exits(student, [name for name in (*operators, *cuts) if name in before & flow.keys()])
            )

    def _junctions(
        self, flow: dict[str, fx.Node], changes: Sequence[str], behind: set[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        dominance = Dominance(flow)
        shapes = {node.name: shape_of(node) for node in self._original.graph.graph.nodes}
        overwritten = {mutated_input(self._student, node) for node in self._student.graph.nodes}
        found: list[str] = []
        near: tuple[str, ...] = ()
        for name, node in flow.items():
            branches = len(node.users) > 1 and node not in overwritten
            if name not in behind or name in self.tap or not branches:
                continue
            if shape_of(node) is not None and shapes.get(name) == shape_of(node):
                through = [dominance.post_dominates(name, change) for change in changes]
                if any(through):
                    found.append(name)
                if all(through) and not near:
                    near = tuple(found)
        return tuple(found), near

    def at_tap(self, *, changed_only: bool, junctions: bool) -> Comparison:
        """Compares at the tap, and at all junctions where they are asked for.

        Args:
            changed_only: Whether the comparison begins at the frontier and not at the inputs: what lies before it is
                then not trained, and runs once for both.
            junctions: Whether junctions are compared too. Each error is then relative to the variance of the teacher's
                features, and the tap counts as much as all junctions together.
        """
        begin = self.frontier if changed_only else _inputs(self._student)
        beside = self.junctions if junctions else ()
        groups = [(self._original.tap, self.tap), *(((name,), (name,)) for name in beside)]
        weights = [1.0, *(1 / len(beside) for _ in beside)]
        return _between(self._original, self._student, begin, groups, weights, scaled=bool(beside))

    def at_near_junctions(self) -> Comparison | None:
        """Compares from the frontier to the near junctions: a small part of the network, right behind the cuts."""
        if not self.near:
            return None
        groups = [((exit_of(self._regions, name),), (name,)) for name in self.near]
        weights = [1 / len(groups)] * len(groups)
        return _between(self._original, self._student, self.frontier, groups, weights, scaled=True)


def _between(
    original: Original,
    student: fx.GraphModule,
    begin: Sequence[str],
    groups: Sequence[tuple[Sequence[str], Sequence[str]]],
    weights: Sequence[float],
    *,
    scaled: bool = False,
) -> Comparison:
    """Compares groups of nodes, each as the original and the student name them, from some values on.

    With `scaled`, each weight is divided by the variance of the teacher's features in its group, over the first images:
    so it is the same on every rank.
    """
    shared = FeatureReader(original.graph, begin, fold=True, copies=True)
    teacher = between(original.graph, begin, [name for names, _ in groups for name in names])
    FoldBatchNorm()(teacher)
    part = between(student, begin, [name for _, names in groups for name in names])
    sizes = tuple(len(names) for names, _ in groups)
    comparison = Comparison(shared, teacher, part, sizes, tuple(weights))
    if not scaled:
        return comparison
    with torch.no_grad():
        features = teacher(*shared(original.images.example(_SCALED_BY).to(original.device)))
    least = torch.finfo(torch.float32).tiny
    variances = [
        torch.cat([t.flatten().float() for t in group]).var(correction=0).clamp_min(least).item()
        for group in comparison._grouped(features)
    ]
    weights = [weight / variance for weight, variance in zip(weights, variances, strict=True)]
    return Comparison(shared, teacher, part, sizes, tuple(weights))
