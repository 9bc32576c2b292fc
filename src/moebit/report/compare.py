"""`compare`: several outputs of one model side by side, moebit's or others', as a table and as size against quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moebit import words
from moebit.calibration.text import Texts
from moebit.errors import BadInputError
from moebit.evaluate.judging import Judgement, judge
from moebit.evaluate.streaming import Progress, evaluate
from moebit.evaluate.tasks import check_tasks, run_tasks
from moebit.formats.gguf.locate import gguf_file
from moebit.formats.opening import open_checkpoint
from moebit.memory import DEFAULT_MEMORY, Memory
from moebit.report.page import render, write_page
from moebit.report.plots import Figure
from moebit.report.svg import KINDS, SHAPES, Axis, Series, mark, points


def compare(
    reference: str | Path,
    models: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    text: Texts = (),
    window: int = 512,
    max_tokens: int | None = None,
    memory: Memory = DEFAULT_MEMORY,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge several outputs of one model on the same texts.

    Args:
        reference: the original. models: outputs of moebit or of other libraries (evaluate/judging.py).
        output: where to write the page; none is written without it.
        text, window, max_tokens, memory, tasks, task_data, limit: as for `evaluate`; text is needed.

    Returns:
        {"reference": {"model", "size_bytes", "texts"}, "models": [{"model", "made_by", "size_bytes", "bits_per_parameter", "average_bits",
        "refused", "remarks", "texts", "tasks"}]}: of a refused model there are no numbers but its size.

    Raises:
        BadInputError: nothing to compare, no text, a page that cannot be written.
    """
    if not models:
        raise BadInputError("give at least one MODEL besides the reference")
    if not text:
        raise BadInputError("give at least one --text FILE to compare on")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise BadInputError(f"-o {output}: no such directory")
    if tasks:
        check_tasks(tasks, task_data, limit)
    original = open_checkpoint(reference)
    parameters = sum(p.numel() for p in original.model.parameters())
    whole = evaluate(reference, text=text, window=window, max_tokens=max_tokens, memory=memory, progress=progress)
    judged = []
    for number, model in enumerate(models):
        if progress:
            progress("models", number, len(models))
        judged.append(judge(model, reference, text, window=window, max_tokens=max_tokens, memory=memory, progress=progress))
        if tasks and gguf_file(model) is not None:
            judged[-1].remarks.append("no tasks: they run in transformers, and a GGUF file runs in llama.cpp")
        elif tasks and judged[-1].refused is None:
            judged[-1].tasks = run_tasks(model, tasks, against=reference, data=task_data, limit=limit)
    if progress:
        progress("models", len(models), len(models))
    result = {
        "reference": {"model": str(reference), "size_bytes": original.size_bytes, "texts": whole["texts"]},
        "models": [{**asdict(one), "bits_per_parameter": 8 * one.size_bytes / parameters} for one in judged],
    }
    if output is not None:
        write_page(Path(output), compare_page(result))
    return result


def compare_page(result: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    names = labels([row["model"] for row in result["models"]])
    scored = [(name, row) for name, row in zip(names, result["models"], strict=True) if not row["refused"]]
    refused = [(name, row) for name, row in zip(names, result["models"], strict=True) if row["refused"]]
    return render(
        "compare.html",
        title=f"{Path(result['reference']['model']).name}: outputs compared",
        reference=result["reference"],
        texts=list(result["reference"]["texts"]),
        scored=[(name, row, mean_of(row, "kl"), mean_of(row, "routing_exact")) for name, row in scored],
        refused=refused,
        tasks=task_rows(scored),
        figures=_figures(scored, result["reference"]["size_bytes"]),
    )


def task_rows(scored: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """(output, task, metric, items, original's score, score, difference with its interval) of every metric."""
    rows: list[tuple[str, ...]] = []
    for name, row in scored:
        for task, found in row.get("tasks", {}).items():
            for metric, m in found["metrics"].items():
                ends = m["difference_interval"]
                around = f" ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else ""
                numbers = (f"{m['reference']:.3f}", f"{m['score']:.3f}", f"{m['difference']:+.3f}{around}")
                rows.append((name, task, metric, str(found["items"]), *numbers))
    return rows


def labels(models: Sequence[str]) -> list[str]:
    """Names to tell models by: the last part of the path, with as many in front of it as are needed."""
    parts = [Path(model).parts for model in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(models, 1)]


def mean_of(row: Mapping[str, Any], key: str) -> float | None:
    """Mean over the texts that have it."""
    values = [text[key] for text in row["texts"].values() if text.get(key) is not None]
    return statistics.fmean(values) if values else None


def _figures(scored: Sequence[tuple[str, Mapping[str, Any]]], whole: int) -> list[Figure]:
    """Size against quality: mean over the texts, then each text."""
    texts = list(dict.fromkeys(text for _, row in scored for text in row["texts"]))
    chosen = [("Size against distance from the original", texts), *((f"On {name}", [name]) for name in texts if len(texts) > 1)]
    unit, name_of_unit = (1e9, "GB") if whole >= 1e10 else (1e6, "MB")
    found = []
    for title, names in chosen:
        series, shapes = [], []
        for number, (name, row) in enumerate(scored):
            kl = [row["texts"][text]["kl"] for text in names if text in row["texts"]]
            if kl and math.isfinite(statistics.fmean(kl)) and statistics.fmean(kl) > 0:
                series.append(Series(name, [(row["size_bytes"] / unit, 1000 * statistics.fmean(kl))], number % KINDS))
                shapes.append(list(SHAPES)[(number + number // KINDS) % len(SHAPES)])  # no two of 36 outputs look alike
        if series:
            svg = points(Axis(f"size on disk, {name_of_unit}"), Axis("KL × 1000, nats per token", log=True), series, shapes)
            legend = [(one.kind, mark(one.kind, shape), one.name) for one, shape in zip(series, shapes, strict=True)]
            note = f"Lower and further left is better; logarithmic. The original has {words.size(whole)}." if names == texts else ""
            found.append(Figure(title, svg, legend, note))
    return found


__all__ = ["Judgement", "compare", "compare_page"]
