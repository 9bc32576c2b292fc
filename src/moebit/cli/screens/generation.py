"""What models wrote after a prompt."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, row, say, say_lines, show, table
from moebit.words import size


def show_generation(prompt: str, result: Any) -> None:
    runs = [result.model] if result.reference is None else [result.model, result.reference]
    for run in runs:
        say(bold(run.model))
        say_lines(prompt, style="dim", end="")
        say_lines(run.text)
    speeds = table("", "prompt", "tokens/s", "written", "tokens/s", "weights", "whole process", "products")
    for run in runs:
        decode = "-" if run.decode is None else f"{run.decode:.1f}"
        sizes = (size(run.weights_bytes), size(run.resident_bytes))
        row(speeds, run.model, run.prompt_tokens, f"{run.prefill:.1f}", len(run.tokens), decode, *sizes, ", ".join(run.products) or "-")
    show(speeds)
    if result.reference is not None:
        same = result.differ_at is None
        say("both wrote the same" if same else f"they differ from new token {result.differ_at + 1} on")
