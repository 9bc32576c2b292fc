"""The pages in a headless Chromium: on a phone, a desk and paper, light and dark; skipped where there is no Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moebit.report.compare import compare_page
from moebit.report.page import report_page
from tests.report.browser import Browser, chromium
from tests.report.made_up import comparison, documents

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH: the pages were not looked at (apt-get install chromium)")

PHONE, DESK, PAPER = 360, 1280, 760
CASES = {
    "small": lambda: report_page(documents()),
    "mixed, in trouble": lambda: report_page(documents(mixed=True, trouble=True, evaluated=False)),
    "large": lambda: report_page(documents(layers=58, experts=256, mixed=True)),
    "without calibration": lambda: report_page(documents(calibrated=False, evaluated=False)),
    "one layer": lambda: report_page(documents(layers=1, experts=2)),
    "compared": lambda: compare_page(comparison()),
}
# The smallest text of a chart, in pixels as shown.
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(text => {
  const chart = text.closest('svg');
  return parseFloat(getComputedStyle(text).fontSize) * chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    files = {name: directory / f"{number}.html" for number, name in enumerate(CASES)}
    for name, file in files.items():
        file.write_text(CASES[name](), encoding="utf-8")
    return files


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c == "large" else ()) for c in CASES])
def test_nothing_overlaps_or_is_cut_off(case: str, pages: dict[str, Path], browser: Browser, tmp_path: Path) -> None:
    for width, dark, paper in ((PHONE, False, False), (DESK, True, False), (PAPER, True, True)):
        browser.show(pages[case], width=width, dark=dark, paper=paper, opened=True)
        assert browser.problems() == [], (case, width)
        assert browser.complaints() == []
        assert browser.value(SMALLEST) >= 11
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        bright = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128
        assert bright == (paper or not dark), "dark is dark, paper is white"
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_check_finds_what_is_wrong(pages: dict[str, Path], browser: Browser, tmp_path: Path) -> None:
    """The same page, damaged: a text over another, a table wider than the screen, an error in the console, a request."""
    whole = pages["small"].read_text(encoding="utf-8")
    for damage, said in (
        ('<p style="margin-bottom:-30px">over the next one, it is</p><p>under the one before it</p>', "overlaps"),
        ('<p style="white-space:nowrap">' + "a line that does not wrap " * 20 + "</p>", "wide"),
        ('<svg viewBox="0 0 360 230" overflow="visible"><text x="340" y="20">beyond the edge of it</text></svg>', "outside of its chart"),
    ):
        (tmp_path / "damaged.html").write_text(whole.replace("<h2>", damage + "<h2>", 1), encoding="utf-8")
        browser.show(tmp_path / "damaged.html", width=PHONE)
        assert any(said in problem for problem in browser.problems()), said
    for damage in ("<script>console.error('no')</script>", "<script>nothing.there</script>", '<img src="http://127.0.0.1:9/x.png">'):
        (tmp_path / "damaged.html").write_text(whole.replace("<h2>", damage + "<h2>", 1), encoding="utf-8")
        browser.show(tmp_path / "damaged.html", width=PHONE)
        assert browser.complaints(), damage
