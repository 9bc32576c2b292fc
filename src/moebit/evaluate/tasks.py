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
from pathlib import Path
from typing import Any

import yaml

from moebit.calibration.text import load_tokenizer
from moebit.errors import BadInputError
from moebit.evaluate import task_data
from moebit.model.checkpoint import load_config, resolve

CONFIDENCE = 1.959964  # standard normal quantile of a two-sided 95% interval
BATCH = 8
LOCAL = "_local"  # behind the name of a task whose items come from files
ONE_SPLIT = {"training_split": None, "validation_split": None, "fewshot_split": None, "test_split": "test", "num_fewshot": 0}


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
        "difference_interval". Intervals are of 95%, from the items' standard deviation.

    Raises:
        BadInputError: no harness, an unknown task, local files that are missing or no items, a model that does not load.
    """
    harness = _harness()
    check_tasks(tasks, data, limit)
    with tempfile.TemporaryDirectory(prefix="tasks-") as scratch:
        manager = _local(tasks, Path(data), Path(scratch), limit) if data is not None else None
        names = [f"{task}{LOCAL}" for task in tasks] if manager else list(tasks)
        mine = _answers(harness, model, names, manager, limit)
        theirs = _answers(harness, against, names, manager, limit) if against is not None else None
    return {task.removesuffix(LOCAL): _row(task, rows, theirs[task] if theirs is not None else None) for task, rows in mine.items()}


def check_tasks(tasks: Sequence[str], data: str | Path | None, limit: int | None = None) -> None:
    """Refuse what cannot be run, before any model is loaded.

    Raises:
        BadInputError: see `run_tasks`.
    """
    _harness()
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


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise BadInputError("--tasks needs lm-evaluation-harness: pip install 'moebit[eval]'") from error
    return lm_eval


def _local(tasks: Sequence[str], data: Path, scratch: Path, limit: int | None) -> Any:
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


def _answers(
    harness: Any, model: str | Path, tasks: Sequence[str], manager: Any | None, limit: int | None
) -> dict[str, list[dict[str, Any]]]:
    """Task -> what the harness noted of each item, in order."""
    from lm_eval.models.huggingface import HFLM

    directory = resolve(model)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise BadInputError(f"{model}: no tokenizer files here, so that tasks cannot be read; copy the model's tokenizer to it")
    loaded = HFLM(pretrained=_load(directory), tokenizer=tokenizer, batch_size=BATCH)
    result = harness.simple_evaluate(
        model=loaded, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    del loaded
    gc.collect()  # modules of transformers refer to each other in circles
    return {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in result["samples"].items()}


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    load_config(directory)  # says what is wrong with it
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise BadInputError(f"{directory}: transformers does not load it ({str(error).splitlines()[0]})") from error


def _row(task: str, mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    if theirs is not None and [row["doc_hash"] for row in mine] != [row["doc_hash"] for row in theirs]:
        raise BadInputError(f"--tasks {task}: the two models were not asked the same items")
    names = [name for name in mine[0]["metrics"] if isinstance(mine[0][name], int | float)]
    metrics = {}
    for name in names:
        scores = [float(row[name]) for row in mine]
        metrics[name] = dict(zip(("score", "interval"), interval(scores), strict=True))
        if theirs is not None:
            others = [float(row[name]) for row in theirs]
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
