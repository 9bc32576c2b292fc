"""`moebit imatrix`: what llama-quantize weighs its errors with, from any model that fits on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.options import (
    JsonOption,
    LengthOption,
    LlamaOption,
    MemoryOption,
    ModelArgument,
    SamplesOption,
    TextOption,
    WindowSeedOption,
)
from moebit.cli.screens.imatrix import show_imatrix
from moebit.cli.terminal import progress_bars, write_json
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = (
    "moebit imatrix reference/olmoe -o olmoe.imatrix.gguf --text reference/text/wiki.calib.txt --text reference/text/python.calib.txt",
    "llama-quantize --imatrix olmoe.imatrix.gguf olmoe-f16.gguf olmoe-q4_k_m.gguf q4_k_m",
)


def imatrix(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.gguf", help="File to write.")],
    text: TextOption = None,
    samples: SamplesOption = 64,
    length: LengthOption = 512,
    llama_cpp: LlamaOption = None,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: WindowSeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.gguf.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Write llama.cpp's importance matrix of a model, every expert covered."""
    import moebit

    with progress_bars() as progress:
        result = moebit.imatrix(
            model, output, text=text or [], samples=samples, length=length, llama_cpp=llama_cpp, memory=memory, seed=seed,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if not write_json(json_file, result.describe()):
        show_imatrix(result)
