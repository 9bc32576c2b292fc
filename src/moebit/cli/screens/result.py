"""What a quantization made."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import row, say, show, table, warning
from moebit.words import duration, size


def show_result(result: Any, *, text_given: bool) -> None:
    if result.already:
        say(f"done already: {result.path} is whole and was made with these very settings")
        return
    section = result.plan.recipe.calibration
    if text_given and section.kind != "text" and not section.text_share:
        say(f"calibrated on the given text; without --text this recipe samples its own ({section.kind})")
    for name, read_as in result.texts.items():
        say(f"text {name}: read as {read_as}")
    facts = table(result.path, "")
    smaller = result.size_before / result.size_after
    row(facts, "size", f"{size(result.size_before)} -> {size(result.size_after)} ({smaller:.2f}x smaller)")
    row(facts, "average bits", f"{result.plan.average_bits:.3f}")
    row(facts, "time", duration(result.seconds))
    row(facts, "report", result.path / "report.html")
    show(facts)
    if result.unseen_experts:
        say(
            warning(f"{result.unseen_experts} experts saw no calibration token"),
            " and were calibrated on their layer's tokens; more or other --text would help",
        )
    if result.fallbacks:
        say(warning(f"{result.fallbacks} matrices fell back to round-to-nearest"), " (report.json names them)")
    for what, count in result.skipped.items():
        say(warning(f"left in {count} places"), f": {what}")
