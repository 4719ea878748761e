"""The page of a report: what it says, that it loads nothing, and that nothing in it is taken for markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.graph.regions import Discovery, Kind, Reason, Region, Rejection
from fxprune.options import Options
from fxprune.records import plain
from fxprune.reports.call import SHELL_COMMAND, call_of
from fxprune.reports.compression import CompressionReport
from fxprune.reports.layout import layout
from fxprune.reports.page import page
from fxprune.reports.sweep import SweepPoint, SweepReport
from fxprune.shell import cli
from fxprune.timing.latency import TimingSettings
from tests.doubles import brief, comparison, count_latency
from tests.tiny import BLOCKS, images, tiny

SHAPE = "8 \u00d7 16 \u00d7 16"
NASTY = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Every tag with its attributes, and the text beside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text += f"{data.strip()} " if data.strip() else ""

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> CompressionReport:
    return fxprune.report(compressed(monkeypatch, k=2))


def compressed(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> nn.Module:
    count_latency(monkeypatch)
    return fxprune.compress(tiny(), images(24), recipe=brief(mimic=4, final=2), progress=False, **settings)


def refused(*details: str, reason: Reason = Reason.SCALED) -> tuple[Rejection, ...]:
    return tuple(
        Rejection("x", f"add_{i}", reason, ("x",), detail, f"at.{i}") for i, detail in enumerate(details)
    )


def test_the_page_says_what_was_cut_and_what_it_brought(report: CompressionReport) -> None:
    text = Page(page(report)).text
    assert report.verdict in text
    assert report.verdict.startswith("Without 2 of its 4 regions the network is ")
    assert "in torch on counted; it names the original's class on" in report.verdict
    ratio, interval = report.latency.ratio, report.latency.interval
    figures = (
        f"{1 / ratio:.2f} times as fast (95 % interval {1 / interval.high:.2f} to {1 / interval.low:.2f})"
    )
    assert figures in report.verdict
    for label in BLOCKS:
        assert label in text
    kept = next(label for label in BLOCKS if label not in report.plan.chosen)
    row = text[text.index("Bare loss") :]
    assert re.search(rf"{re.escape(kept)} identity {SHAPE} .*? kept (others|cheap|what|overlaps)", row)
    assert re.search(rf"{re.escape(report.plan.chosen[0])} identity {SHAPE} .*? cut ", row)


def test_a_gain_that_noise_hides_is_not_called_one(report: CompressionReport) -> None:
    doubtful = replace(report, latency=comparison(0.010, 0.0099, spread=0.02))
    assert "which is not beyond the noise" in doubtful.verdict
    assert "which is not beyond the noise" not in report.verdict


def test_cut_regions_are_struck_out_among_the_others_of_their_stage(report: CompressionReport) -> None:
    html = page(report)
    stage = html[html.index('<ol class="stages">') : html.index('id="regions"')]
    assert re.findall(r"<del>(.*?)</del>", stage) == list(report.plan.chosen)
    assert re.findall(r"<h3>(.*?)</h3>", stage) == [SHAPE]
    assert len(re.findall(r'<li class="shade\d', stage)) == len(BLOCKS)
    scores = {score.region.label: score.score for score in report.plan.scores}
    found = {label: re.findall(rf"shade(\d)[^>]*>\s*<\w+>{label}<", stage) for label in BLOCKS}
    shades = {label: int(shade) for label, (shade,) in found.items()}
    ordered = sorted(BLOCKS, key=scores.__getitem__)
    assert [shades[label] for label in ordered] == sorted(shades.values())
    assert (shades[ordered[0]], shades[ordered[-1]]) == (0, 4)


def test_what_lies_inside_a_cut_region_goes_with_it() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Any) -> Any:
            x = x + self.one(x)
            return x + self.two(x)

    gm = fxprune.trace(nn.Sequential(Layer(), nn.Conv2d(3, 4, 1)), images(2))
    found = fxprune.discover(gm)
    places = layout(gm, found)
    whole = next(region.label for region in found.regions if len(region.modules) == 2)
    assert [(place.inside, place.shape) for place in places] == [
        ((whole,), (3, 16, 16)),
        ((whole,), (3, 16, 16)),
        ((), (3, 16, 16)),
    ]
    assert places[-1].label == whole


def test_the_drawing_keeps_to_the_order_of_the_network_and_leaves_out_what_regions_contain() -> None:
    gm = fxprune.trace(tiny(), images(2))
    found = fxprune.discover(gm)
    body, exits = found.regions[1].body, [region.exit for region in found.regions]
    head = [node.name for node in gm.graph.nodes][-2]
    inner, last = (
        Rejection("", exit, Reason.SCALED, (), "", label)
        for exit, label in ((body[0], "inner"), (head, "head"))
    )
    behind = Rejection("", exits[2], Reason.IGNORED, (), "", "body.2")
    found = Discovery(tuple(r for r in found.regions if r.exit != exits[2])[::-1], (last, inner, behind))
    places = layout(gm, found)
    assert [place.label for place in places] == ["body.0", "body.1", "body.2", "body.3", "head"]
    assert [place.refused for place in places] == [None, None, Reason.IGNORED, None, Reason.SCALED]
    assert [place.shape for place in places[-2:]] == [(8, 16, 16), (5,)]


def test_equal_refusals_are_one_line_with_a_count(report: CompressionReport) -> None:
    many = refused(*["the join scales its operands"] * 20, "by a tensor") + refused("no", reason=Reason.KIND)
    html = page(replace(report, rejections=many))
    text = Page(html).text
    assert html.count("the join scales its operands <b>20 times</b>") == 1
    assert f"{Reason.SCALED.value} 21" in text and f"{Reason.KIND.value} 1" in text
    assert text.index(Reason.SCALED.value) < text.index(Reason.KIND.value)
    assert all(f"at.{i}" in text for i in range(20))
    assert len(Page(html).all("summary")) >= 2


def test_the_page_loads_nothing(report: CompressionReport) -> None:
    html = page(report)
    found = Page(html)
    assert not re.search(r"https?:|@import|url\(|<link|<img|<iframe|<object|<base", html)
    assert not [
        a for _, a in found.tags if a.keys() & {"src", "href", "srcset", "action", "onclick", "style"}
    ]
    policy = next(a for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none';")


def test_nothing_in_a_report_is_taken_for_markup(report: CompressionReport) -> None:
    score = report.plan.scores[0]
    region = replace(score.region, label=NASTY)
    before = replace(report.latency.before, device=NASTY)
    nasty = replace(
        report,
        plan=replace(report.plan, scores=(replace(score, region=region),), regions=(region,)),
        layout=(replace(report.layout[0], label=NASTY),),
        rejections=refused(NASTY),
        latency=replace(report.latency, before=before),
        notes=(NASTY,),
        settings={**report.settings, NASTY: NASTY, "submodule": NASTY},
        versions={NASTY: NASTY},
        durations={NASTY: 1.0},
        files={NASTY: NASTY},
    )
    html = page(nasty)
    assert "<script>alert" not in html
    assert len(Page(html).all("script")) == 1
    assert Page(html).text.count(NASTY) >= 10
    for shown in (nasty, nasty.plan, Discovery((region,), refused(NASTY))):
        assert "<script>" not in shown._repr_html_()
        assert "&lt;script&gt;" in shown._repr_html_()


def test_the_page_is_the_same_from_json_and_from_one_time_to_the_next(report: CompressionReport) -> None:
    again = CompressionReport.from_json(report.to_json())
    assert page(report) == page(report) == page(again)
    assert json.loads(again.to_json()) == json.loads(report.to_json())
    assert again.plan == report.plan and again.latency == report.latency and again.layout == report.layout


def test_columns_sort_by_buttons(report: CompressionReport) -> None:
    html = page(report)
    table = html[html.index('<table class="sortable">') :]
    table = table[: table.index("</table>")]
    heads = re.findall(r'<th scope="col" aria-sort="none"[^>]*><button type="button">(.*?)</button>', table)
    assert heads == [
        *("No.", "Region", "Shape", "Bare loss", "Recovery loss", "Saves ms", "Saves", "Score", "Outcome")
    ]
    values = [float(v) for v in re.findall(r'data-value="(.*?)"', table)]
    first = report.plan.scores[0]
    assert values[:3] == [1, first.bare_loss, first.recovery_loss]


def test_light_dark_paper_and_phones_are_provided_for(report: CompressionReport) -> None:
    html = page(report)
    for rule in ("(prefers-color-scheme: dark)", "@media print", "(max-width: 40rem)"):
        assert rule in html
    assert any(a.get("name") == "viewport" for a in Page(html).all("meta"))


def test_charts_stay_inside_and_are_named(report: CompressionReport) -> None:
    quantiles = tuple(0.01 + 0.001 * i for i in range(21))
    before, after = (
        replace(report.before, quantiles_s=quantiles),
        replace(report.after, quantiles_s=quantiles),
    )
    html = page(replace(report, latency=replace(report.latency, before=before, after=after)))
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 2 and len(report.mimicking) == 2  # the last steps are looked at once, at their end
    assert all("<title" in chart and 'role="img"' in chart for chart in charts)
    for chart in charts:
        ((width, height),) = [map(int, size) for size in re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)]
        paths = " ".join(re.findall(r'(?: d|points)="(.*?)"', chart))
        pairs = re.findall(r"(-?[\d.]+)[ ,](-?[\d.]+)", paths)
        assert pairs
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in pairs)


def test_a_histogram_has_the_area_of_what_it_shows(report: CompressionReport) -> None:
    """Nine in ten calls in the first half of the time: so much of the area lies there."""
    quantiles = tuple(float(x) for x in [*(0.010 + 0.005 * i / 18 for i in range(19)), 0.02, 0.02])
    one = replace(report.before, quantiles_s=quantiles, p95_s=0.02)
    html = page(replace(report, latency=replace(report.latency, before=one, after=one)))
    corners = [
        (float(x), float(y))
        for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", re.findall(r' d="(.*?)"', html)[0])
    ]
    ground = corners[0][1]
    bars = [
        (a[0], (b[0] - a[0]) * (ground - a[1])) for a, b in zip(corners[1::2], corners[2::2], strict=False)
    ]
    middle = (corners[0][0] + corners[-1][0]) / 2
    left = sum(area for x, area in bars if x < middle - 1)
    assert left / sum(area for _, area in bars) == pytest.approx(0.9, abs=0.01)


def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    report = fxprune.report(compressed(monkeypatch, regions=["body.1"]))
    bare = replace(
        report, changed=None, mimicking=(), entropy=None, fold_error=None, layout=(), peak_memory_bytes=None
    )
    text = Page(page(bare)).text
    assert "Cut as asked for, so nothing was scored: body.1." in text
    assert "Nothing was mimicked." in text
    for absent in ("Images whose class changed", "The network From", "Top-1", "None", "nan", "inf "):
        assert absent not in text


def test_images_whose_class_changed_are_named_by_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = tiny(), images(24)
    with torch.no_grad():
        model.head.bias -= model(shown).mean(0)  # several classes, near to each other
    count_latency(monkeypatch)
    small = fxprune.compress(model, shown, 3, recipe=brief(), progress=False)
    before, after = model(shown).argmax(1), small(shown).argmax(1)
    wanted = [(i, int(before[i]), int(after[i])) for i in range(24) if before[i] != after[i]]
    report = fxprune.report(small)
    assert report.changed is not None
    assert 0 < len(wanted) < 24
    assert len({change.held_back for change in report.changed}) == 2
    assert [(c.image, c.before, c.after) for c in report.changed] == wanted
    again = CompressionReport.from_json(report.to_json())
    assert again.changed == report.changed


def test_the_call_asks_for_the_same_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = fxprune.report(compressed(monkeypatch, k=1, latency_batch=3, kinds=("identity", "sequential")))
    settings = json.loads(report.to_json())["settings"]
    call = call_of(settings, evaluated=True)
    asked: dict[str, Any] = {}

    def compress(*_: object, **given: object) -> None:
        asked.update(given)

    monkeypatch.setattr(fxprune, "compress", compress)
    exec(call, dict.fromkeys(("model", "loader", "evaluate", "recipe")))
    assert asked.pop("recipe") is None  # one of one's own, which only the caller can name
    assert "evaluate" in asked
    assert (asked["k"], asked["latency_batch"], asked["kinds"]) == (1, 3, ["identity", "sequential"])
    assert asked["tap"] == settings["tap"][0]
    assert not asked.keys() & {"progress", "images", "out", "target_speedup", "onnx"}
    assert "recipe='practise'" in call_of({**settings, "recipe": _recipe("practise")}, evaluated=False)
    assert "recipe" not in call_of({**settings, "recipe": _recipe("fast")}, evaluated=False)


def test_what_was_typed_repeats_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    typed = "fxprune compress net.py:build --data images --k 1"
    token = SHELL_COMMAND.set(typed)
    try:
        compressed(monkeypatch, k=1, latency_batch=3, out=tmp_path)
    finally:
        SHELL_COMMAND.reset(token)
    assert f"<code>{typed}</code>" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["command"] == typed


def _recipe(name: str) -> Any:
    return plain(Options.of(1, recipe=name).to_dict())["recipe"]


def test_the_folder_holds_the_page_and_the_shell_writes_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = compressed(monkeypatch, k=1, out=tmp_path)
    written = (tmp_path / "report.html").read_text()
    assert "report.html" in fxprune.report(small).files
    assert written == page(fxprune.report(small))
    (tmp_path / "report.html").unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{fxprune.report(small)}\n"
    assert (tmp_path / "report.html").read_text() == written
    assert cli.main(["report", str(tmp_path), "--html", str(tmp_path / "other.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "other.html").read_text() == written
    text = (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").write_text(text.replace(fxprune.report(small).files["report.html"], "0" * 64))
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "report.html is no longer the one whose hash report.json holds" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"plan": 3}', "\udcff"])
def test_what_is_no_report_is_said_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content.encode(errors="surrogateescape"))
    assert cli.main(["report", str(tmp_path)]) == 2
    message = "does not exist" if content is None else "is not the report of a compression"
    assert f"{tmp_path / 'report.json'} {message}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_notebooks_show_short_tables_and_short_words(report: CompressionReport) -> None:
    gm = fxprune.trace(tiny(), images(2))
    found = fxprune.discover(gm)
    sweep = SweepReport(
        (SweepPoint(("body.0",), 0.25, comparison(0.01, 0.008), None),),
        report.plan.scores,
        None,
        None,
        None,
        {},
        {},
        {},
    )
    for shown in (report, report.plan, found, sweep):
        assert len(repr(shown)) < 400
        assert shown._repr_html_().count("<table>") == 1 and len(shown._repr_html_()) < 3000
    assert "body.3" in found._repr_html_() and "8 x 16 x 16" in found._repr_html_()
    region = Region("x", "y", "x", ("y",), Kind.IDENTITY, "a", ("a",), (1, 2), "torch.float32")
    large = Discovery((region,) * 500, refused(*["no"] * 500))
    assert len(large._repr_html_()) < 5000 and "and 460 more" in large._repr_html_()
    assert repr(large) == "<Discovery: 500 regions (a, a, a, a, a and 495 more), 500 candidates refused>"


def test_latencies_keep_their_spread() -> None:
    settings = TimingSettings(warmup=1, min_rounds=5, max_rounds=5)
    one = fxprune.measure(tiny(), tiny(), inputs=images(2), settings=settings)
    for latency in (one.before, one.after):
        spread = latency.quantiles_s
        assert len(spread) == 21 and list(spread) == sorted(spread)
        assert spread[10] == latency.median_s and spread[19] == latency.p95_s
        assert spread[15] - spread[5] == pytest.approx(latency.iqr_s)


def test_what_was_counted_is_shown_as_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    report = fxprune.report(compressed(monkeypatch, k=1, cost="parameters"))
    text = Page(page(report)).text
    assert text.count("of parameters") >= len(BLOCKS)
    assert CompressionReport.from_json(report.to_json()).plan == report.plan
    assert "kept others cost less for what they save" in text
