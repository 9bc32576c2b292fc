"""Small charts, drawn by matplotlib, as SVG that belongs to the page around it.

A chart is 360 units wide, a phone's width, and scaled up from there. Its text stays text. What matplotlib draws in the colours of
`LIGHT` is turned into references to the page's custom properties of the same names (`var(--ink)`), so that one chart follows light, dark
and paper. Titles and legends are HTML around it, where text wraps and nothing can overlap. Lines are told apart by colour (those of
Okabe and Ito), by dash and by the shape of their points; heat maps have the colours of viridis. Neither needs eyes for red and green.

matplotlib is imported when a chart is drawn, because it takes longer than the rest of the package; its settings are those of this file
for that time alone, whatever the user's are.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    "paper": "#ffffff", "panel": "#f4f5f7", "ink": "#1c2026", "soft": "#59616d", "grid": "#dfe2e7", "alarm": "#9c2f00",
    "alarm-paper": "#fff3ec", "k0": "#0072b2", "k1": "#d55e00", "k2": "#009e73", "k3": "#a8518a", "k4": "#b07d00", "k5": "#3b8fc2",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "panel": "#1d2127", "ink": "#e6e9ed", "soft": "#a3abb7", "grid": "#353b44", "alarm": "#ffb48f",
    "alarm-paper": "#33211a", "k0": "#56b4e9", "k1": "#f08c4a", "k2": "#2fc79b", "k3": "#d993bd", "k4": "#e6b422", "k5": "#8fcdf2",
}  # fmt: skip
SHAPES = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}  # matplotlib's name of a marker, and what a legend shows
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)), (0, (1, 3)), (0, (7, 3)))
KINDS = 6  # of lines and points

WIDTH, HEIGHT, FONT = 360, 235, 12  # units of the SVG
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 10, 46
BAR = 90  # room for a heat map's colour bar with its numbers and its name
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "moebit", "font.size": FONT, "figure.dpi": 72, "savefig.dpi": 72, "figure.facecolor": "none",
    "savefig.facecolor": "none", "axes.facecolor": "none", "axes.edgecolor": LIGHT["soft"], "axes.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"], "xtick.color": LIGHT["soft"], "ytick.color": LIGHT["soft"], "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"], "grid.color": LIGHT["grid"], "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.labelsize": FONT, "xtick.labelsize": FONT, "ytick.labelsize": FONT, "lines.linewidth": 1.6,
    "image.interpolation": "none", "image.cmap": "viridis",
}  # fmt: skip


MOST = 7  # marks of a logarithmic axis
STEPS = (1, 2, 5, 10)  # between round values, times a power of ten
EDGED: dict[str, Any] = {"markersize": 9, "markeredgecolor": LIGHT["paper"], "markeredgewidth": 0.8}  # points that touch stay two
MARKED = 32  # points of a line, up to which each has its mark
NAMES = {colour: name for name, colour in LIGHT.items()}
CRISP = "image-rendering:crisp-edges;image-rendering:pixelated"
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Series:
    """One line or set of points, of a `kind` from 0 to KINDS - 1: its colour, dash and shape."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: int = 0


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, and in which unit. log: powers of ten are equally far apart.
        ends: its lowest and highest value, where they are not those of the data. marks: values to write, instead of round ones.
    """

    label: str
    log: bool = False
    ends: tuple[float, float] | None = None
    marks: Sequence[float] | None = None

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)


LAYER = Axis("layer")


def mark(kind: int, shape: str | None = None) -> str:
    """What a legend shows of a kind's points, or of those with another shape."""
    return SHAPES[shape or list(SHAPES)[kind]]


