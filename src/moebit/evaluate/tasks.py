"""Tasks, with EleutherAI's lm-evaluation-harness as the engine: its prompts and its scoring, on the model that transformers loads.

A reference answers identical items, and the difference is paired: item by item, so that what both find hard does not hide what changed.
"""

from __future__ import annotations

import difflib
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moebit.calibration.text import load_tokenizer
from moebit.errors import BadInputError, is_out_of_memory
from moebit.evaluate import task_data
from moebit.storage.checkpoint import resolve
from moebit.storage.config import load_config
from moebit.storage.documents import one_line

CONFIDENCE = 1.959964  # standard normal quantile of a two-sided 95% interval
BATCH = 8
LOCAL = "_local"  # behind the name of a task whose items come from files
ONE_SPLIT = {"training_split": None, "validation_split": None, "fewshot_split": None, "test_split": "test", "num_fewshot": 0}
AVERAGED = {"mean": "{}", "perplexity": "log_likelihood"}  # how the harness puts a metric's items together -> what their mean is called


@dataclass(frozen=True)
class Item:
    """What a model scored on one item: metric -> value; and what tells the item."""

    hash: str
    scores: dict[str, float]


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks, and a reference on the same items.

    Args:
        model, against: whatever transformers loads; one is in memory at a time.
        data: directory of local items (`task_data`); without it the harness fetches its data sets.
        limit: at most so many items of a task, the first ones.

    Returns:
        task -> {"items": n, "metrics": {NAME: {"score", "interval"}}}; with a reference also "reference", "difference" and its
        "difference_interval". Intervals are of 95%, from the items' standard deviation. A metric is a mean over items (`_items`).

    Raises:
        BadInputError: no harness, an unknown task, local files that are missing or no items, a model that does not load.
    """
    harness = find_harness()
    check_tasks(tasks, data, limit)
    with tempfile.TemporaryDirectory(prefix="tasks-") as scratch:
        manager = local_tasks(tasks, Path(data), Path(scratch), limit) if data is not None else None
        names = [f"{task}{LOCAL}" for task in tasks] if manager else list(tasks)
        mine = answers(harness, model, names, manager, limit)
        theirs = answers(harness, against, names, manager, limit) if against is not None else None
    return {task.removesuffix(LOCAL): _row(task, rows, theirs[task] if theirs is not None else None) for task, rows in mine.items()}


def check_tasks(tasks: Sequence[str], data: str | Path | None, limit: int | None = None) -> None:
    """Refuse what cannot be run, before any model is loaded.

    Raises:
        BadInputError: see `run_tasks`.
    """
    find_harness()
    from lm_eval.tasks import TaskManager

    if limit is not None and limit < 1:
        raise BadInputError(f"--limit {limit}: at least one item")
    if data is not None and not Path(data).is_dir():
        raise BadInputError(f"--task-data {data}: no such directory")
    known = TaskManager().all_tasks
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            raise BadInputError(f"--tasks {task}: the harness knows no such task" + (f"; did you mean {near[0]!r}?" if near else ""))
        if data is not None and task_data.documents(task, Path(data)) is None:
            raise BadInputError(f"--task-data {data}: nothing for {task} there; it would be {task_data.expected(task)}")


def find_harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise BadInputError("--tasks needs lm-evaluation-harness: pip install 'moebit[eval]'") from error
    return lm_eval


def local_tasks(tasks: Sequence[str], data: Path, scratch: Path, limit: int | None) -> Any:
    """A task manager that knows the harness's own tasks on local items, under names of their own."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for task in tasks:
        found, entry = task_data.documents(task, data), index[task]
        path = getattr(entry, "yaml_path", None)
        if found is None or path is None:
            raise BadInputError(f"--task-data {data}: {task} cannot be run on local items")
        file = scratch / f"{task}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in found[:limit]), encoding="utf-8")
        kwargs = {"data_files": {"test": str(file)}, "cache_dir": str(scratch / "cache")}
        own = {"include": str(path), "task": f"{task}{LOCAL}", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}
        (scratch / f"{task}.yaml").write_text(yaml.safe_dump({**own, "tag": [], **ONE_SPLIT}), encoding="utf-8")
    return TaskManager(include_path=str(scratch), include_defaults=False)


def answers(harness: Any, model: str | Path, tasks: Sequence[str], manager: Any | None, limit: int | None) -> dict[str, list[Item]]:
    """Task -> its items, in order."""
    from lm_eval.models.huggingface import HFLM

    directory = resolve(model)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise BadInputError(f"{model}: no tokenizer files here, so that tasks cannot be read; copy the model's tokenizer to it")
    loaded = HFLM(pretrained=_load(directory), tokenizer=tokenizer, batch_size=BATCH, trust_remote_code=False)
    result = harness.simple_evaluate(
        model=loaded, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    del loaded
    gc.collect()  # modules of transformers refer to each other in circles
    return {task: _items(task, rows, result["configs"][task]["metric_list"]) for task, rows in result["samples"].items()}


def _items(task: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[Item]:
    """What the harness noted of each item, one row per item and filter, as one `Item` each.

    Metrics that the harness averages over the items keep their names, with the filter's behind them where a task has several
    (`exact_match,strict-match`). A perplexity is exp(-mean) of the items' log-likelihoods: `log_likelihood` here. What else is no mean over
    items (an F1 over all of them) has no difference item by item, and is left out.

    Raises:
        BadInputError: nothing is left.
    """
    names = {str(metric["metric"]): AVERAGED.get(metric.get("aggregation", "mean"), "") for metric in metrics}
    several = len({row["filter"] for row in rows}) > 1
    items: dict[int, Item] = {}
    for row in rows:
        item = items.setdefault(row["doc_id"], Item(row["doc_hash"], {}))
        for metric in row["metrics"]:
            if (name := names.get(metric, "")) and isinstance(row[metric], int | float):
                item.scores[name.format(metric) + (f",{row['filter']}" if several else "")] = float(row[metric])
    if not any(item.scores for item in items.values()):
        raise BadInputError(f"--tasks {task.removesuffix(LOCAL)}: it has no metric that is a mean over its items")
    return [items[number] for number in sorted(items)]


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    load_config(directory)  # says what is wrong with it
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False).eval()
    except Exception as error:  # whatever a library raises about files that it does not understand
        if is_out_of_memory(error):
            raise
        raise BadInputError(f"{directory}: transformers does not load it ({one_line(error)})") from error


def _row(task: str, mine: Sequence[Item], theirs: Sequence[Item] | None) -> dict[str, Any]:
    if theirs is not None and [item.hash for item in mine] != [item.hash for item in theirs]:
        raise BadInputError(f"--tasks {task}: the two models were not asked the same items")
    metrics = {}
    for name in mine[0].scores:
        scores = [item.scores[name] for item in mine]
        metrics[name] = dict(zip(("score", "interval"), interval(scores), strict=True))
        if theirs is not None:
            others = [item.scores[name] for item in theirs]
            difference, ends = interval([a - b for a, b in zip(scores, others, strict=True)])
            metrics[name] |= {"reference": statistics.fmean(others), "difference": difference, "difference_interval": ends}
    return {"items": len(mine), "metrics": metrics}


def interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """(mean, [low, high] of its 95% confidence interval); no interval of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = CONFIDENCE * statistics.stdev(values) / math.sqrt(len(values))
    return mean, [mean - half, mean + half]
