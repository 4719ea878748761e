"""Every measured figure in the documents is that of its result file, and what looks measured has an origin."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import figures, index
from benchmarks.common.environment import ROOT
from benchmarks.common.result_file import RESULTS
from benchmarks.figures import Passage, figure, passages, problems, unexplained, updated
from fxprune.errors import OptionError

KNOWN = passages(figures.LIST.read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"k": 4, "loss": 0.25}, {"k": 8, "loss": 0.75}, {"k": 8, "loss": 1.25}]
    entries = {"summary": rows, "0/a": {"k": 4, "bytes": 3 * 2**20}, "totals": {"works": 5, "none": 2}}
    (tmp_path / "new.json").write_text(json.dumps({"entries": entries}))
    (tmp_path / "old.json").write_text(json.dumps({"runs": [{"images": 50, "top": 0.9173, "seed": 1}]}))
    return tmp_path


@pytest.mark.parametrize("document", figures.documents())
def test_figures_are_those_of_the_result_files(document: str) -> None:
    text = (ROOT / document).read_text()
    assert [line for known in KNOWN if known.document == document for line in problems(known, text)] == []


@pytest.mark.parametrize("document", figures.documents())
def test_numbers_that_look_measured_have_an_origin(document: str) -> None:
    own = [known for known in KNOWN if known.document == document]
    assert unexplained(document, (ROOT / document).read_text(), own) == []


def test_passages_belong_to_documents_that_are_there() -> None:
    assert {known.document for known in KNOWN} <= set(figures.documents())


def test_the_list_of_results_is_what_the_script_writes() -> None:
    assert index.PAGE.read_text() == index.page()


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_results_were_made_on_clean_commits(file: Path) -> None:
    result = json.loads(file.read_text())
    commits = [result["environment"]["commit"], *(o["commit"] for o in result.get("origins", {}).values())]
    assert all(re.fullmatch("[0-9a-f]{7,40}", commit) for commit in commits), commits


def test_the_list_names_commits_of_entries(tmp_path: Path) -> None:
    machine = {"cpu": "one", "gpu": None, "cores": 2}
    made = {"environment": {"machine": machine, "date": "2026-11-24T01:02:03", "commit": "ccc"}}
    made["entries"] = {"a": 1}
    (tmp_path / "scorer_choice_x.json").write_text(json.dumps(made))
    made["command"] = "python -m benchmarks.claims.scoring --k 1"
    made["origins"] = {"a": {"commit": "bbb"}, "b": {"commit": "aaa"}}
    (tmp_path / "taken.json").write_text(json.dumps(made))
    *_, first, second = index.page(tmp_path).splitlines()
    assert "[scorer_choice](claims/scorer_choice.py) | not noted then |" in first
    assert "| ccc | one, 2 cores | 2026-11-24 |" in first
    assert "[scoring](claims/scoring.py) | `python -m benchmarks.claims.scoring --k 1` |" in second
    assert "| aaa, bbb |" in second
    (tmp_path / "stray.json").write_text("{}")
    with pytest.raises(OptionError, match=r"made stray\.json"):
        index.page(tmp_path)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("new > summary > k=4 > loss | .3f", "0.250"),
        ("new > summary > k=8 > loss > mean | .1f", "1.0"),
        ("new > summary > k=8 > loss > spread | .2f", "0.35"),
        ("new > summary > loss > median | .2%", "75.00"),
        ("new > summary > count | d", "3"),
        ("new > 0/a > bytes | .0M", "3"),
        ("new > totals > sum | d", "7"),
        ("old > images=50 > seed=1 > top | .2%", "91.73"),
    ],
)
def test_places_lead_to_figures(folder: Path, place: str, expected: str) -> None:
    assert figure(place, folder) == expected


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("absent > a | d", "no result file absent.json"),
        ("new > summary > loss | d", "is no number"),
        ("new > summary > k=4 > nothing | d", "there is no 'nothing'"),
        ("new > totals > works > deeper | d", "there is no 'deeper'"),
        ("new > summary > k=5 > loss | d", "is no number"),
    ],
)
def test_places_that_lead_nowhere_are_named(folder: Path, place: str, complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        figure(place, folder)


def test_a_figure_that_differs_is_found_and_written(folder: Path) -> None:
    (known,) = passages(
        "l := new > summary\n\n# README.md\n\nlosses {l > k=4 > loss | .2f} to {l > loss > max | .2f}"
    )
    text = "The\nlosses 0.24\nto 1.25 of it."
    assert problems(known, text, folder) == [
        "README.md: says 0.24, but new > summary > k=4 > loss | .2f is 0.25"
    ]
    assert updated(text, [known], folder) == "The\nlosses 0.25\nto 1.25 of it."
    assert problems(known, updated(text, [known], folder), folder) == []


@pytest.mark.parametrize("text", ["losses of 0.25", "loss 0.25, loss 0.25"])
def test_a_passage_stands_in_its_document_once(folder: Path, text: str) -> None:
    known = Passage("README.md", "loss {new > summary > k=4 > loss | .2f}")
    assert problems(known, text, folder)[0].startswith("README.md: found")


@pytest.mark.parametrize(
    "text", ["it took 12 s", "at 90 %", "a ratio of 0.5", "| 7 | x |", "3 MiB", "120 times as fast"]
)
def test_numbers_that_look_measured_are_found(text: str) -> None:
    assert len(unexplained("README.md", text, [])) == 1
    assert unexplained("README.md", text, [Passage("README.md", text)]) == []


def test_code_links_and_what_was_measured_once_are_left_out() -> None:
    text = "```\n0.5 s\n```\n`x=1.5` [a](b/1.5) with 3 of 7 blocks"
    assert unexplained("README.md", text, []) == []
    once = "It took 1.5 s (measured\nonce).\n\nIt took 2.5 s."
    assert len(unexplained("README.md", once, [])) == 2
    assert [line.partition(": ")[2] for line in unexplained("docs/decisions/1.md", once, [])] == [
        "2.5 in: It took 2.5 s."
    ]
