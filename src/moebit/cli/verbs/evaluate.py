"""`moebit evaluate` and `moebit compare`: how good a model is, by itself and beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.options import (
    JsonOption,
    LimitOption,
    MaxTokensOption,
    MemoryOption,
    ModelArgument,
    TaskDataOption,
    TasksOption,
    TextOption,
    WindowOption,
    names,
)
from moebit.cli.screens.evaluation import show_comparison, show_evaluation, show_tasks
from moebit.cli.terminal import progress_bars, say, write_json
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = (
    "moebit evaluate olmoe-w3 --against reference/olmoe --text wiki=reference/text/wiki.eval.txt",
    "moebit evaluate olmoe-w3 --text reference/text/c.eval.txt --max-tokens 20000 --json result.json",
)
COMPARE_EXAMPLES = (
    "moebit compare reference/olmoe olmoe-w3 olmoe-w4 --text wiki.txt -o compared.html",
    "moebit compare MODEL OURS THEIRS --text a.txt --text b.txt --max-tokens 20000 -o compared.html --json compared.json",
)


def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="The full-precision model: adds KL and routing agreement.")
    ] = None,
    text: TextOption = None,
    window: WindowOption = 512,
    max_tokens: MaxTokensOption = None,
    memory: MemoryOption = DEFAULT_MEMORY,
    device: Annotated[str, typer.Option(help="Where texts run through the models: cpu, cuda or cuda:N.")] = "cpu",
    tasks: TasksOption = None,
    task_data: TaskDataOption = None,
    limit: LimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure perplexity on texts and, against a reference, KL divergence and routing agreement."""
    import moebit

    with progress_bars() as progress:
        result = moebit.evaluate(
            model, against=against, text=text or [], window=window, max_tokens=max_tokens, memory=memory, device=device, tasks=names(tasks),
            task_data=task_data, limit=limit, progress=progress,
        )  # fmt: skip
    if not write_json(json_file, result):
        show_evaluation(result)
        show_tasks(result.get("tasks", {}))


def compare(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The full-precision model.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Its quantized outputs, moebit's or other libraries'.")],
    page: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page to write.")],
    text: TextOption = None,
    window: WindowOption = 512,
    max_tokens: MaxTokensOption = None,
    memory: MemoryOption = DEFAULT_MEMORY,
    tasks: TasksOption = None,
    task_data: TaskDataOption = None,
    limit: LimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show several outputs of one model side by side: size against quality. What did not load as it should is named and not scored."""
    import moebit

    with progress_bars() as progress:
        result = moebit.compare(
            reference, models, page, text=text or [], window=window, max_tokens=max_tokens, memory=memory, tasks=names(tasks),
            task_data=task_data, limit=limit, progress=progress,
        )  # fmt: skip
    if not write_json(json_file, result):
        show_comparison(result)
        say("written: ", page)
