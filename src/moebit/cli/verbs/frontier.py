"""`moebit frontier`: predicted loss against size, for every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.options import (
    GgufPreOption,
    LengthOption,
    LlamaOption,
    MemoryOption,
    ModelArgument,
    SamplesOption,
    SettingsOption,
    TextOption,
    WindowSeedOption,
    overrides,
)
from moebit.cli.screens.frontier import show_frontier
from moebit.cli.terminal import progress_bars
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = (
    "moebit frontier MODEL -o frontier.html --text chat.jsonl",
    "moebit frontier MODEL -o frontier.html --text chat.jsonl --engine llama.cpp --outputs OUT1 --outputs OUT2",
)


def frontier(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="Where the page goes.")],
    text: TextOption = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="transformers, vllm or llama.cpp; repeat for several. Default: all of them.")
    ] = None,
    outputs: Annotated[
        list[Path] | None, typer.Option("--outputs", metavar="OUT", help="A finished output of this model to measure; repeat for several.")
    ] = None,
    profile_dir: Annotated[
        Path | None, typer.Option("--profile", metavar="PROFILE", help="What `moebit profile` wrote, instead of profiling the texts.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Preset or YAML file (default: the best one for the format).")] = None,
    settings: SettingsOption = None,
    llama_cpp: LlamaOption = None,
    gguf_pre: GgufPreOption = None,
    samples: SamplesOption = 32,
    length: LengthOption = 512,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: WindowSeedOption = 0,
) -> None:
    """Show what every size of a model would cost, for every engine, on one page."""
    changes = overrides(settings)
    import moebit

    with progress_bars() as progress:
        found = moebit.frontier(
            model, output, text=text or [], engines=engine or (), outputs=outputs or (), profile=profile_dir, recipe=recipe,
            overrides=changes, llama_cpp=llama_cpp, gguf_pre=gguf_pre, samples=samples, length=length, window=length, memory=memory,
            seed=seed, progress=progress,
        )  # fmt: skip
    show_frontier(found)
