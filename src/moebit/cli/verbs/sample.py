"""`moebit sample`: calibration text that a model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.options import LARGEST_SEED, JsonOption, MemoryOption, ModelArgument, ResumeOption, finite
from moebit.cli.screens.sample import show_sample
from moebit.cli.terminal import progress_bars, write_json
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = (
    "moebit sample reference/olmoe -o sample.jsonl --sequences 64 --length 256",
    "moebit sample MODEL -o sample.jsonl --kind ebss --scope sequence --repetition-penalty 1 --no-repeat-ngram 0  # the paper's",
    "moebit quantize MODEL -o OUT --text sample.jsonl",
)


def sample(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.jsonl", help="Calibration text to write.")],
    kind: Annotated[str, typer.Option(help="ebss (balanced beam), self (plain) or self-balanced (the most even of many).")] = "ebss",
    sequences: Annotated[int, typer.Option(help="How many.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    width: Annotated[int, typer.Option(help="ebss: candidates of each.")] = 4,
    temperature: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="ebss: weighs likelihood (high) against balance (low); 1.2, or by the model's shape if sampled. Else: 1.",
        ),
    ] = None,
    scope: Annotated[str, typer.Option(help="ebss: balance of the whole set, or of each sequence by itself (the paper).")] = "set",
    extend: Annotated[
        str | None,
        typer.Option(help="ebss: look at sampled next tokens, or at the likeliest (the paper; default with --temperature or its scope)."),
    ] = None,
    oversample: Annotated[int, typer.Option(help="self-balanced: times as many are written as are kept.")] = 3,
    repetition_penalty: Annotated[
        float | None, typer.Option(callback=finite, help="1 for none (default: 1.12 with likeliest tokens, else 1).")
    ] = None,
    no_repeat_ngram: Annotated[
        int | None, typer.Option(help="Write no n-gram of so many tokens twice (default: 4 with likeliest tokens, else 0)")
    ] = None,
    group: Annotated[int, typer.Option(help="Sequences that advance together; 0: as many as the memory holds.")] = 0,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the first tokens and the draws.")] = 0,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE, or an interrupted run.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Let a model write its own calibration text."""
    import moebit

    with progress_bars() as progress:
        result = moebit.sample(
            model, output, kind=kind, sequences=sequences, length=length, width=width, temperature=temperature, scope=scope,
            oversample=oversample, repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram, extend=extend, group=group,
            memory=memory, seed=seed, resume=resume, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if not write_json(json_file, result):
        show_sample(output, result)
