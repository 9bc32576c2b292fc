"""Predicted loss against size."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, row, say, show, table, warning
from moebit.words import plain, size


def show_frontier(found: Any) -> None:
    engines = table("engine", "smallest", "knee", "largest", "loss x 1000 at these")
    for curve in found.curves:
        if curve.refused:
            continue
        marked = [point for point in (curve.points[0], curve.knee, curve.points[-1]) if point is not None]
        losses = ", ".join(plain(1000 * loss) for _, loss in marked)
        row(engines, curve.engine, size(curve.points[0][0]), size(curve.knee[0]) if curve.knee else "-", size(curve.points[-1][0]), losses)
    show(engines)
    for curve in found.curves:
        if curve.refused:
            say(warning(curve.engine), f" is left out: {curve.refused}")
    for one in found.measured:
        told = f"not scored: {one['refused']}" if one["refused"] else f"KL x 1000 {plain(1000 * one['kl'])}" if one["kl"] else "-"
        say(f"{one['name']}: {size(one['size_bytes'])}, {told}")
    say(bold(found.page), " shows it")
