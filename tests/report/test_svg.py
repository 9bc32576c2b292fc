"""Charts: marks, places and pictures, against what a reader would compute."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from moebit.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Series, bars, heat, lines, number, png, scatter


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.25, "0.25"), (0.001, "0.001"), (2e-5, "2·10⁻⁵"), (1e-4, "10⁻⁴"), (40, "40"), (1500, "1500"), (12_000, "12k"),
        (2.5e6, "2.5M"), (-3, "-3"), (0.3, "0.3"), (8, "8"), (1e-12, "10⁻¹²"),
    ],
)  # fmt: skip
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    "axis", [Axis("", 0, 1), Axis("", 0, 57, whole=True), Axis("", -3, 1200), Axis("", 0.2, 0.21), Axis("", -0.5, 31.5, whole=True)]
)
def test_marks_are_round_few_and_inside(axis: Axis) -> None:
    marks = axis.marks(5)
    assert 2 <= len(marks) <= 7
    steps = np.diff([value for value, _ in marks])
    assert np.allclose(steps, steps[0])
    assert all(axis.low - 1e-9 <= value <= axis.high + 1e-9 for value, _ in marks)
    digits = steps[0] / 10 ** np.floor(np.log10(steps[0]))
    assert min(abs(digits - d) for d in (1, 2, 5)) < 1e-6
    assert len({name for _, name in marks}) == len(marks), "told apart"
    if axis.whole:
        assert all(value == int(value) for value, _ in marks)


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1), (0.002, 0.01), (0.0021, 0.0034), (1e-12, 10)])
def test_logarithmic_marks(low: float, high: float) -> None:
    axis = Axis.around("", [low, high], log=True)
    marks = axis.marks(5)
    assert 2 <= len(marks) <= 7
    assert axis.at(axis.low) == pytest.approx(0)
    assert axis.at(axis.high) == pytest.approx(1)
    assert axis.at(np.sqrt(low * high)) == pytest.approx(np.interp(np.log(np.sqrt(low * high)), np.log([axis.low, axis.high]), [0, 1]))


def test_points_lie_where_their_values_are() -> None:
    across, up = Axis("x", 0, 10), Axis("y", 0, 4)
    svg = ET.fromstring(lines(across, up, [Series("a & b", [(0, 0), (5, 2), (10, 4), (7, float("nan"))])]))
    line = svg.find("polyline")
    assert line is not None
    found = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert found == [pytest.approx(p, abs=0.06) for p in ((LEFT, TOP + height), (LEFT + width / 2, TOP + height / 2), (LEFT + width, TOP))]
    assert len(svg.findall("circle")) == 3
    assert "a & b, x 5: 2" in "".join(svg.itertext())


def test_bars_begin_at_zero() -> None:
    svg = ET.fromstring(bars(Axis("layer", 0, 3, whole=True), Axis("s", 0, 10), [(0, 10), (1, 5), (2, 0), (3, 2.5)]))
    heights = [float(box.attrib["height"]) for box in svg.findall("rect")]
    assert heights == pytest.approx([178, 89, 0, 44.5], abs=0.11)
    feet = [float(box.attrib["y"]) + float(box.attrib["height"]) for box in svg.findall("rect")]
    assert feet == pytest.approx([HEIGHT - BOTTOM] * 4, abs=0.11)


def test_labels_of_points_never_overlap() -> None:
    """Every label, or none where there is no room, but no two over each other: many points in one place."""
    draw = np.random.default_rng(0)
    for count in (1, 5, 30):
        points = [(float(x), float(y)) for x, y in 1 + draw.random((count, 2))]
        series = [Series(f"method {i}", [point], i % 6, [f"method number {i}"]) for i, point in enumerate(points)]
        across, up = Axis.around("GB", [p[0] for p in points], zero=False), Axis.around("KL", [p[1] for p in points], log=True)
        svg = ET.fromstring(scatter(across, up, series))
        texts = [t for t in svg.findall("text") if (t.text or "").startswith("method")]
        boxes = [(float(t.attrib["x"]), float(t.attrib["y"]), 6.6 * len(t.text or "")) for t in texts]
        for i, (x, y, w) in enumerate(boxes):
            assert x >= LEFT
            assert x + w <= WIDTH
            assert not any(abs(y - v) < 12 and x < u + other and u < x + w for u, v, other in boxes[:i])
        assert len(texts) == count or count == 30


def read_png(data: bytes) -> np.ndarray:
    """[rows, columns, 4] of an unfiltered RGBA file, its checksums checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    columns, rows, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 6)
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, 1 + 4 * columns)
    assert not raw[:, 0].any()
    return raw[:, 1:].reshape(rows, columns, 4)


def test_pictures() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.uint8)
    assert np.array_equal(read_png(png(image)), image)


def test_heat_map_colours() -> None:
    """Low is dark, high is bright, what is not known is transparent, and the bar beside it says so."""
    import base64

    values = np.array([[1e-4, 1e-2], [1.0, np.nan], [0.0, 10.0]])
    text = heat(
        values,
        Axis("expert", -0.5, 1.5, whole=True),
        Axis("layer", -0.5, 2.5, whole=True, names=["0", "7", "9"]),
        low=1e-4,
        high=1,
        log=True,
    )
    cells, bar = (read_png(base64.b64decode(data)) for data in re.findall(r"base64,([^\"]+)", text))
    assert cells[..., 3].tolist() == [[255, 255], [255, 0], [0, 255]]
    assert cells[0, 0, :3].tolist() == bar[-1, 0, :3].tolist() == [0x44, 0x01, 0x54]
    assert cells[1, 0, :3].tolist() == cells[2, 1, :3].tolist() == bar[0, 0, :3].tolist() == [0xFD, 0xE7, 0x25]
    bright = bar[::-1, 0, :3].astype(int) @ [2126, 7152, 722]
    assert (np.diff(bright) > 0).all(), "brighter is more, so that it can be read in grey"
    assert ">7</text>" in text
