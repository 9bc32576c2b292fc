"""The frontier's page: knees where curves bend, every engine and output on it, and nothing cut off on any screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moebit.report.frontier import Curve, frontier_page
from tests.report.browser import Browser, chromium

MEASURED: list[dict[str, Any]] = [
    {
        "name": "a-rather-long-name",
        "format": "native",
        "size_bytes": 7_000_000,
        "kl": 4e-3,
        "predicted": 5e-3,
        "refused": None,
    },
    {"name": "broken", "format": "gguf", "size_bytes": 6_000_000, "kl": None, "predicted": None, "refused": "its experts are random"},
]


def curve(engine: str, shift: float) -> Curve:
    """A loss that falls by four with every bit."""
    points = tuple((int(1e6 * (2 + 3 * bits)), shift * 4.0**-bits) for bits in (2, 2.5, 3, 3.5, 4, 5, 6, 8))
    return Curve(engine, {"llama.cpp": "gguf", "vllm": "compressed-tensors"}.get(engine, "native"), points)


def page() -> str:
    curves = [curve("transformers", 1), curve("vllm", 2), curve("llama.cpp", 0.5), Curve("mlx", "", refused="it is not known here")]
    return frontier_page("models/m", 32_000_000, "nats per token", ["wiki", "code"], curves, MEASURED)


def test_the_knee_is_where_the_curve_bends() -> None:
    assert curve("vllm", 1).knee == (12_500_000, 4.0**-3.5)  # d/db of (8 - b) / 6 - 4^-(b - 2) is zero at 3.53
    assert Curve("e", "f", ((10, 3.0), (20, 2.0), (30, 1.0))).knee is None  # straight
    assert Curve("e", "f", ((10, 3.0), (20, 2.0))).knee is None


def test_all_that_was_found_is_on_the_page() -> None:
    text = page()
    for said in (
        "m: loss against size",
        "mlx",
        "it is not known here",
        "a-rather-long-name",
        "its experts are random",
        "knee",
    ):
        assert said in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert page() == text


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_nothing_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "f.html"
    file.write_text(page())
    with Browser(chromium()) as browser:  # type: ignore[arg-type]
        for options in ({"width": 1200}, {"width": 1200, "dark": True}, {"width": 390}, {"width": 800, "paper": True}):
            browser.show(file, **options)  # type: ignore[arg-type]
            assert browser.problems() == []
            assert browser.complaints() == []