def number(value: float) -> str:
    """A short form, five letters or so: 0, 0.025, 40, 2,500, 12k, 3M, 2e-5."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e9:
        return re.sub(r"e([+-])0*(\d+)", lambda power: f"e{power[1].strip('+')}{power[2]}", f"{value:.0e}")
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def lines(
    across: Axis, up: Axis, series: Sequence[Series], *, bands: Sequence[tuple[int, Sequence[tuple[float, float, float]]]] = ()
) -> str:
    """Lines with marked points over whole numbers.

    Args:
        bands: (kind, points (x, low, high)) areas behind the lines.
    """
    with _chart(across, up) as (figure, axes):
        for kind, area in bands:
            x, low, high = zip(*area, strict=True)
            axes.fill_between(x, low, high, color=LIGHT[f"k{kind}"], alpha=0.18, linewidth=0)
        titles = {}
        for number, one in enumerate(series):
            shown = [(x, y) for x, y in one.points if up.shows(y)]
            few = len(shown) <= MARKED
            style: dict[str, Any] = {"color": LIGHT[f"k{one.kind}"], "linestyle": DASHES[one.kind], "markersize": 4.5}
            axes.plot(*_columns(shown), marker=list(SHAPES)[one.kind] if few else "none", gid=f"s{number}", **style)
            titles[f"s{number}"] = [f"{one.name}, {across.label} {x:g}: {y:.4g}" for x, y in shown if few]
        _whole(axes, [x for one in series for x, _ in one.points])
        _scale(axes, "y", up)
        return _svg(figure, f"{up.label} by {across.label}", titles)


def bars(across: Axis, up: Axis, values: Sequence[tuple[float, float]], kind: int = 0) -> str:
    """A bar from zero at every whole number."""
    with _chart(across, up) as (figure, axes):
        made = axes.bar(*_columns(values), width=0.8 if len(values) > 4 else 0.4, color=LIGHT[f"k{kind}"])
        titles = {}
        for patch, (x, y) in zip(made, values, strict=True):
            patch.set_gid(f"b{x:g}")
            titles[f"b{x:g}"] = [f"{across.label} {x:g}: {y:.4g}"]
        _whole(axes, [x for x, _ in values])
        _scale(axes, "y", up)
        return _svg(figure, f"{up.label} by {across.label}", titles)


def points(across: Axis, up: Axis, series: Sequence[Series], shapes: Sequence[str]) -> str:
    """Points anywhere; `shapes`, one for each series, are names of markers."""
    with _chart(across, up) as (figure, axes):
        titles = {}
        for number, (one, shape) in enumerate(zip(series, shapes, strict=True)):
            shown = [(x, y) for x, y in one.points if across.shows(x) and up.shows(y)]
            axes.plot(*_columns(shown), color=LIGHT[f"k{one.kind}"], marker=shape, linestyle="none", gid=f"s{number}", **EDGED)
            titles[f"s{number}"] = [f"{one.name}: {across.label} {x:.4g}, {up.label} {y:.4g}" for x, y in shown]
        axes.margins(0.12)
        _scale(axes, "x", across)
        _scale(axes, "y", up)
        return _svg(figure, f"{up.label} by {across.label}", titles)


def curves(across: Axis, up: Axis, lines: Sequence[Series], dots: Sequence[Series] = (), shapes: Sequence[str] = ()) -> str:
    """Lines without marks over any numbers, and points on them or beside them; `shapes`, one for each of `dots`, are names of markers."""
    with _chart(across, up) as (figure, axes):
        for one in lines:
            shown = [(x, y) for x, y in one.points if across.shows(x) and up.shows(y)]
            axes.plot(*_columns(shown), color=LIGHT[f"k{one.kind}"], linestyle=DASHES[one.kind])
        titles = {}
        for number, (one, shape) in enumerate(zip(dots, shapes, strict=True)):
            shown = [(x, y) for x, y in one.points if across.shows(x) and up.shows(y)]
            axes.plot(*_columns(shown), color=LIGHT[f"k{one.kind}"], marker=shape, linestyle="none", gid=f"s{number}", **EDGED)
            titles[f"s{number}"] = [f"{one.name}: {across.label} {x:.4g}, {up.label} {y:.4g}" for x, y in shown]
        axes.margins(0.06)
        _scale(axes, "x", across)
        _scale(axes, "y", up)
        return _svg(figure, f"{up.label} by {across.label}", titles)


def heat(values_RC: np.ndarray, across: Axis, down: Axis, colour: Axis, rows: Sequence[str] | None = None) -> str:
    """A heat map, row by row from the top, one pixel a value, and a bar that tells what its colours mean; what is no number stays empty.

    Args:
        colour: what the values are; its `ends` are the darkest and the brightest colour. rows: what to write at them instead of numbers.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter

    with _chart(across, down, right=BAR) as (figure, axes):
        low, high = colour.ends or (float(np.nanmin(values_RC)), float(np.nanmax(values_RC)))
        norm = (LogNorm if colour.log else Normalize)(low, high if high > low else low + 1, clip=True)
        known = np.isfinite(values_RC) & ((values_RC > 0) | (not colour.log))
        image = axes.imshow(np.ma.masked_where(~known, values_RC), aspect="auto", norm=norm)
        _whole(axes, ())
        if rows is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rows[round(y)] if 0 <= round(y) < len(rows) else ""))
        axes.spines[:].set_visible(True)
        beside = figure.add_axes((1 - (BAR - 10) / WIDTH, BOTTOM / HEIGHT, 10 / WIDTH, 1 - (TOP + BOTTOM) / HEIGHT))
        bar = figure.colorbar(image, cax=beside, label=colour.label)
        _scale(bar.ax, "y", colour)
        text = _svg(figure, f"heat map of {colour.label}, {down.label} by {across.label}")
    # Cells keep their edges, as matplotlib asks for; narrower ones than a unit would be left out then, and are mixed instead.
    return text if values_RC.shape[1] <= WIDTH - LEFT - BAR else text.replace(CRISP, "")


