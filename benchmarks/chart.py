"""Line charts as SVG text, as many side by side as wanted; enough for a benchmark's results and without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 300, 56, 14, 34, 62
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#c98b2b", "#5c6670")


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        lines: name -> points (x, y), both not negative; the axes begin at zero.
        dots: mark the points (few measurements) instead of drawing the line alone (samples over time).
    """

    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float, float]]]
    dots: bool = True


def svg(charts: Sequence[Chart], columns: int = 2) -> str:
    """One SVG document with the charts in rows of `columns`."""
    rows = -(-len(charts) // columns)
    width, height = WIDTH * min(columns, len(charts)), HEIGHT * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, chart in enumerate(charts):
        parts.append(f'<g transform="translate({number % columns * WIDTH},{number // columns * HEIGHT})">')
        parts += _draw(chart)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw(chart: Chart) -> list[str]:
    points = [point for line in chart.lines.values() for point in line]
    step_x, step_y = _step(max(x for x, _ in points)), _step(max(y for _, y in points))
    most_x, most_y = (
        max(step, step * -(-max(values) // step)) for step, values in zip((step_x, step_y), zip(*points, strict=True), strict=True)
    )

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + x / most_x * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - y / most_y * (HEIGHT - TOP - BOTTOM), 1),
        )

    left, bottom = place(0, 0)
    right, top = place(most_x, most_y)
    parts = [f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" font-size="13">{escape(chart.title)}</text>']
    for i in range(round(most_y / step_y) + 1):
        y = place(0, i * step_y)[1]
        parts.append(f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{i * step_y:g}</text>')
    for i in range(round(most_x / step_x) + 1):
        x = place(i * step_x, 0)[0]
        parts.append(f'<line x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}" stroke="#333"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{i * step_x:g}</text>')
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#333"/>')
    middle = (top + bottom) / 2
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 31}" text-anchor="middle">{escape(chart.across)}</text>')
    parts.append(f'<text transform="translate(14,{middle}) rotate(-90)" text-anchor="middle">{escape(chart.up)}</text>')
    for number, (name, line) in enumerate(chart.lines.items()):
        colour, placed = COLOURS[number % len(COLOURS)], [place(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in placed if chart.dots]
        at = LEFT + number * (WIDTH - LEFT) / len(chart.lines)
        parts.append(f'<text x="{at:g}" y="{HEIGHT - 10}" fill="{colour}">{escape(name)}</text>')
    return parts


def _step(most: float) -> float:
    """A round distance between marks, three to seven of them."""
    power = 1.0
    while power * 10 <= most:
        power *= 10
    while power > most > 0:
        power /= 10
    return next((power * factor for factor in (0.2, 0.5, 1.0, 2.0) if most / (power * factor) <= 6), power * 2)
