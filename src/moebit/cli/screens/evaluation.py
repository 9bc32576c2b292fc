"""How good a model is, by itself and beside others."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, row, say, show, table, warning
from moebit.words import size


def show_evaluation(result: dict[str, Any]) -> None:
    compared = result["reference"] is not None
    bits = f"{result['average_bits']:.3f} bits per weight"
    say(bold(result["model"]), f", {size(result['size_bytes'])}, {bits}", f", against {result['reference']}" if compared else "")
    if not result["texts"]:
        return
    agreement = ("KL x 1000", "top-1", "same experts", "overlap") if compared else ()
    scores = table("text", "tokens", "perplexity", "bits/byte", *agreement)
    for name, found in result["texts"].items():
        per_byte = "-" if found["bits_per_byte"] is None else f"{found['bits_per_byte']:.4f}"
        row(scores, name, f"{found['tokens']:,}", f"{found['perplexity']:.3f}", per_byte, *(_agreement(found) if compared else ()))
    show(scores)
    for remark in result.get("remarks", []):
        say(warning("note"), f": {remark}")


def _agreement(found: dict[str, Any]) -> tuple[str, ...]:
    shares = (found.get(key) for key in ("top1_agreement", "routing_exact", "routing_overlap"))
    return (f"{1000 * found['kl']:.3f}", *("-" if share is None else f"{share:.1%}" for share in shares))


def show_tasks(tasks: dict[str, Any]) -> None:
    if not tasks:
        return
    scores = table("task", "metric", "items", "score", "reference", "difference, paired")
    for name, task in tasks.items():
        for metric, found in task["metrics"].items():
            cells = ["-", "-"]
            if "reference" in found:
                cells = [f"{found['reference']:.4f}", _around(found["difference"], found["difference_interval"])]
            row(scores, name, metric, task["items"], _around(found["score"], found["interval"]), *cells)
    show(scores)
    say("±: half of a 95% confidence interval", style="dim")


def _around(value: float, ends: list[float] | None) -> str:
    return f"{value:.4f}" if ends is None else f"{value:.4f} ± {(ends[1] - ends[0]) / 2:.4f}"


def show_comparison(result: dict[str, Any]) -> None:
    from moebit.report.compare import labels, mean_of

    names = labels([model["model"] for model in result["models"]])
    scores = table("output", "made by", "size", "bits/ parameter", "KL x 1000", "same experts")
    for column in scores.columns[:2]:
        column.overflow = "fold"
    for name, model in zip(names, result["models"], strict=True):
        kl, same = mean_of(model, "kl"), mean_of(model, "routing_exact")
        cells = ("-" if kl is None else f"{1000 * kl:.3f}", "-" if same is None else f"{same:.1%}")
        row(scores, name, model["made_by"], size(model["size_bytes"]), f"{model['bits_per_parameter']:.2f}", *cells)
    show(scores)
    for name, model in zip(names, result["models"], strict=True):
        if model["refused"]:
            say(warning(f"{name} is not scored"), f": {model['refused']}")
