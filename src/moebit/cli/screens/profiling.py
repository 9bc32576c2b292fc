"""How experts are used, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moebit.cli.terminal import bold, row, say, show, table, warning
from moebit.words import size


def show_profile(found: Any) -> None:
    sets = table("data set", "tokens", "errors")
    for name, facts in found.sets.items():
        row(sets, name, f"{facts['tokens']:,}", "measured" if facts["errors"] else "-")
    show(sets)
    say(bold(found.path), f": {len(found.experts)} layers with experts, {len(found.linears)} linears")


def show_drift(result: dict[str, Any]) -> None:
    distances = table("text", "nearest set", "distance", "of its own halves", "")
    for name, found in result["texts"].items():
        verdict = warning("other data: moebit adapt") if found["drifted"] else "as the sets"
        row(distances, name, found["nearest"], f"{found['distance']:.3f}", f"{found['noise']:.3f}", verdict)
    show(distances)
    for name, distance in result["sets"].items():
        say(f"{name} is {distance:.3f} from the nearest other set")


def show_allocation(result: Any, file: Path) -> None:
    widths = sorted({width for counts in result.counts.values() for width in counts})
    matrices = table("matrices", *(f"{width} bits" for width in widths))
    for name, counts in result.counts.items():
        row(matrices, name, *(counts.get(width, 0) for width in widths))
    show(matrices)
    say(bold(file), f": {result.average_bits:.4f} bits per quantized weight on disk")


def show_adaptation(output: Path, result: Any) -> None:
    if not result.channels:
        say(bold(output), ": no expert needs more bits for this than it has; nothing was written")
        return
    experts = sum(len(raised) for raised in result.raised.values())
    say(
        bold(result.path),
        f": {result.channels} channels of {experts} experts in an overlay of {size(result.bytes_written)}; "
        f"{result.seconds:.1f} s, {result.noted:.1f} s of them looking at the texts",
    )
