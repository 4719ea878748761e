"""Where the fits of sets begin, with a scorer that only notes what it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.graph.regions import Kind, Region
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.joint_losses import JointLosses


class Notes:
    """A scorer whose fits are named after their sets by their losses."""

    def __init__(self, *, continues: bool = True) -> None:
        self.continues = continues
        self.workers = 1
        self.fits: list[tuple[str, tuple[float, ...]]] = []
        self.estimates: list[tuple[str, tuple[float, ...]]] = []

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Nothing is shared."""

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        self.fits.append((labels(regions), losses_of(start)))
        return AdaptorFit({}, 100.0 + len(self.fits), 0.0)

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        self.estimates.append((labels(regions), losses_of(start)))
        return float(len(self.estimates))

    def release(self) -> None:
        """Nothing is held."""


def region(label: str) -> Region:
    return Region("x", label, "x", (label,), Kind.IDENTITY, label, (label,), (1, 8, 4, 4), "torch.float32")


def labels(regions: Sequence[Region]) -> str:
    return "".join(r.label for r in regions)


def losses_of(fits: Sequence[AdaptorFit]) -> tuple[float, ...]:
    return tuple(fit.loss for fit in fits)


A, B, C, D = (region(label) for label in "abcd")
SINGLE = {r.label: AdaptorFit({}, float(i), 0.0) for i, r in enumerate((A, B, C, D))}


def test_without_a_plan_a_set_begins_at_its_regions() -> None:
    scorer = Notes()
    assert JointLosses(scorer, SINGLE)([[A, B], [C]], ()) == [1.0, 2.0]
    assert scorer.estimates == [("ab", (0.0, 1.0)), ("c", (2.0,))]
    assert not scorer.fits


def test_a_plan_is_fitted_once_from_the_one_before_it() -> None:
    scorer = Notes()
    losses = JointLosses(scorer, SINGLE)
    losses([[A, C], [C, D]], (C,))
    assert not scorer.fits  # one region is fitted already
    losses([[A, B, C]], (C, A))
    losses([[A, C, D]], (C, A))
    assert scorer.fits == [("ca", (2.0, 0.0))]
    losses([[A, B, C, D]], (C, A, D))
    assert scorer.fits[1:] == [("cad", (101.0, 3.0))]
    assert scorer.estimates[2:] == [("abc", (101.0, 1.0)), ("acd", (101.0, 3.0)), ("abcd", (102.0, 1.0))]


def test_a_plan_that_grew_unseen_is_fitted_from_its_beginning() -> None:
    scorer = Notes()
    JointLosses(scorer, SINGLE)([[A, B, C, D]], (D, C, B))
    assert scorer.fits == [("dc", (3.0, 2.0)), ("dcb", (101.0, 1.0))]


def test_a_scorer_that_begins_anew_in_any_case_fits_no_plan() -> None:
    scorer = Notes(continues=False)
    assert JointLosses(scorer, SINGLE)([[A, B, C]], (A, C)) == [1.0]
    assert (scorer.estimates, scorer.fits) == ([("abc", ())], [])
