"""Small charts as SVG text: lines, bars, points and heat maps, drawn for a page that is 360 pixels wide and scaled up from there.

Written by hand rather than by a plotting library, because a page is part of every quantization: it costs milliseconds, has no
dependency, and colours come from the page's style sheet (classes `c0` to `c5`, `ink`, `grid`), so that a chart follows light, dark and
paper. Titles and legends are HTML around a chart, where text wraps and nothing can overlap. The colours are those of Okabe and Ito, the
heat maps' those of viridis; both are told apart without seeing red and green, and lines differ in their dashes too.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 42
BAR = 46  # room for a heat map's colour bar and its numbers
CHARACTER = 6.6  # width of a digit at the charts' 11 pixels, in a wide font
VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what and in which unit. low, high: its ends. log: powers of ten are equally far apart. whole: marks at whole numbers only.
        names: what to write at whole numbers instead of them (layers that are not numbered without gaps).
    """

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    names: Sequence[str] | None = None

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, log: bool = False, zero: bool = True, whole: bool = False) -> Axis:
        """An axis that holds `values`; not finite ones, and on a log axis those that are not positive, are left out."""
        good = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(good), max(good)
        if log:
            return cls(label, low / 1.15, max(high, low * 1.5) * 1.15, True)
        low = min(0.0, low) if zero else low
        high = high if high > low else low + 1
        margin = 0.0 if whole else 0.04 * (high - low)
        return cls(label, low if zero else low - margin, high + margin, False, whole)

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def marks(self, most: int) -> list[tuple[float, str]]:
        """At most about `most` round values, with what to write there."""
        values = _decades(self.low, self.high, most) if self.log else _steps(self.low, self.high, most, self.whole)
        if self.names is not None:
            return [(value, self.names[round(value)]) for value in values if 0 <= round(value) < len(self.names)]
        return [(value, number(value)) for value in values]