# --- axes


@contextmanager
def _chart(across: Axis, up: Axis, right: int = RIGHT) -> Iterator[tuple[Figure, Axes]]:
    """An empty chart; what is drawn inside the `with` has this file's settings."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, 1 - (LEFT + right) / WIDTH, 1 - (TOP + BOTTOM) / HEIGHT))
        axes.set_xlabel(across.label)
        axes.set_ylabel(up.label)
        yield figure, axes


def _columns(shown: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in shown], [y for _, y in shown]


def _whole(axes: Axes, across: Sequence[float]) -> None:
    """Marks at whole numbers only; `across`: what the horizontal axis holds, with half a step of room. Without it, rows are whole too."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=STEPS))
    if across:
        axes.set_xlim(min(across) - 0.5, max(across) + 0.5)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=STEPS))


def _scale(axes: Axes, which: str, what: Axis) -> None:
    """Ends, marks and grid of the x or y axis, of any numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if what.log:
        axes.set(**{f"{which}scale": "log"})
    if what.ends is not None:
        axes.set(**{f"{which}lim": what.ends})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    if what.marks is not None:
        axis.set_major_locator(FixedLocator(what.marks))
    elif what.log and high > 4 * low:
        near = [subs for subs in ((1, 2, 5), (1, 3)) if len(subs) * math.log10(high / low) <= MOST]
        axis.set_major_locator(LogLocator(subs=near[0] if near else (1,), numticks=MOST))
    else:
        axis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.grid(True)


# --- from matplotlib's SVG to the page's


def _svg(figure: Figure, label: str, titles: Mapping[str, Sequence[str]] | None = None) -> str:
    """The chart as an element of a page, the same bytes for the same numbers.

    No identifiers, which would have to be unique in the page: what matplotlib defines once and uses often is written where it is used.
    No style sheet, which would be the whole page's.

    Args:
        label: for those who do not see it. titles: by the gid of an artist, what to say when one hovers over its marks.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    source = ET.fromstring(drawn.getvalue())
    defined = {element.get("id"): element for element in source.iter() if element.get("id")}
    said: dict[ET.Element, str] = {}
    for gid, lines_of_it in (titles or {}).items():
        marks = defined[gid].findall(f".//{SVG}g/{SVG}use") or defined[gid].findall(f"./{SVG}path")
        said |= dict(zip(marks, lines_of_it, strict=False))
    page = ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label})
    page.extend(element for child in source for element in _elements(child, defined, said))
    return ET.tostring(page, encoding="unicode")


def _elements(source: ET.Element, defined: Mapping[str | None, ET.Element], said: Mapping[ET.Element, str]) -> Iterator[ET.Element]:
    """An element of matplotlib's with everything in it, as the page has it: without definitions, bare groups and what shows nothing."""
    tag, given = source.tag.removeprefix(SVG), dict(source.attrib)
    if tag in ("defs", "metadata") or given.get("style") == "fill: none":
        return
    if tag == "use":
        tag, used = "path", defined[given.pop(LINK)[1:]]
        style = "; ".join(part for part in (given.get("style"), used.get("style")) if part)
        given = {"d": used.attrib["d"], "transform": f"translate({given['x']} {given['y']})", "style": style}
    kept = {key.replace(LINK, "href"): _value(key, value) for key, value in given.items() if key not in ("id", "clip-path")}
    inner = [element for child in source for element in _elements(child, defined, said)]
    if tag == "g" and not kept:
        yield from inner
        return
    element = ET.Element(tag, kept)
    element.text = source.text if tag == "text" else None
    if source in said:
        ET.SubElement(element, "title").text = said[source]
    element.extend(inner)
    yield element


def _value(key: str, value: str) -> str:
    """An attribute: the page's font, in which letters are as wide as those that matplotlib counted with or narrower, and its colours."""
    if key == LINK:
        return "".join(value.split())
    value = " ".join(value.split())
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value))
        value = re.sub(r"#[0-9a-f]{6}", lambda found: f"var(--{NAMES[found[0]]})", value)
    return value
