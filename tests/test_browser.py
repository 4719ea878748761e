"""The page of a report in a real browser: it renders, sorts, prints, and passes the checks of accessibility."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.reports.compression import CompressionReport
from fxprune.reports.page import page
from tests.doubles import brief, count_latency
from tests.tiny import BLOCKS, images, tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium, as in apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason='needs pip install "fxprune[test-browser]"')
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason='needs pip install "fxprune[test-browser]"'
)

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1100, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1100, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 375, "height": 800}, "has_touch": True},
}


@pytest.fixture(scope="module")
def report() -> Iterator[CompressionReport]:
    with pytest.MonkeyPatch.context() as patch:
        count_latency(patch)
        report = fxprune.report(
            fxprune.compress(tiny(), images(24), 2, recipe=brief(mimic=8), progress=False)
        )
    spread = tuple(1e-3 * (10 + i) for i in range(21))
    before, after = (replace(one, quantiles_s=spread) for one in (report.before, report.after))
    yield replace(report, latency=replace(report.latency, before=before, after=after), notes=("a note",))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # a container has no user that chromium's sandbox could be given to
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=LOOKS)
def shown(
    request: pytest.FixtureRequest, browser: Any, report: CompressionReport, tmp_path: Path
) -> Iterator[Any]:
    """The page in a tab that must neither complain nor ask for anything but the file."""
    file = tmp_path / "report.html"
    file.write_text(page(report))
    context = browser.new_context(offline=True, **LOOKS[request.param])
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    asked_for: list[str] = []
    tab.on("request", lambda asked: asked_for.append(asked.url))
    tab.goto(file.as_uri())
    yield tab
    assert complaints == []
    assert asked_for == [file.as_uri()]
    context.close()


def test_the_page_passes_the_checks_of_accessibility(shown: Any) -> None:
    shown.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found = axe.Axe().run(shown)
    assert found.violations_count == 0, found.generate_report()
    assert len(found.response["passes"]) > 20


def test_nothing_but_tables_is_wider_than_the_screen(shown: Any) -> None:
    assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert shown.locator("svg").count() == 2
    for chart in shown.locator("svg").all():
        assert chart.bounding_box()["height"] > 50


def test_a_click_sorts_and_another_turns_it_round(shown: Any, report: CompressionReport) -> None:
    table = shown.locator("#regions ~ .scroll table")
    losses = {score.region.label: score.recovery_loss for score in report.plan.scores}
    rising = sorted(BLOCKS, key=losses.__getitem__)

    def labels() -> list[str]:
        return [text.split("\n")[0] for text in table.locator("tbody th").all_inner_texts()]

    assert labels() == list(BLOCKS)
    head = table.get_by_role("columnheader", name="Recovery loss")
    for order, expected in (("ascending", rising), ("descending", rising[::-1])):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        assert labels() == expected
    table.get_by_role("button", name="Region").click()
    assert head.get_attribute("aria-sort") == "none"
    assert labels() == sorted(BLOCKS)


def test_paper_shows_what_is_folded_on_the_screen(
    browser: Any, report: CompressionReport, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(report))
    tab = browser.new_page(color_scheme="dark")
    tab.goto(file.as_uri())
    settings = tab.get_by_text("cache_bytes")
    assert not settings.is_visible()
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert settings.is_visible()
    tab.emulate_media(media="print")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(ground) == "rgb(255, 255, 255)"
    tab.emulate_media(media="screen")
    assert tab.evaluate(ground) != "rgb(255, 255, 255)"
    tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not settings.is_visible()
    tab.close()