@dataclass(frozen=True)
class Series:
    """One line or set of points: `colour` is a number of the page's palette."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    labels: Sequence[str] = ()


def number(value: float) -> str:
    """A short form: 0, 0.25, 40, 12k, 2·10⁻⁵."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -3 <= power <= 3:
        return f"{value:.{max(0, 2 - power)}f}".rstrip("0").rstrip(".") if power < 2 else f"{value:.0f}"
    if 3 < power < 12:
        unit = "kMG"[power // 3 - 1]
        return f"{value / 10 ** (3 * (power // 3)):.3g}{unit}"
    factor = value / 10.0**power
    tens = "10" + str(power).translate(SUPERSCRIPT)
    return tens if abs(factor - 1) < 1e-6 else f"{factor:.2g}·{tens}"


def lines(
    across: Axis, up: Axis, series: Sequence[Series], *, bands: Sequence[tuple[int, Sequence[tuple[float, float, float]]]] = ()
) -> str:
    """Lines with marked points.

    Args:
        bands: (colour, points (x, low, high)) areas behind the lines.
    """
    parts = _frame(across, up)
    for colour, points in bands:
        shown = [(x, max(a, up.low), b) for x, a, b in points if up.shows(b)]
        edge = [_place(across, up, x, b) for x, _, b in shown] + [_place(across, up, x, a) for x, a, _ in reversed(shown)]
        if edge:
            parts.append(f'<polygon class="area c{colour}" points="{_points(edge)}"/>')
    for one in series:
        placed = [_place(across, up, x, y) for x, y in one.points if up.shows(y)]
        parts.append(f'<polyline class="line c{one.colour} d{one.colour}" points="{_points(placed)}"/>')
        if len(placed) <= 64:
            titles = [f"{one.name}, {across.label} {number(x)}: {y:.4g}" for x, y in one.points if up.shows(y)]
            parts += [
                _dot(x, y, one.colour, title, 2.6 if len(placed) <= 24 else 1.6) for (x, y), title in zip(placed, titles, strict=True)
            ]
    return _document([*parts, *_frame_text(across, up)], f"{up.label} by {across.label}")


def bars(across: Axis, up: Axis, values: Sequence[tuple[float, float]], colour: int = 0) -> str:
    """A bar from zero at every x."""
    parts = _frame(across, up)
    room = (WIDTH - LEFT - RIGHT) / max(1.0, across.high - across.low)
    width = max(0.5, min(22.0, 0.8 * room))
    for x, y in values:
        if up.shows(y):
            (left, top), bottom = _place(across, up, x, y), _place(across, up, x, up.low)[1]
            title = escape(f"{across.label} {number(x)}: {y:.4g}")
            box = f'x="{left - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{max(0.0, bottom - top):.1f}"'
            parts.append(f'<rect class="bar c{colour}" {box}><title>{title}</title></rect>')
    return _document([*parts, *_frame_text(across, up)], f"{up.label} by {across.label}")


def scatter(across: Axis, up: Axis, series: Sequence[Series]) -> str:
    """Points with their labels beside them, each where it covers no other label and no point."""
    parts, text = _frame(across, up), []
    boxes: list[tuple[float, float, float, float]] = []
    placed = [(one, i, _place(across, up, *point)) for one in series for i, point in enumerate(one.points) if up.shows(point[1])]
    boxes += [(x - 5, y - 5, x + 5, y + 5) for _, _, (x, y) in placed]
    for one, i, (x, y) in placed:
        label = one.labels[i] if one.labels else one.name
        parts.append(_dot(x, y, one.colour, f"{label}: {across.label} {one.points[i][0]:.4g}, {up.label} {one.points[i][1]:.4g}", 4.5))
        short = label if len(label) <= 24 else label[:23] + "…"
        spot = _free_spot(x, y, len(short) * CHARACTER, boxes)
        if spot:
            boxes.append(spot)
            text.append(f'<text class="ink" x="{spot[0]:.1f}" y="{spot[3] - 3:.1f}">{escape(short)}</text>')
    return _document([*parts, *_frame_text(across, up), *text], f"{up.label} by {across.label}")


def _free_spot(
    x: float, y: float, width: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float, float, float] | None:
    """A box of a label's size beside a point that overlaps nothing and lies inside the frame; None where there is none."""
    height = 13
    near = [(x + 7, y - 7), (x - 7 - width, y - 7), (x - width / 2, y - 20), (x - width / 2, y + 8)]
    further = [(x + dx - width / 2, y + dy) for dy in (-34, 22, -48, 36, -62, 50) for dx in (0, 30, -30, 60, -60)]
    for left, top in near + further:
        box = (left, top, left + width, top + height)
        inside = box[0] >= LEFT + 2 and box[2] <= WIDTH - 2 and box[1] >= TOP and box[3] <= HEIGHT - BOTTOM - 1
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return box
    return None


def heat(values_RC: np.ndarray, across: Axis, down: Axis, *, low: float, high: float, log: bool = False) -> str:
    """A heat map: row by row from the top, colours from `low` to `high`; what is not a number stays empty."""
    right = WIDTH - RIGHT - BAR
    width, height = right - LEFT, HEIGHT - TOP - BOTTOM
    scale = Axis("", low, high if high > low else low + 1, log)
    shares = np.full(values_RC.shape, np.nan)
    good = np.isfinite(values_RC) & ((values_RC > 0) | (not log))
    shares[good] = [min(1.0, max(0.0, scale.at(max(float(v), low)))) for v in values_RC[good]]
    ramp = np.linspace(1, 0, 64).reshape(-1, 1)
    parts = [
        _image(shares, LEFT, TOP, width, height),
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>',
        _image(ramp, right + 8, TOP, 10, height),
    ]
    rows, columns = values_RC.shape
    for value, name in _room(down, max(1, min(8, rows))):
        y = TOP + (value + 0.5) / rows * height
        parts.append(f'<text class="ink" text-anchor="end" x="{LEFT - 5}" y="{y + 4:.1f}">{escape(name)}</text>')
    for value, name in _room(across, max(1, min(6, columns))):
        x = LEFT + (value + 0.5) / columns * width
        parts.append(f'<text class="ink" text-anchor="middle" x="{x:.1f}" y="{TOP + height + 15}">{escape(name)}</text>')
    for value, name in scale.marks(5):
        y = TOP + (1 - scale.at(value)) * height
        if TOP - 1 <= y <= TOP + height + 1:
            parts.append(f'<text class="ink" x="{right + 21}" y="{min(max(y + 4, TOP + 8), TOP + height):.1f}">{escape(name)}</text>')
    parts += _labels(across.label, down.label, (LEFT + right) / 2)
    return _document(parts, f"heat map, {down.label} by {across.label}")


def _room(axis: Axis, most: int) -> list[tuple[float, str]]:
    return [(value, name) for value, name in axis.marks(most) if axis.low <= value <= axis.high]


def _image(shares_RC: np.ndarray, x: float, y: float, width: float, height: float) -> str:
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in VIRIDIS], dtype=float)
    known = np.isfinite(shares_RC)
    at = np.where(known, shares_RC, 0) * (len(anchors) - 1)
    lower = np.minimum(at.astype(int), len(anchors) - 2)
    mixed = anchors[lower] + (at - lower)[..., None] * (anchors[lower + 1] - anchors[lower])
    rgba = np.concatenate([mixed.round(), np.where(known, 255, 0)[..., None]], axis=2).astype(np.uint8)
    data = base64.b64encode(png(rgba)).decode()
    return (
        f'<image class="cells" preserveAspectRatio="none" x="{x}" y="{y}" width="{width}" height="{height}" '
        f'href="data:image/png;base64,{data}"/>'
    )


