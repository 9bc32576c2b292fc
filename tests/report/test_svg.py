"""Charts: that points, bars and colours lie where their values are, and that nothing in them reaches beyond the chart."""

from __future__ import annotations

import ast
import base64
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

import moebit
from moebit.report.svg import (
    BAR,
    BOTTOM,
    DARK,
    HEIGHT,
    LAYER,
    LEFT,
    LIGHT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    bars,
    heat,
    lines,
    number,
    points,
)

BOX = (LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, TOP)  # left, bottom, right, top of what is drawn in
EXPERT = Axis("expert")


def marks(svg: ET.Element) -> dict[str, tuple[float, float]]:
    """What is said over a mark -> its place."""
    found = {}
    for path in svg.findall("path"):
        title, place = path.find("title"), re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\)", path.get("transform", ""))
        if title is not None and place:
            found[title.text or ""] = (float(place[1]), float(place[2]))
    return found


def images(svg: str) -> list[np.ndarray]:
    """[rows, columns, 4] of every picture."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")) for data in found]


def drawn() -> list[str]:
    """One of each kind."""
    series = [Series(name, [(0, 2.0), (1, 3.0), (7, 1e-3)], kind) for kind, name in enumerate("abcdef")]
    log = Axis("y", log=True)
    return [
        lines(LAYER, log, series, bands=[(1, [(0, 1.0, 2.0), (7, 0.5, 3.0)])]),
        bars(LAYER, Axis("s"), [(0, 3.0), (1, 4.0)]),
        points(Axis("MB"), log, series, "os^DvP"),
        heat(np.arange(1, 7.0).reshape(2, 3), EXPERT, LAYER, log),
    ]


def test_points_lie_where_their_values_are() -> None:
    given = [(0, 0.0), (5, 2.0), (10, 4.0), (7, float("nan"))]
    found = marks(ET.fromstring(lines(LAYER, Axis("y", ends=(0, 4)), [Series("a & b", given)])))
    left, bottom, right, top = BOX
    across = np.interp([0, 5, 10], [-0.5, 10.5], [left, right])
    assert list(found) == [f"a & b, layer {x}: {y}" for x, y in ((0, 0), (5, 2), (10, 4))]
    assert np.allclose(list(found.values()), np.stack([across, [bottom, (bottom + top) / 2, top]], 1), atol=0.01)


def test_on_a_logarithmic_axis_powers_are_equally_far_apart_and_what_has_none_is_left_out() -> None:
    given = [(1, 1e-3), (2, 1e-2), (3, 1.0), (4, 0.0), (5, -1.0)]
    heights = [y for _, y in marks(ET.fromstring(lines(LAYER, Axis("y", log=True), [Series("a", given)]))).values()]
    assert len(heights) == 3
    assert (heights[0] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(3)


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1), (1e-4, 0.5), (0.002, 0.01), (0.0087, 0.0131), (1e-12, 10)])
def test_logarithmic_axes_have_marks_enough_and_not_too_many(low: float, high: float) -> None:
    svg = ET.fromstring(heat(np.array([[low, high]]), EXPERT, LAYER, Axis("error", True, (low, high))))
    said = [t.text or "" for t in svg.iter("text") if re.fullmatch(r"[\d.e-]+", t.text or "")][
        3:
    ]  # behind those of the experts and the layer
    assert 3 <= len(set(said)) <= 8
    assert all(low * (1 - 1e-6) <= float(one) <= high * (1 + 1e-6) for one in said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.25, "0.25"), (0.001, "0.001"), (2e-5, "2e-5"), (40, "40"), (1500, "1,500"), (12_000, "12k"), (2.5e6, "2.5M"),
        (-3, "-3"), (1e-12, "1e-12"), (3e12, "3e12"),
    ],
)  # fmt: skip
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said


def test_bars_begin_at_zero() -> None:
    svg = ET.fromstring(bars(LAYER, Axis("s", ends=(0, 10)), [(0, 10.0), (1, 5.0), (2, 0.0), (3, 2.5)]))
    found = {title.text: path.get("d", "") for path in svg.findall("path") if (title := path.find("title")) is not None}
    corners = {said: np.array(re.findall(r"([\d.]+) ([\d.]+)", d), float) for said, d in found.items()}
    assert list(corners) == ["layer 0: 10", "layer 1: 5", "layer 2: 0", "layer 3: 2.5"]
    inner = HEIGHT - BOTTOM - TOP
    assert [np.ptp(c[:, 1]) for c in corners.values()] == pytest.approx([inner, inner / 2, 0, inner / 4], abs=0.01)
    assert [c[:, 1].max() for c in corners.values()] == pytest.approx([HEIGHT - BOTTOM] * 4, abs=0.01)


def test_heat_map_colours() -> None:
    """Each cell has the colour of its value; what is not known, or on a logarithmic scale has no place, is empty."""
    values = np.array([[1e-4, 1e-2], [1.0, np.nan], [0.0, 10.0]])
    text = heat(values, EXPERT, LAYER, Axis("error", log=True, ends=(1e-4, 1)), rows=["0", "7", "9"])
    cells = images(text)[0]
    wanted = [[colormaps["viridis"](share, bytes=True) for share in row] for row in ((0.0, 0.5), (1.0, 0), (0, 1.0))]
    assert cells[..., 3].tolist() == [[255, 255], [255, 0], [0, 255]]
    shown = cells[..., 3] > 0
    assert np.abs(cells[shown][:, :3].astype(int) - np.array(wanted)[shown][:, :3]).max() <= 2
    written = {t.text for t in ET.fromstring(text).iter("text")}
    assert {"7", "9", "error", "expert", "layer", "0.01"} <= written


def test_a_map_of_a_large_model_is_small() -> None:
    """60 layers of 256 experts: a pixel a value, not an element."""
    text = heat(np.random.default_rng(0).random((60, 256)), EXPERT, LAYER, Axis("bits per weight", ends=(0, 1), marks=(0, 1)))
    assert images(text)[0].shape == (60, 256, 4)
    assert len(text) < 120_000, "random values hardly compress"
    box = ET.fromstring(text).find("image")
    assert box is not None
    scale = [float(v) for v in box.get("transform", "").removeprefix("matrix(").removesuffix(")").split()]
    assert (256 * scale[0], 60 * scale[3]) == pytest.approx((WIDTH - LEFT - BAR, HEIGHT - TOP - BOTTOM))


def test_every_colour_is_the_pages_and_text_is_text() -> None:
    for text in drawn():
        svg = ET.fromstring(text)
        bare = re.sub(r"base64,[^\"]+", "", text)
        assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(|<style|<defs|\bid=|url\(|font-family|xlink", bare)
        assert set(re.findall(r"var\(--([^)]*)\)", bare)) <= set(LIGHT)
        assert {float(size) for size in re.findall(r"font-size: ([\d.]+)px", bare)} == {12.0}, "no text is smaller than the page's"
        assert len(list(svg.iter("text"))) >= 6
        assert svg.get("aria-label")
    assert LIGHT.keys() == DARK.keys()


def test_settings_are_left_as_they_were_and_do_not_matter() -> None:
    before = drawn()
    with matplotlib.rc_context(
        {"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red", "image.cmap": "jet", "svg.hashsalt": "x"}
    ):
        mine = dict(matplotlib.rcParams)
        assert drawn() == before, "the same numbers give the same bytes, whatever the user's settings"
        assert dict(matplotlib.rcParams) == mine


def test_matplotlib_is_imported_when_a_chart_is_drawn() -> None:
    """No module imports it when it is imported itself: importing moebit takes as long as it did."""
    files = list(Path(moebit.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
            assert not any((name or "").startswith("matplotlib") for name in names), file
