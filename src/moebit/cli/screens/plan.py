"""What a recipe would make of a model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from moebit.cli.screens.model import show_activations, show_engines, show_reading
from moebit.cli.terminal import row, say, show, table, warning
from moebit.words import duration, plain, size

FILLED = 0.995  # of a budget, below which the steps are to blame


def show_plan(plan: dict[str, Any], before: int | None) -> None:
    """The plan; `before` is the size of the checkpoint in bytes, where it is known."""
    facts = table("plan", "")
    row(facts, "size", size(plan["size_bytes"]) + (f" (from {size(before)})" if before else ""))
    row(facts, "average bits", f"{plan['average_bits']:.3f}")
    row(facts, "quantized", f"{plan['quantized_linears']} linears, {plan['quantized_experts_modules']} layers of experts")
    row(facts, "peak memory, about", size(plan["peak_memory_bytes"]))
    row(facts, "time, about", duration(plan["seconds"]))
    show(facts)
    if "budget" in plan:
        show_budget(plan["budget"])
    if "original" in plan:
        say(
            warning("the checkpoint is itself quantized"),
            f": {plan['original']}; errors are counted from there, not from what it was made of",
        )
    if sizes := plan.get("other_group_sizes"):
        instead = Counter("the whole row" if size == -1 else f"groups of {size}" for size in sizes.values())
        told = ", ".join(f"{count} x {what}" for what, count in instead.items())
        say(f"rows that the group size does not divide: {told}, first {next(iter(sizes))}")
    if "gguf" in plan:
        _show_gguf(plan["gguf"])
    if "activations" in plan:
        show_activations(plan["activations"])
    if plan["peak_memory_bytes"] > plan["memory"]:
        say(warning(f"more than --memory {size(plan['memory'])}"), ": the smallest pieces of this model need that much")
    show_engines(plan["engines"])
    _show_kept(plan)


def show_budget(found: dict[str, Any]) -> None:
    """What a budget is spent on, what is predicted for it, and what a little more or less would change."""
    facts = table("budget", "")
    row(facts, "on disk", f"{size(found['size_bytes'])} of {size(found['limit_bytes'])} ({found['size_bytes'] / found['limit_bytes']:.2%})")
    row(facts, "predicted loss", f"{plain(found['predicted_loss'])} {found['unit']}")
    row(facts, "matrices", ", ".join(f"{count} x {kind}" for kind, count in found["matrices"].items()))
    for near in found["neighbours"]:
        more = near["size_bytes"] - found["size_bytes"]
        change = near["loss"] / found["predicted_loss"] - 1 if found["predicted_loss"] else 0.0
        row(facts, f"{size(abs(more))} {'more' if more > 0 else 'less'}", f"{change:+.0%}")
    row(facts, "possible", f"{size(found['smallest_bytes'])} to {size(found['largest_bytes'])}")
    show(facts)
    if found["size_bytes"] < FILLED * found["limit_bytes"]:
        say(warning("not filled"), ": the steps that this format and engine leave are so large that the next one does not fit")


def _show_gguf(found: dict[str, Any]) -> None:
    """Types of a GGUF file's tensors, those that do not fit, and what stays as the converter computes it."""
    say("types: ", ", ".join(f"{count} x {kind}" for kind, count in Counter(found["types"].values()).most_common()))
    if found["wanted"]:
        instead = Counter((kind, found["types"][name]) for name, kind in found["wanted"].items())
        say("rows that 256 does not divide: ", ", ".join(f"{n} x {new} instead of {old}" for (old, new), n in instead.items()))
    if found["computed"]:
        say(f"computed by the converter: {len(found['computed'])} tensors, first {next(iter(found['computed'].items()))}")
    for note in found["notes"]:
        say(warning("not done"), f": {note}")


def _show_kept(plan: dict[str, Any]) -> None:
    """What is not quantized, or not even read, and why."""
    show_reading(plan)
    if reasons := Counter(plan["kept"].values()):
        say("kept in full precision: ", ", ".join(f"{count} x {reason}" for reason, count in reasons.items()))
    if stored := plan["kept_as_stored"]:
        say(f"kept as stored: {len(stored)} tensors that the model class does not use, first {stored[0]}")
    if plan["unquantized_expert_share"]:
        say(warning(f"{plan['unquantized_expert_share']:.1%} of the expert parameters"), " stay in full precision")