def png(rgba_RCK: np.ndarray) -> bytes:
    """A PNG file of [rows, columns, 4] bytes."""
    rows, columns, _ = rgba_RCK.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = b"".join(b"\0" + row.tobytes() for row in rgba_RCK)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


# --- axes


def _frame(across: Axis, up: Axis) -> list[str]:
    (left, bottom), (right, top) = (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)
    parts = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{_y(up, value):.1f}" y2="{_y(up, value):.1f}"/>'
        for value, _ in up.marks(5)
        if top - 1 <= _y(up, value) <= bottom + 1
    ]
    return [*parts, f'<path class="frame" d="M{left} {top}V{bottom}H{right}"/>']


def _frame_text(across: Axis, up: Axis) -> list[str]:
    bottom, parts = HEIGHT - BOTTOM, []
    for value, name in up.marks(5):
        if TOP - 1 <= _y(up, value) <= bottom + 1:
            parts.append(f'<text class="ink" text-anchor="end" x="{LEFT - 5}" y="{_y(up, value) + 4:.1f}">{escape(name)}</text>')
    for value, name in _room(across, 6):
        x = _place(across, up, value, up.low)[0]
        parts.append(f'<line class="frame" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        x = min(x, WIDTH - 1 - len(name) * CHARACTER / 2)
        parts.append(f'<text class="ink" text-anchor="middle" x="{x:.1f}" y="{bottom + 16}">{escape(name)}</text>')
    return parts + _labels(across.label, up.label, (LEFT + WIDTH - RIGHT) / 2)


def _labels(across: str, up: str, middle: float) -> list[str]:
    centre = (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<text class="ink" text-anchor="middle" x="{middle:.1f}" y="{HEIGHT - 8}">{escape(across)}</text>',
        f'<text class="ink" text-anchor="middle" transform="translate(11,{centre:.1f}) rotate(-90)">{escape(up)}</text>',
    ]


def _y(up: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - up.at(value) * (HEIGHT - TOP - BOTTOM)


def _place(across: Axis, up: Axis, x: float, y: float) -> tuple[float, float]:
    inner = WIDTH - LEFT - RIGHT
    inset = 12 if across.whole else 0  # bars and points at the ends keep clear of the frame
    return LEFT + inset + across.at(x) * (inner - 2 * inset), _y(up, y)


def _points(placed: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)


def _dot(x: float, y: float, colour: int, title: str, radius: float = 2.6) -> str:
    return f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def _document(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">' + "".join(parts) + "</svg>"


def _steps(low: float, high: float, most: int, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / max(1, most)))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors if low <= factor * 10.0**power <= high]
        if len(values) <= most + 1:
            return values
    return values[:: -(-len(values) // most)]
