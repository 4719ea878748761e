"""A graph as a picture: where nodes stand, what is marked, and that names are not taken for markup."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.pictures.drawing import draw
from fxprune.placement.placement import find_sites
from fxprune.shell import cli
from tests.tiny import BLOCKS, images, tiny

SVG = "{http://www.w3.org/2000/svg}"
FACTORY = Path(__file__).parent / "tiny.py"


def drawn(model: nn.Module, example: Tensor, title: str = "net") -> ET.Element:
    gm = fxprune.trace(model, example)
    return ET.fromstring(draw(gm, fxprune.discover(gm), title=title))


def classed(picture: ET.Element, kind: str) -> list[ET.Element]:
    return [element for element in picture.iter() if kind in element.get("class", "").split()]


def titles(elements: list[ET.Element]) -> list[str | None]:
    return [element.findtext(f"{SVG}title") for element in elements]


def test_every_region_has_a_bar_and_a_label() -> None:
    picture = drawn(tiny(), images())
    assert titles(classed(picture, "bar")) == list(BLOCKS)
    labels = [(span.text or "").strip() for span in picture.iter(f"{SVG}tspan")]
    assert labels == list(BLOCKS)


def test_streams_are_thick_from_where_a_cut_would_join_them() -> None:
    streams = classed(drawn(tiny(), images()), "stream")
    assert len(streams) == len(BLOCKS)


def test_sites_are_those_of_the_placement() -> None:
    gm = fxprune.trace(tiny(), images())
    found = fxprune.discover(gm)
    picture = ET.fromstring(draw(gm, found, title="net"))
    sites = {(s.operator, s.side) for region in found.regions for s in find_sites(gm, [region]).sites}
    marks = titles(classed(picture, "site"))
    assert len(marks) == len(sites) > 0
    assert any(mark and mark.startswith("adaptor behind it, without ") for mark in marks)


def test_parallel_values_stand_in_lanes_of_their_own() -> None:
    class Parallel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = x.relu(), x.tanh(), x.sigmoid()
            return a + b + c + x

    circles = [
        (float(c.get("cx", "")), float(c.get("cy", "")))
        for c in drawn(Parallel(), torch.randn(2, 3)).iter(f"{SVG}circle")
    ]
    x, a, b, c, *sums, output = [across for across, _ in circles]
    assert len({x, a, b, c}) == 4
    assert sums == [a, a, x] and output == x
    rows = [down for _, down in circles]
    assert rows == sorted(rows) and len(set(rows)) == len(rows)


def test_names_are_no_markup_and_one_graph_gives_one_picture() -> None:
    gm = fxprune.trace(tiny(), images())
    found = fxprune.discover(gm)
    text = draw(gm, found, title="<script>&\"'")
    assert "<script" not in text
    assert text == draw(gm, found, title="<script>&\"'")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_shell_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.svg"
    assert cli.main(["draw", f"{FACTORY}:tiny", "--size", "16", "--out", str(file)]) == 0
    assert f"{len(BLOCKS)} regions that can be cut, drawn in {file}" in capsys.readouterr().out
    assert titles(classed(ET.fromstring(file.read_text()), "bar")) == list(BLOCKS)


def test_a_picture_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "missing" / "net.svg"
    assert cli.main(["draw", f"{FACTORY}:tiny", "--size", "16", "--out", str(file)]) != 0
    assert "missing" in capsys.readouterr().err
