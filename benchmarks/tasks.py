"""Task scores of a reference model and its packed outputs on identical items, as benchmarks/results/tasks.md.

    pip install 'moebit[eval]'
    python benchmarks/tasks.py --data DIR

DIR has the items as docs/evaluation.md lists them; nothing is fetched. The reference models are far too small for these tasks: what can be
seen is that packed outputs run in the harness, and how the paired difference tells a change from the noise of the items.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, facts

import moebit

RESULTS = ROOT / "benchmarks" / "results" / "tasks.md"
TEXTS = ("wiki", "novels", "python", "speeches")
# Task -> (metric shown, share that guessing gets right).
TASKS = {
    "arc_easy": ("acc", "25%"), "arc_challenge": ("acc", "25%"), "piqa": ("acc", "50%"), "hellaswag": ("acc", "25%"),
    "winogrande": ("acc", "50%"), "openbookqa": ("acc", "25%"), "boolq": ("acc", "50%"), "rte": ("acc", "50%"), "mathqa": ("acc", "20%"),
    "lambada_openai": ("log_likelihood", "—"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of items")
    parser.add_argument("--model", default="reference/olmoe")
    parser.add_argument("--recipes", nargs="+", default=["gptq-w4", "gptq-w2"])
    parser.add_argument("--limit", type=int, default=50, help="items of a task, the first ones")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in options.recipes:
            out = Path(scratch) / recipe
            texts = {name: ROOT / "reference" / "text" / f"{name}.calib.txt" for name in TEXTS}
            moebit.quantize(ROOT / options.model, out, recipe=recipe, text=texts)
            found = moebit.evaluate(out, against=ROOT / options.model, tasks=list(TASKS), task_data=options.data, limit=options.limit)
            results[recipe] = found["tasks"]
            print(recipe, "done", flush=True)
    page = written(results, options)
    RESULTS.write_text(page, encoding="utf-8")
    print(page)


def shown(value: float, metric: str, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if metric == "acc" else f"{value:{sign}.3f}"


def cells(row: dict[str, Any], metric: str) -> list[str]:
    """A quantized score, and its paired difference to full precision with the interval."""
    low, high = row["difference_interval"]
    return [shown(row["score"], metric), f"{shown(row['difference'], metric, '+')} [{shown(low, metric, '+')}, {shown(high, metric, '+')}]"]


def written(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    typed = ["--data", "DIR", "--model", options.model, "--recipes", *options.recipes, "--limit", str(options.limit)]
    head = ["task", "items", "guessing", "full precision", *(part for recipe in results for part in (recipe, "difference"))]
    lines = [f"| {' | '.join(head)} |", f"| --- | {' | '.join('---:' for _ in head[1:])} |"]
    for task, (metric, guess) in TASKS.items():
        rows = [found[task] for found in results.values()]
        full = {shown(row["metrics"][metric]["reference"], metric) for row in rows}
        assert len(full) == 1, f"{task}: full precision did not score the same twice: {full}"
        parts = [part for row in rows for part in cells(row["metrics"][metric], metric)]
        lines.append(f"| {' | '.join([task, str(rows[0]['items']), guess, *full, *parts])} |")
    return "\n".join([
        "# Tasks",
        "",
        f"{options.model} in full precision and packed, on identical items in lm-evaluation-harness {version('lm-eval')}, zero-shot: the",
        f"first {options.limit} items of every task. Share of right answers (`acc`); for lambada_openai the mean log-likelihood of the",
        f"last word. GPTQ is calibrated on {', '.join(TEXTS)}. A difference is to full precision, item by item, with the 95%",
        "confidence interval of its mean.",
        "",
        *lines,
        "",
        "The model is small and was trained on little text: its answers are near guessing, and a table like this says nothing about",
        "recipes. An interval that holds 0 means that this many items cannot tell the two apart; KL on text can, on the same model and in",
        "less time ([quality](quality.md)). One of no width means that no answer of these items changed, not that none ever would.",
        "",
        facts(torch.get_num_threads(), typed),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
