"""`moebit profile`, `allocate`, `drift` and `adapt`: how experts are used, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moebit.cli.options import (
    JsonOption,
    LengthOption,
    MemoryOption,
    ModelArgument,
    SamplesOption,
    SettingsOption,
    TextOption,
    WindowSeedOption,
    check_recipe,
    finite,
    numbers,
    overrides,
)
from moebit.cli.screens.profiling import show_adaptation, show_allocation, show_drift, show_profile
from moebit.cli.terminal import bold, progress_bars, say, write_json
from moebit.memory import DEFAULT_MEMORY

PROFILE_EXAMPLES = (
    "moebit profile reference/olmoe -o olmoe.profile --text wiki=reference/text/wiki.calib.txt "
    "--text python=reference/text/python.calib.txt",
    "moebit profile reference/olmoe -o olmoe.profile --text c=reference/text/c.calib.txt   # adds a set",
)
ALLOCATE_EXAMPLES = (
    "moebit allocate olmoe.profile -o plan.json --target-bits 3.125 --method knapsack --granularity projection",
    "moebit quantize reference/olmoe -o olmoe-3 --recipe gptq-w3 --plan plan.json --text reference/text/wiki.calib.txt",
)
ADAPT_EXAMPLES = (
    "moebit adapt olmoe-3 --text c=reference/text/c.calib.txt -o olmoe-3-c",
    "moebit adapt olmoe-3 --text c=reference/text/c.calib.txt --in-place",
    "moebit adapt olmoe-3 --undo",
)
DRIFT_EXAMPLES = ("moebit drift olmoe-3 --text c=reference/text/c.calib.txt --text wiki=reference/text/wiki.eval.txt",)


def profile(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PROFILE", help="Directory to make, or to add data sets to.")],
    text: TextOption = None,
    recipe: Annotated[str | None, typer.Option(help="Whose grid and scope to measure with (default: gptq-w4).")] = None,
    settings: SettingsOption = None,
    samples: SamplesOption = 32,
    length: LengthOption = 512,
    widths: Annotated[str, typer.Option(help="Candidate widths.")] = "2,3,4,6,8",
    solver: Annotated[str, typer.Option(help="What rounds where errors are measured: rtn or gptq.")] = "rtn",
    errors: Annotated[bool, typer.Option("--errors/--no-errors", help="Measure errors (knapsack needs them).")] = True,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw heat maps there.")] = None,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: WindowSeedOption = 0,
) -> None:
    """Measure how a model's experts are used on data sets, what they bring, and what rounding them would cost."""
    changes, candidates = overrides(settings), numbers("--widths", widths)
    check_recipe(recipe, changes)
    import moebit

    with progress_bars() as progress:
        found = moebit.profile(
            model, output, text=text or [], recipe=recipe, overrides=changes, samples=samples, length=length, widths=candidates,
            solver=solver, errors=errors, memory=memory, seed=seed, progress=progress,
        )  # fmt: skip
    show_profile(found)
    if plots is not None:
        _plot(found, plots, None)


def allocate(
    profile_dir: Annotated[Path, typer.Argument(metavar="PROFILE", help="What `moebit profile` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN.json", help="The plan to write.")],
    target_bits: Annotated[float, typer.Option(callback=finite, help="Average bits on disk, scales included, at most.")],
    method: Annotated[str, typer.Option(help="fuzzy, knapsack, frequency or uniform.")] = "fuzzy",
    ladder: Annotated[str, typer.Option(help="Widths to choose from.")] = "2,3,4,6,8",
    granularity: Annotated[
        str | None, typer.Option(help="What has one width: expert, projection or layer (default: expert; layer for vllm).")
    ] = None,
    engine: Annotated[str, typer.Option(help="any, or vllm: only what it serves.")] = "any",
    significance: Annotated[str, typer.Option(help="Over data sets, for fuzzy: mean or max.")] = "mean",
    linear_bits: Annotated[
        int | None, typer.Option(help="Width of the linears outside of the experts, where the method leaves them alone.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw heat maps there, bits too.")] = None,
) -> None:
    """Choose a width for everything from a profile: a plan for `moebit quantize --plan`, which a person can edit."""
    rungs = numbers("--ladder", ladder)
    import moebit

    result = moebit.allocate(
        profile_dir, output, target_bits=target_bits, method=method, ladder=rungs, granularity=granularity, engine=engine,
        significance=significance, linear_bits=linear_bits,
    )  # fmt: skip
    show_allocation(result, output)
    if plots is not None:
        _plot(profile_dir, plots, result.plan)


def adapt(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A native output made with switching.share.")],
    text: TextOption = None,
    to: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT2", help="Write the adapted output there.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Adapt OUT itself.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the channels at 16 bits instead of rounding them.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take an adaptation of OUT back.")] = False,
    samples: SamplesOption = 16,
    length: LengthOption = 512,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: WindowSeedOption = 0,
) -> None:
    """Switch channels of an output for other data: an overlay beside its bytes, which can be taken back."""
    import moebit

    with progress_bars() as progress:
        result = moebit.adapt(
            output, text=text or [], to=to, in_place=in_place, keep=keep, undo=undo, samples=samples, length=length, memory=memory,
            seed=seed, progress=progress,
        )  # fmt: skip
    if undo:
        say(bold(output), ": as it was")
    else:
        show_adaptation(output, result)


def drift(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A native output made with allocation or switching.")],
    text: TextOption = None,
    samples: SamplesOption = 16,
    length: LengthOption = 512,
    memory: MemoryOption = DEFAULT_MEMORY,
    seed: WindowSeedOption = 0,
    json_file: JsonOption = None,
) -> None:
    """Measure how far the use of experts on texts is from the data that an output was made for."""
    import moebit

    with progress_bars() as progress:
        result = moebit.drift(output, text=text or [], samples=samples, length=length, memory=memory, seed=seed, progress=progress)
    if not write_json(json_file, result):
        show_drift(result)


def _plot(found: Any, directory: Path, plan: Any) -> None:
    import moebit

    files = moebit.heatmaps(found, directory, widths=plan.experts if plan else None)
    say(f"{len(files)} heat maps in ", directory)
