"""Options that several verbs share, and how their texts are read. All of it is checked before torch is imported."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moebit.errors import BadInputError
from moebit.memory import asked_bytes, memory_bytes

LARGEST_SEED = 2**63 - 1


def numbers(option: str, text: str) -> list[int]:
    """`2,3,4` as integers.

    Raises:
        BadInputError: anything else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInputError(f"{option} {text}: expected widths with commas between them, like 2,3,4") from None


def names(text: str | None) -> list[str]:
    """`a,b` as ["a", "b"]."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def overrides(settings: list[str] | None) -> dict[str, Any]:
    """`--set` items as changes of a recipe."""
    from moebit.recipe import parse_override

    return dict(parse_override(item) for item in settings or [])


def check_recipe(recipe: str | None, changes: dict[str, Any], output_format: str | None = None) -> None:
    """Refuse a recipe that cannot be, before anything heavy is imported for it."""
    from moebit.recipe import load_recipe

    load_recipe(recipe, {**changes, **({"format": output_format} if output_format else {})})


def typed_command() -> str:
    """What was typed, so that it can be typed again; a resumed run is made again without --resume."""
    return shlex.join(["moebit", *(word for word in sys.argv[1:] if word != "--resume")])


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


def asked_size(size: str | None) -> str | None:
    """A size that an output is to have."""
    if size is not None:
        asked_bytes(size)
    return size


def _memory(size: str) -> str:
    memory_bytes(size)
    return size


def _shard_size(size: str | None) -> str | None:
    if size is not None:
        memory_bytes(size, "--shard-size")
    return size


def _texts(items: list[str] | None) -> list[str]:
    from moebit.calibration.named_texts import parse_texts

    parse_texts(items or [])
    return items or []


def _json_file(file: Path | None) -> Path | None:
    if file is not None and str(file) != "-" and not file.absolute().parent.is_dir():
        raise BadInputError(f"--json {file}: no such directory")
    return file


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory (safetensors) or hub id.")]
TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="[NAME=]FILE[:COLUMN]", help="Text, rows (JSON, CSV, Parquet) or a folder; repeat.", callback=_texts),
]
MemoryOption = Annotated[
    str, typer.Option("--memory", metavar="SIZE", callback=_memory, help="Memory that the work may take, for example 4GiB.")
]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one value of the recipe; repeat for several.")
]
LinksOption = Annotated[bool, typer.Option("--follow-links", help="Read files of the checkpoint that are links out of its folder, too.")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="native, compressed-tensors, gptq, awq, mlx, gguf or dense, instead of the recipe's.")
]
LlamaOption = Annotated[
    Path | None, typer.Option("--llama-cpp", metavar="DIR", help="A clone of llama.cpp, instead of the extra `gguf`'s converter.")
]
GgufPreOption = Annotated[
    str | None, typer.Option("--gguf-pre", metavar="NAME", help="The pre-tokenizer, where llama.cpp does not recognise the tokenizer.")
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", callback=_shard_size, help="Several GGUF files, none with more than that in tensors."),
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="What has to run the output: transformers, vllm, sglang, llama.cpp, mlx, gptqmodel or any.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON ('-' for standard output).", callback=_json_file)
]
TasksOption = Annotated[str | None, typer.Option("--tasks", metavar="NAME,NAME", help="Tasks of lm-evaluation-harness (moebit\\[eval]).")]
TaskDataOption = Annotated[
    Path | None, typer.Option("--task-data", metavar="DIR", help="Local items of the tasks (docs/evaluation.md); else they are fetched.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many items of each task.")]
WindowOption = Annotated[int, typer.Option("--window", help="Tokens per window; windows do not overlap.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Use at most so many tokens of each text.")]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Windows of every text.")]
LengthOption = Annotated[int, typer.Option("--length", min=1, help="Tokens of a window.")]
WindowSeedOption = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Chooses the windows.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
