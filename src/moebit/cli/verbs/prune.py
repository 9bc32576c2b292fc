"""`moebit prune`: a checkpoint with fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.options import LengthOption, MemoryOption, ModelArgument, ResumeOption, SamplesOption, TextOption, WindowSeedOption
from moebit.cli.screens.prune import show_pruned
from moebit.cli.terminal import progress_bars
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = (
    "moebit prune MODEL -o OUT --remove 0.25 --text chat.jsonl",
    "moebit prune MODEL -o OUT --remove 0.25 --by measured --text chat=chat.jsonl --text code=code.txt",
)


def prune(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Directory to make.")],
    remove: Annotated[float, typer.Option("--remove", help="Share of every layer's experts that goes, for example 0.25.")],
    by: Annotated[str, typer.Option("--by", help="What an expert is worth: reap, measured, frequency or random.")] = "reap",
    text: TextOption = None,
    samples: SamplesOption = 32,
    length: LengthOption = 512,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: WindowSeedOption = 0,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.")] = False,
) -> None:
    """Write a checkpoint without the experts that a text misses least."""
    import moebit

    with progress_bars() as progress:
        found = moebit.prune(
            model, output, remove=remove, by=by, text=text or [], samples=samples, length=length, memory=memory, seed=seed,
            resume=resume, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    show_pruned(found)
