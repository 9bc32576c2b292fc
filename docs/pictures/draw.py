"""The pictures of the method pages: python docs/pictures/draw.py writes them beside this file."""

from __future__ import annotations

import math
import random
from pathlib import Path

BLUE, RED, GREEN, GOLD, GREY, INK = "#0072b2", "#d55e00", "#009e73", "#b07d00", "#c9ced6", "#1c2026"


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, w: float, h: float, fill: str, opacity: float = 1.0) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" fill-opacity="{opacity:.2f}" rx="2"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1.5, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}" {more}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> str:
    angle = math.atan2(y2 - y1, x2 - x1)
    tips = [(x2 - 8 * math.cos(angle + turn), y2 - 8 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x2, y2), *tips])
    return line(x1, y1, x2, y2, colour) + f'<polygon points="{head}" fill="{colour}"/>'


def dot(x: float, y: float, r: float, colour: str, opacity: float = 1.0) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{colour}" fill-opacity="{opacity:.2f}"/>'


def document(parts: list[str], title: str, height: int = 210) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}" font-family="sans-serif">'
    return (
        "\n".join([head, f"<title>{title}</title>", f'<rect width="640" height="{height}" rx="8" fill="white"/>', *parts, "</svg>"]) + "\n"
    )


def gptq() -> str:
    draw, parts = random.Random(3), []
    for column in range(12):
        for row in range(5):
            state = "done" if column < 5 else "now" if column == 5 else "later"
            fill = {"done": BLUE, "now": RED, "later": GREY}[state]
            parts.append(
                box(
                    60 + column * 42,
                    50 + row * 20,
                    36,
                    16,
                    fill,
                    0.25 + 0.25 * draw.randint(0, 3) if state == "done" else 0.3 + 0.7 * draw.random(),
                )
            )
    parts += [
        text(163, 40, "rounded", colour=BLUE),
        text(288, 40, "now", colour=RED),
        text(438, 40, "still to come, moved to make up for the error"),
    ]
    parts += [arrow(288, 156, 288, 176, RED), line(288, 176, 545, 176, RED)]
    parts += [arrow(x, 176, x, 156, RED) for x in (335, 419, 503, 545)]
    parts.append(text(410, 197, "error of this column, as the inputs' second moment shares it out", colour=RED))
    return document(parts, "GPTQ rounds column after column")


def awq() -> str:
    x, w = (14, 20, 68, 16, 24, 12, 18, 22), (30, 44, 26, 38, 48, 34, 22, 40)
    parts = [text(150, 24, "as it is"), text(490, 24, "channel scaled by s"), arrow(285, 110, 345, 110), text(315, 98, "s", 15)]
    parts += [text(20, 80, "x", 14), text(20, 165, "W", 14)]
    for k, scale in enumerate((1.0, 2.0)):
        for i in range(8):
            colour, factor = (RED, scale) if i == 2 else (BLUE, 1.0)
            at = 44 + 340 * k + i * 27
            parts += [box(at, 105 - x[i] / factor, 19, x[i] / factor, colour), box(at, 190 - w[i] * factor, 19, w[i] * factor, colour)]
        parts += [line(40 + 340 * k, 190 - level, 258 + 340 * k, 190 - level, GREY, 1) for level in range(0, 57, 14)]
    parts.append(text(320, 207, "the grid's step is the same for all: against a larger weight it is smaller", 12))
    return document(parts, "Channels with large activations are scaled up before rounding", 216)


def coverage() -> str:
    parts = [text(150, 26, "tokens of each expert"), text(470, 26, "its statistics")]
    for i, tokens in enumerate((190, 110, 46, 14, 0)):
        y, share = 42 + i * 30, 60 / (60 + tokens)
        parts += [text(36, y + 15, f"e{i}"), box(52, y, tokens, 20, BLUE)]
        parts += [box(340, y, 260 * (1 - share), 20, BLUE), box(340 + 260 * (1 - share), y, 260 * share, 20, GOLD)]
    parts += [text(52, 57 + 120, "no tokens", 12, RED, "start"), dot(345, 200, 5, BLUE), text(356, 204, "its own", 12, INK, "start")]
    parts += [dot(440, 200, 5, GOLD), text(451, 204, "its layer's", 12, INK, "start")]
    return document(parts, "Experts lean on their layer's statistics", 216)


def ebss() -> str:
    draw, parts = random.Random(5), []
    layers = [[105], [50, 105, 160], [50, 105, 160], [50, 105, 160]]
    for step in range(3):
        for y in layers[step]:
            for z in layers[step + 1]:
                kept = draw.random() < 0.5
                parts.append(
                    line(
                        50 + step * 110,
                        y,
                        160 + step * 110,
                        z,
                        BLUE if kept else GREY,
                        2 if kept else 1,
                        "" if kept else 'stroke-dasharray="3 4"',
                    )
                )
    parts += [dot(50 + step * 110, y, 7, BLUE if (step + k) % 3 else GREY) for step in range(4) for k, y in enumerate(layers[step])]
    parts += [text(200, 26, "continuations"), text(510, 26, "load of the experts")]
    for k, values in enumerate(((30, 12, 60, 8, 22, 14), (24, 28, 22, 30, 26, 25))):
        colour, base = (RED, 100) if not k else (GREEN, 178)
        parts += [box(430 + i * 20, base - v, 15, v, colour) for i, v in enumerate(values)]
        parts.append(text(568, base - 8, "dropped" if not k else "kept", 13, colour, "start"))
    return document(parts, "Likely and balanced continuations are kept")


