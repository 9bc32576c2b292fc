"""`moebit quantize`: the main job."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from moebit.cli.options import (
    LARGEST_SEED,
    EngineOption,
    FormatOption,
    GgufPreOption,
    LinksOption,
    LlamaOption,
    MemoryOption,
    ModelArgument,
    ResumeOption,
    SettingsOption,
    ShardOption,
    TextOption,
    asked_size,
    check_recipe,
    finite,
    overrides,
    typed_command,
)
from moebit.cli.screens.plan import show_plan
from moebit.cli.screens.result import show_result
from moebit.cli.terminal import progress_bars
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = (
    "moebit quantize reference/olmoe -o olmoe-w3 --recipe gptq-w3 --text reference/text/wiki.calib.txt",
    "moebit quantize MODEL -o OUT --recipe rtn-w4 --set weights.group_size=64",
    "moebit quantize MODEL -o OUT --size 12GB --engine llama.cpp --text chat.jsonl",
    "moebit quantize MODEL -o OUT --recipe gptq-w4 --text calib.txt --resume",
)


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Directory to make.")],
    recipe: Annotated[str | None, typer.Option(help="Preset or YAML file (default: gptq-w4); `moebit recipes` lists the presets.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="SIZE", callback=asked_size, help="Find the best output of so many bytes for --engine, for example 12GB."
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="The same for an average of bits per quantized weight on disk.", callback=finite)
    ] = None,
    text: TextOption = None,
    settings: SettingsOption = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Bit widths per layer, expert and projection (see docs/format.md).")
    ] = None,
    profile_dir: Annotated[
        Path | None, typer.Option("--profile", metavar="PROFILE", help="What `moebit profile` wrote, for allocation and switching.")
    ] = None,
    output_format: FormatOption = None,
    llama_cpp: LlamaOption = None,
    gguf_pre: GgufPreOption = None,
    shard_size: ShardOption = None,
    engine: EngineOption = "any",
    device: Annotated[str, typer.Option(help="Where the model runs and matrices are solved: cpu, cuda or cuda:N.")] = "cpu",
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Chooses the calibration windows.")] = 0,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, then stop.")] = False,
    accept_unquantized: Annotated[
        bool, typer.Option("--accept-unquantized", help="Go on though more than 5% of the expert parameters stay in full precision.")
    ] = False,
    follow_links: LinksOption = False,
) -> None:
    """Quantize a checkpoint."""
    changes = overrides(settings)
    if size is None and bits is None:
        check_recipe(recipe, changes, output_format)
    import moebit
    from moebit.ranks import own_rank

    with nullcontext() if own_rank() else progress_bars() as progress:
        result: Any = moebit.quantize(
            model, output, recipe=recipe, text=text or [], overrides=changes, size=size, bits=bits, plan=plan_file, profile=profile_dir,
            format=output_format, llama_cpp=llama_cpp, gguf_pre=gguf_pre, shard_size=shard_size, engine=engine,
            device=device, memory=memory, seed=seed, resume=resume, overwrite=overwrite, dry_run=dry_run,
            accept_unquantized=accept_unquantized, follow_links=follow_links, progress=progress, command=typed_command(),
        )  # fmt: skip
    if own_rank():
        return  # the first rank tells what all have done
    if dry_run:
        show_plan(result.describe(), None)
    else:
        show_result(result, text_given=bool(text))
