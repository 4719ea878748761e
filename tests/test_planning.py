from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest

from fxprune.errors import OptionError
from fxprune.graph.regions import Kind, Region
from fxprune.selection.planner import EXACT_LIMIT, SCORED_AGAIN, Planner, disjoint
from fxprune.selection.plans import BlockScore, DropPlan, largest_plan
from tests.doubles import comparison


def region(label: str, *body: str) -> Region:
    body = body or (label,)
    return Region("x", body[-1], "x", body, Kind.IDENTITY, label, (label,), (1, 8, 4, 4), "torch.float32")


def block(label: str, loss: float, saving: float, *body: str) -> BlockScore:
    return BlockScore(region(label, *body), loss, 2 * loss, comparison(1.0, 1.0 - saving))


def labels(plan: Sequence[Region]) -> list[str]:
    return [r.label for r in plan]


class Losses:
    """Made-up joint losses: those of single regions and a penalty for every pair, so that cuts only get dearer."""

    def __init__(self, scores: Sequence[BlockScore], seed: int, penalty: float = 1.0) -> None:
        draw = random.Random(seed)
        self._single = {s.region.label: s.recovery_loss for s in scores}
        pairs = combinations(sorted(self._single), 2)
        self._pair = {pair: penalty * draw.random() for pair in pairs}
        self.asked: list[tuple[str, ...]] = []

    def of(self, plan: Sequence[Region]) -> float:
        names = sorted(labels(plan))
        return sum(self._single[n] for n in names) + sum(self._pair[p] for p in combinations(names, 2))

    def __call__(self, sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        assert all(set(labels(plan)) < set(labels(s)) for s in sets)
        self.asked.extend(tuple(labels(s)) for s in sets)
        return [self.of(s) for s in sets]


def some_scores(seed: int, count: int = 7) -> list[BlockScore]:
    """Disjoint regions, and one more around the first two."""
    draw = random.Random(seed)
    names = [f"r{i}" for i in range(count)]
    found = [block(n, draw.uniform(0.1, 1.0), draw.uniform(0.02, 0.1)) for n in names]
    return [*found, block("whole", draw.uniform(0.1, 2.0), draw.uniform(0.05, 0.2), "r0", "r1")]


def brute_force_greedy(scores: Sequence[BlockScore], losses: Losses) -> list[set[str]]:
    """Every candidate scored again at every step."""
    saving = {s.region.label: s.cost.saving for s in scores}
    path: list[set[str]] = []
    plan: list[Region] = []
    while True:
        left = [s.region for s in scores if not any(s.region.overlaps(p) for p in plan)]
        if not left:
            return path
        value = {r.label: losses.of([*plan, r]) / sum(saving[p.label] for p in (*plan, r)) for r in left}
        plan.append(min(left, key=lambda r: value[r.label]))
        path.append(set(labels(plan)))


def test_independent_takes_the_best_scores_that_do_not_overlap() -> None:
    scores = [
        block("a", 1.0, 0.1),
        block("b", 0.2, 0.1),
        block("c", 0.5, 0.1),
        block("bc", 0.3, 0.1, "b", "c"),
    ]
    losses = Losses(scores, 0)
    planner = Planner(scores, losses, "independent")
    assert [labels(p) for p in planner.path()] == [["b"], ["b", "c"], ["a", "b", "c"]]
    assert labels(planner.of_size(2)) == ["b", "c"]
    assert losses.asked == []  # PRACTISE judges every region alone


def test_lazy_greedy_is_greedy() -> None:
    asked = most = 0
    for seed in range(20):
        scores = some_scores(seed)
        losses = Losses(scores, seed, penalty=0.5)
        path = [set(labels(p)) for p in Planner(scores, losses, "greedy").path()]
        assert path == brute_force_greedy(scores, losses)
        asked += len(losses.asked)
        most += sum(len(scores) - k for k in range(1, len(path)))
    assert asked < most


def test_lazy_greedy_finds_a_region_that_adds_less_to_a_larger_set() -> None:
    """Losses of ResNet-20, three of whose regions are cut: layer1.1 costs half once layer2.2 is gone too."""
    scores = [
        block("1.0", 0.20, 0.137),
        block("1.1", 0.25, 0.137),
        block("2.1", 0.27, 0.099),
        block("2.2", 0.25, 0.099),
    ]
    known = {
        "1.0": 0.18,
        "1.0 1.1": 0.744,
        "1.0 2.1": 0.424,
        "1.0 2.2": 0.414,
        "1.0 2.1 2.2": 0.733,
        "1.0 1.1 2.2": 0.718,
    }

    def joint(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        return [known[" ".join(labels(s))] for s in sets]

    planner = Planner(scores, joint, "greedy")
    assert labels(planner.of_size(2)) == ["1.0", "2.2"]
    assert labels(planner.of_size(3)) == ["1.0", "1.1", "2.2"]


def test_lazy_greedy_leaves_hopeless_regions_unscored() -> None:
    scores = [
        *(block(f"cheap{i}", 0.1, 0.1) for i in range(SCORED_AGAIN + 2)),
        *(block(f"dear{i}", 9.0, 0.1) for i in range(5)),
    ]
    losses = Losses(scores, 0, penalty=0.1)
    planner = Planner(scores, losses, "greedy")
    assert set(labels(planner.of_size(3))) == brute_force_greedy(scores, losses)[2]
    assert losses.asked
    assert not any(name.startswith("dear") for asked in losses.asked for name in asked)


def test_greedy_asks_at_once_for_all_that_it_scores_again_in_any_case() -> None:
    """So that they can be fitted side by side."""
    scores = [block(str(i), 0.1 + 0.01 * i, 0.1) for i in range(SCORED_AGAIN + 2)]
    asked: list[list[list[str]]] = []

    def joint(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        asked.append([labels(s) for s in sets])
        return [0.1 * len(s) for s in sets]

    Planner(scores, joint, "greedy").of_size(2)
    assert asked == [[["0"]], [["0", str(i)] for i in range(1, SCORED_AGAIN + 1)]]


def test_lazy_greedy_counts_on_a_region_to_add_somewhat_less_to_a_larger_set() -> None:
    first, *others = [block(str(i), 0.1 if i == 0 else 1.0, 0.1) for i in range(SCORED_AGAIN + 1)]
    late = block("late", 1.05, 0.1)  # not among those that are scored again in any case

    def joint(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        return [sum(0.9 if r.label == "late" else 0.1 if r.label == "0" else 1.0 for r in s) for s in sets]

    assert labels(Planner([first, *others, late], joint, "greedy").of_size(2)) == ["0", "late"]


def test_greedy_asks_one_by_one_for_what_it_may_not_need_and_once_for_its_first_cut() -> None:
    count = SCORED_AGAIN + 5
    asked: list[list[str]] = []

    def joint(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        asked.append([labels(s)[-1] for s in sets])
        return [0.1 + sum(1.0 + 0.9**i for i in range(1, len(s))) for s in sets]  # more than each costs alone

    Planner([block(str(i), 0.1, 0.1) for i in range(count)], joint, "greedy").of_size(3)
    assert asked[0] == ["0"]
    steps = [[SCORED_AGAIN, *[1] * (left - SCORED_AGAIN)] for left in (count - 1, count - 2)]
    assert [len(a) for a in asked[1:]] == steps[0] + steps[1]


def test_greedy_sees_an_interaction_that_independent_does_not() -> None:
    scores = [block("a", 1.0, 0.1), block("b", 1.1, 0.1), block("c", 1.2, 0.1)]

    def joint(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        return [9.0 if {"a", "b"} <= set(labels(s)) else float(len(s)) for s in sets]

    assert labels(Planner(scores, joint, "independent").of_size(2)) == ["a", "b"]
    assert labels(Planner(scores, joint, "greedy").of_size(2)) == ["a", "c"]
    assert labels(Planner(scores, joint, "exact").of_size(2)) in (["a", "c"], ["b", "c"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_exact_finds_the_best_set(seed: int, k: int) -> None:
    scores = some_scores(seed)
    losses = Losses(scores, seed)
    saving = {s.region.label: s.cost.saving for s in scores}
    sets = [s for s in combinations([s.region for s in scores], k) if disjoint(s)]
    best = min(sets, key=lambda s: losses.of(s) / sum(saving[r.label] for r in s))
    assert Planner(scores, losses, "exact").of_size(k) == best
    assert len(losses.asked) == len(sets)


@pytest.mark.parametrize("selection", ["independent", "greedy"])
@pytest.mark.parametrize("seed", range(5))
def test_paths_nest_in_graph_order_without_overlaps(selection, seed: int) -> None:
    scores = some_scores(seed)
    order = [s.region.label for s in scores]
    path = list(Planner(scores, Losses(scores, seed), selection).path())
    assert [len(p) for p in path] == list(range(1, len(path) + 1))
    for smaller, larger in pairwise(path):
        assert set(smaller) < set(larger)
    for plan in path:
        assert disjoint(plan)
        assert labels(plan) == sorted(labels(plan), key=order.index)
    # the path goes on until nothing is left that fits
    assert not any(disjoint([*path[-1], s.region]) for s in scores if s.region not in path[-1])


@pytest.mark.parametrize("selection", ["independent", "greedy", "exact"])
def test_what_saves_nothing_is_never_chosen(selection) -> None:
    scores = [block("a", 0.1, 0.0), block("b", 1.0, 0.1), block("slower", 0.1, -0.2), block("c", 2.0, 0.1)]
    planner = Planner(scores, Losses(scores, 0), selection)
    assert labels(planner.of_size(2)) == ["b", "c"]
    with pytest.raises(OptionError, match=r"k is 3, but only 2 regions .* seen for: a, slower\."):
        planner.of_size(3)


@pytest.mark.parametrize("selection", ["independent", "greedy", "exact"])
def test_overlapping_regions_do_not_count_twice(selection) -> None:
    scores = [block("a", 0.1, 0.1), block("ab", 0.1, 0.2, "a", "b"), block("abc", 0.3, 0.3, "a", "b", "c")]
    assert len(largest_plan([s.region for s in scores])) == 1
    with pytest.raises(OptionError, match="k is 2, but only"):
        Planner(scores, Losses(scores, 0), selection).of_size(2)


def test_exact_refuses_to_score_without_end() -> None:
    scores = [block(f"r{i}", 1.0, 0.01) for i in range(30)]
    losses = Losses(scores, 0)
    with pytest.raises(OptionError, match=rf"more than {EXACT_LIMIT}; use 'greedy'"):
        Planner(scores, losses, "exact").of_size(4)
    assert losses.asked == []


def test_exact_scores_as_many_sets_as_it_says() -> None:
    scores = [block(f"r{i}", 1.0, 0.1) for i in range(EXACT_LIMIT + 1)]

    def joint(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        return [float(len(sets) - i) for i in range(len(sets))]

    assert labels(Planner(scores[:-1], joint, "exact").of_size(1)) == [f"r{EXACT_LIMIT - 1}"]
    with pytest.raises(OptionError, match=f"would score {EXACT_LIMIT + 1} sets of 1 regions"):
        Planner(scores, joint, "exact").of_size(1)


def test_exact_has_no_path() -> None:
    scores = some_scores(0)
    with pytest.raises(OptionError, match="no path of growing plans"):
        next(Planner(scores, Losses(scores, 0), "exact").path())


def test_savings_add_up_and_the_order_ignores_the_unit() -> None:
    scores = some_scores(3)
    planner = Planner(scores, Losses(scores, 3), "greedy")
    plan = planner.of_size(3)
    assert planner.saving(plan) == pytest.approx(sum(s.cost.saving for s in scores if s.region in plan))
    scaled = [
        BlockScore(s.region, s.recovery_loss, s.bare_loss, comparison(1e3, 1e3 * (1 - s.cost.saving)))
        for s in scores
    ]
    assert Planner(scaled, Losses(scores, 3), "greedy").of_size(3) == plan
    assert DropPlan(tuple(scores), plan).chosen == tuple(labels(plan))