def affinity() -> str:
    draw, parts = random.Random(2), [text(95, 26, "tokens"), text(320, 26, "router's weight"), text(545, 26, "statistics of the expert")]
    for i, g in enumerate((0.9, 0.55, 0.25, 0.08)):
        y = 55 + i * 38
        parts += [box(70 + j * 11, y - 8, 9, 16, GREY, 0.3 + 0.7 * draw.random()) for j in range(5)]
        parts += [
            line(140, y, 480, 110, BLUE, 1 + 8 * g, f'stroke-opacity="{0.25 + 0.7 * g:.2f}"'),
            text(300, y + (110 - y) * 0.47 - 8 * g - 4, f"{g:g}", 12),
        ]
    parts += [box(500 + i * 16, 62 + j * 16, 14, 14, BLUE, 0.15 + 0.8 * math.exp(-abs(i - j) / 1.6)) for i in range(6) for j in range(6)]
    return document(parts, "Tokens count by their affinity")


def smoothing() -> str:
    draw, parts = random.Random(9), [text(140, 24, "what each expert asks for"), text(490, 24, "one scale for all: the largest")]
    wants = [[6 + 40 * draw.random() ** 3 for _ in range(12)] for _ in range(3)]
    wants[0][4], wants[2][9] = 48, 42
    for i, row in enumerate(wants):
        parts += [text(24, 70 + i * 58, f"e{i}")] + [
            box(44 + j * 18, 78 + i * 58 - v, 13, v, (BLUE, GREEN, GOLD)[i]) for j, v in enumerate(row)
        ]
    best = [max((row[j], i) for i, row in enumerate(wants)) for j in range(12)]
    parts += [box(385 + j * 18, 160 - 2 * v, 13, 2 * v, (BLUE, GREEN, GOLD)[i]) for j, (v, i) in enumerate(best)]
    parts += [arrow(275, 120, 365, 120), text(490, 182, "input channels")]
    return document(parts, "The scale is the largest that any expert asks for")


def routing() -> str:
    parts = [text(160, 24, "full precision"), text(480, 24, "rounded"), text(320, 110, "→", 26)]
    for k, values in enumerate(((0.34, 0.22, 0.17, 0.15, 0.08, 0.04), (0.33, 0.23, 0.14, 0.18, 0.08, 0.04))):
        chosen = sorted(range(6), key=lambda i: -values[i])[:3]
        for i, v in enumerate(values):
            x, h = 70 + 320 * k + i * 32, v * 340
            parts += [box(x, 160 - h, 24, h, (RED if k and i == 3 else BLUE) if i in chosen else GREY), text(x + 12, 177, f"e{i}", 12)]
    parts.append(text(320, 200, "a probability moves by 0.03, and another expert is chosen", colour=RED))
    return document(parts, "A small change of the logits changes the choice")


def allocation() -> str:
    values = (92, 80, 61, 52, 44, 33, 27, 20, 14, 9, 6, 4)
    parts = [text(320, 24, "experts by what they bring into the layer's output")]
    for i, v in enumerate(values):
        bits = 8 if i < 2 else 4 if i < 5 else 3 if i < 8 else 2
        parts += [
            box(56 + i * 45, 150 - 1.2 * v, 32, 1.2 * v, {8: BLUE, 4: GREEN, 3: GOLD, 2: RED}[bits]),
            text(72 + i * 45, 168, str(bits), 13),
        ]
    parts.append(text(320, 195, "bits, handed out until the size is reached"))
    return document(parts, "Widths by significance")


def rotation() -> str:
    draw = random.Random(4)
    parts = [text(150, 24, "x: one channel stands out"), text(490, 24, "x R: none does"), arrow(285, 120, 345, 120), text(315, 110, "R")]
    before = [8 + 14 * draw.random() for _ in range(14)]
    before[5] = 130
    level = math.sqrt(sum(v * v for v in before) / 14)
    parts += [box(50 + i * 16, 185 - v, 12, v, RED if i == 5 else BLUE) for i, v in enumerate(before)]
    parts += [box(375 + i * 16, 185 - v, 12, v, BLUE) for i, v in enumerate(level * (0.7 + 0.6 * draw.random()) for _ in range(14))]
    return document(parts, "A rotation spreads an outlier")


def main() -> None:
    for made in (gptq, awq, coverage, ebss, affinity, smoothing, routing, allocation, rotation):
        (Path(__file__).parent / f"{made.__name__}.svg").write_text(made(), encoding="utf-8")


if __name__ == "__main__":
    main()
