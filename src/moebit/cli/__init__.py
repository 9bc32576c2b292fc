"""The command line: verbs, screens and exit codes. The only module that prints."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moebit.cli.interrupts import Interrupts
from moebit.errors import BadInputError, InterruptedWorkError, is_out_of_memory

SHOWN_FINDINGS = 30
DONE, INTERNAL_ERROR, BAD_INPUT, INTERRUPTED, CTRL_C = 0, 1, 2, 3, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Quantize Mixture-of-Experts language models after training.\n\nStart with [bold]moebit inspect MODEL[/bold].",
)
out, err = Console(), Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory (safetensors) or hub id.")]
TextOption = Annotated[
    list[str] | None, typer.Option("--text", metavar="[NAME=]FILE", help="Plain UTF-8 text or .jsonl; repeat for several.")
]
MemoryOption = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Memory that the work may take, for example 4GiB.")]
FormatOption = Annotated[str | None, typer.Option("--format", help="native, compressed-tensors or dense, instead of the recipe's.")]
EngineOption = Annotated[str, typer.Option("--engine", help="What has to run the output: transformers, vllm or any.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON ('-' for standard output).")]
LinksOption = Annotated[bool, typer.Option("--follow-links", help="Read files of the checkpoint that are links out of its folder, too.")]
TasksOption = Annotated[str | None, typer.Option("--tasks", metavar="NAME,NAME", help="Tasks of lm-evaluation-harness (moebit\\[eval]).")]
TaskDataOption = Annotated[
    Path | None, typer.Option("--task-data", metavar="DIR", help="Local items of the tasks (docs/evaluation.md); else they are fetched.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="At most so many items of each task.")]


def main() -> None:
    """Entry point: maps errors to exit codes (0 done, 1 internal error, 2 bad input, 3 interrupted and resumable, 130 Ctrl-C)."""
    try:
        code = app(standalone_mode=False)  # the option parser returns the code of an Exit, and of Ctrl-C, instead of raising
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        code = CTRL_C
    except BadInputError as error:
        err.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(BAD_INPUT)
    except InterruptedWorkError as error:
        err.print(f"[yellow]Interrupted:[/yellow] {escape(str(error))}", soft_wrap=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # usage errors of the option parser
            err.print(f"[red]Error:[/red] {escape(error.format_message())} (see moebit --help)")
            sys.exit(BAD_INPUT)
        if is_out_of_memory(error):
            said = (str(error).splitlines() or [type(error).__name__])[0]
            advice = "close other programs, or give a smaller --memory, and run the same command again"
            err.print(f"[yellow]Interrupted:[/yellow] memory ran out ({escape(said)}); {advice}", soft_wrap=True)
            sys.exit(INTERRUPTED)
        err.print_exception()
        err.print("[red]Internal error:[/red] this is a bug in moebit; please report it with the lines above.")
        sys.exit(INTERNAL_ERROR)
    if code == CTRL_C:
        what = {"quantize": "layers", "sample": "groups of sequences"}.get("".join(sys.argv[1:2]))
        kept = f" Finished {what} are kept; the same command with --resume goes on." if what else ""
        err.print(f"[yellow]Stopped.[/yellow]{kept}")
    sys.exit(code if isinstance(code, int) else DONE)


@app.command(epilog="Examples:\n\n  moebit inspect reference/olmoe\n\n  moebit inspect reference/olmoe --recipe gptq-w3 --json plan.json")
def inspect(
    model: ModelArgument,
    recipe: Annotated[str | None, typer.Option(help="Preset or YAML file: show what it would make of the model.")] = None,
    output_format: FormatOption = None,
    engine: EngineOption = "any",
    memory: MemoryOption = "4GiB",
    follow_links: LinksOption = False,
    json_file: JsonOption = None,
) -> None:
    """What a model is made of, and what a recipe would make of it. Reads headers only."""
    import moebit

    result = moebit.inspect(model, recipe, format=output_format, engine=engine, memory=parse_size(memory), follow_links=follow_links)
    if _write_json(json_file, result):
        return
    _show_structure(result)
    if "plan" in result:
        _show_plan(result["plan"], result["size_bytes"])


@app.command(
    epilog="Examples:\n\n  moebit quantize reference/olmoe -o olmoe-w3 --recipe gptq-w3 --text reference/text/wiki.calib.txt\n\n"
    "  moebit quantize MODEL -o OUT --recipe rtn-w4 --set weights.group_size=64\n\n"
    "  moebit quantize MODEL -o OUT --recipe gptq-w4 --text calib.txt --resume"
)
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Directory to make.")],
    recipe: Annotated[str | None, typer.Option(help="Preset or YAML file (default: gptq-w4); `moebit recipes` lists the presets.")] = None,
    text: TextOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one value of the recipe; repeat for several.")
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Bit widths per layer, expert and projection (see docs/format.md).")
    ] = None,
    profile_dir: Annotated[
        Path | None, typer.Option("--profile", metavar="PROFILE", help="What `moebit profile` wrote, for allocation and switching.")
    ] = None,
    output_format: FormatOption = None,
    engine: EngineOption = "any",
    device: Annotated[str, typer.Option(help="Where matrices are solved: cpu or cuda.")] = "cpu",
    memory: MemoryOption = "4GiB",
    seed: Annotated[int, typer.Option(help="Chooses the calibration windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, then stop.")] = False,
    accept_unquantized: Annotated[
        bool, typer.Option("--accept-unquantized", help="Go on though more than 5% of the expert parameters stay in full precision.")
    ] = False,
    follow_links: LinksOption = False,
) -> None:
    """Quantize a checkpoint."""
    import moebit
    from moebit.recipe import parse_override

    overrides = dict(parse_override(item) for item in settings or [])
    with _progress() as progress:
        result: Any = moebit.quantize(
            model, output, recipe=recipe, text=text or [], overrides=overrides, plan=plan_file, profile=profile_dir, format=output_format,
            engine=engine, device=device, memory=parse_size(memory), seed=seed, resume=resume, overwrite=overwrite, dry_run=dry_run,
            accept_unquantized=accept_unquantized, follow_links=follow_links, progress=progress, command=_command(),
        )  # fmt: skip
    if dry_run:
        _show_plan(result.describe(), None)
        return
    section = result.plan.recipe.calibration
    if text and section.kind != "text" and not section.text_share:
        out.print(f"calibrated on the given text; without --text this recipe samples its own ({section.kind})")
    _show_result(result)


@app.command(
    epilog="Examples:\n\n  moebit evaluate olmoe-w3 --against reference/olmoe --text wiki=reference/text/wiki.eval.txt\n\n"
    "  moebit evaluate olmoe-w3 --text reference/text/c.eval.txt --max-tokens 20000 --json result.json"
)
def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="The full-precision model: adds KL and routing agreement.")
    ] = None,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most so many tokens of each text.")] = None,
    memory: MemoryOption = "4GiB",
    tasks: TasksOption = None,
    task_data: TaskDataOption = None,
    limit: LimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Perplexity on texts and, against a reference, KL divergence and routing agreement."""
    import moebit

    if json_file is not None and str(json_file) != "-" and not json_file.absolute().parent.is_dir():
        raise BadInputError(f"--json {json_file}: no such directory")
    with _progress() as progress:
        result = moebit.evaluate(
            model, against=against, text=text or [], window=window, max_tokens=max_tokens, memory=parse_size(memory),
            tasks=_names(tasks), task_data=task_data, limit=limit, progress=progress,
        )  # fmt: skip
    if not _write_json(json_file, result):
        _show_evaluation(result)
        _show_tasks(result.get("tasks", {}))


@app.command(
    epilog='Examples:\n\n  moebit generate olmoe-w3 --prompt "The history of the"\n\n'
    '  moebit generate olmoe-w3 --prompt "def main(" --against reference/olmoe --max-new-tokens 40 --temperature 0.8 --seed 1'
)
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to go on from.")],
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="Another model: shows what it writes, and where they first differ.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Write at most so many tokens.")] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time (the default).")] = False,
    temperature: Annotated[float, typer.Option(help="Draw tokens at this temperature instead.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    path: Annotated[
        str, typer.Option(help="How packed weights are multiplied: auto, reference, dequantize, float, integer or triton.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the models run: cpu or cuda.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Continue a prompt: the text, the speed and the memory."""
    import moebit

    if greedy and temperature:
        raise BadInputError(f"--greedy and --temperature {temperature}: choose one")
    result = moebit.generate(
        model, prompt=prompt, against=against, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        path=path,  # type: ignore[arg-type] # checked there
        device=device,
    )  # fmt: skip
    if not _write_json(json_file, asdict(result)):
        _show_generation(prompt, result)


@app.command(epilog="Examples:\n\n  moebit recipes\n\n  moebit recipes gptq-w3 > my-recipe.yaml")
def recipes(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one as YAML.")] = None) -> None:
    """List the shipped recipes, or print one as YAML."""
    from moebit.recipe import load_recipe, presets

    known = presets()
    if name is not None:
        load_recipe(name)
        out.print(known[name] if name in known else Path(name).read_text(), end="", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("recipe", "bits", "group", "grid", "method", "what it is", box=None, pad_edge=False)
    for key, text in known.items():
        recipe = load_recipe(key)
        grid = "symmetric" if recipe.weights.symmetric else "asymmetric"
        summary = text.splitlines()[0].removeprefix("# ")
        table.add_row(
            key,
            f"{recipe.allocation.target_bits or recipe.weights.bits:g}",
            str(recipe.weights.group_size),
            grid,
            recipe.solver.method,
            summary,
        )
    out.print(table)


@app.command(
    epilog="Examples:\n\n  moebit sample reference/olmoe -o sample.jsonl --sequences 64 --length 256\n\n"
    "  moebit sample MODEL -o sample.jsonl --kind ebss --scope sequence --repetition-penalty 1 --no-repeat-ngram 0  # the paper's\n\n"
    "  moebit quantize MODEL -o OUT --text sample.jsonl"
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
        typer.Option(help="ebss: weighs likelihood (high) against balance (low); 1.2, or by the model's shape if sampled. Else: 1."),
    ] = None,
    scope: Annotated[str, typer.Option(help="ebss: balance of the whole set, or of each sequence by itself (the paper).")] = "set",
    extend: Annotated[
        str | None,
        typer.Option(help="ebss: look at sampled next tokens, or at the likeliest (the paper; default with --temperature or its scope)."),
    ] = None,
    oversample: Annotated[int, typer.Option(help="self-balanced: times as many are written as are kept.")] = 3,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 for none (default: 1.12 with likeliest tokens, else 1).")] = None,
    no_repeat_ngram: Annotated[
        int | None, typer.Option(help="Write no n-gram of so many tokens twice (default: 4 with likeliest tokens, else 0)")
    ] = None,
    group: Annotated[int, typer.Option(help="Sequences that advance together; 0: as many as the memory holds.")] = 0,
    memory: MemoryOption = "4GiB",
    seed: Annotated[int, typer.Option(help="Of the first tokens and the draws.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE, or an interrupted run.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Let a model write its own calibration text."""
    import moebit

    with _progress() as progress:
        result = moebit.sample(
            model, output, kind=kind, sequences=sequences, length=length, width=width, temperature=temperature, scope=scope,
            oversample=oversample, repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram, extend=extend, group=group,
            memory=parse_size(memory), seed=seed, resume=resume, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if not _write_json(json_file, result):
        _show_sample(output, result)


@app.command(epilog="Examples:\n\n  moebit verify olmoe-w3\n\n  moebit verify olmoe-w3 --json findings.json")
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="What `moebit quantize -o OUT` wrote, finished or not.")],
    json_file: JsonOption = None,
) -> None:
    """Check that an output is whole: every file, every tensor. Exit code 0 fine, 2 damaged, 3 unfinished."""
    import moebit

    with _progress() as progress:
        result = moebit.verify(output, progress=progress)
    if not _write_json(json_file, result):
        _show_verification(result)
    raise typer.Exit({"fine": DONE, "damaged": BAD_INPUT, "unfinished": INTERRUPTED}[result["state"]])


@app.command(
    epilog="Examples:\n\n  moebit profile reference/olmoe -o olmoe.profile --text wiki=reference/text/wiki.calib.txt "
    "--text python=reference/text/python.calib.txt\n\n"
    "  moebit profile reference/olmoe -o olmoe.profile --text c=reference/text/c.calib.txt   # adds a set"
)
def profile(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PROFILE", help="Directory to make, or to add data sets to.")],
    text: TextOption = None,
    recipe: Annotated[str | None, typer.Option(help="Whose grid and scope to measure with (default: gptq-w4).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one value of the recipe; repeat for several.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of every text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    widths: Annotated[str, typer.Option(help="Candidate widths.")] = "2,3,4,6,8",
    solver: Annotated[str, typer.Option(help="What rounds where errors are measured: rtn or gptq.")] = "rtn",
    errors: Annotated[bool, typer.Option("--errors/--no-errors", help="Measure errors (knapsack needs them).")] = True,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw heat maps there.")] = None,
    memory: MemoryOption = "4GiB",
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
) -> None:
    """How a model's experts are used on data sets, what they bring, and what rounding them would cost."""
    import moebit
    from moebit.recipe import parse_override

    overrides = dict(parse_override(item) for item in settings or [])
    with _progress() as progress:
        found = moebit.profile(
            model, output, text=text or [], recipe=recipe, overrides=overrides, samples=samples, length=length,
            widths=_numbers("--widths", widths), solver=solver, errors=errors, memory=parse_size(memory), seed=seed, progress=progress,
        )  # fmt: skip
    _show_profile(found)
    if plots is not None:
        _show_plots(found, plots, None)


@app.command(
    epilog="Examples:\n\n  moebit allocate olmoe.profile -o plan.json --target-bits 3.125 --method knapsack --granularity projection\n\n"
    "  moebit quantize reference/olmoe -o olmoe-3 --recipe gptq-w3 --plan plan.json --text reference/text/wiki.calib.txt"
)
def allocate(
    profile_dir: Annotated[Path, typer.Argument(metavar="PROFILE", help="What `moebit profile` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN.json", help="The plan to write.")],
    target_bits: Annotated[float, typer.Option(help="Average bits on disk, scales included, at most.")],
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
    import moebit

    result = moebit.allocate(
        profile_dir, output, target_bits=target_bits, method=method, ladder=_numbers("--ladder", ladder), granularity=granularity,
        engine=engine, significance=significance, linear_bits=linear_bits,
    )  # fmt: skip
    _show_allocation(result, output)
    if plots is not None:
        _show_plots(profile_dir, plots, result.plan)


@app.command(
    epilog="Examples:\n\n  moebit adapt olmoe-3 --text c=reference/text/c.calib.txt -o olmoe-3-c\n\n"
    "  moebit adapt olmoe-3 --text c=reference/text/c.calib.txt --in-place\n\n  moebit adapt olmoe-3 --undo"
)
def adapt(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A native output made with switching.share.")],
    text: TextOption = None,
    to: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT2", help="Write the adapted output there.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Adapt OUT itself.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the channels at 16 bits instead of rounding them.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take an adaptation of OUT back.")] = False,
    samples: Annotated[int, typer.Option(help="Windows of every text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    memory: MemoryOption = "4GiB",
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
) -> None:
    """Switch channels of an output for other data: an overlay beside its bytes, which can be taken back."""
    import moebit

    with _progress() as progress:
        result = moebit.adapt(
            output, text=text or [], to=to, in_place=in_place, keep=keep, undo=undo, samples=samples, length=length,
            memory=parse_size(memory), seed=seed, progress=progress,
        )  # fmt: skip
    if undo:
        out.print(f"[bold]{escape(str(output))}[/bold]: as it was")
        return
    if not result.channels:
        out.print(f"[bold]{escape(str(output))}[/bold]: no expert needs more bits for this than it has; nothing was written")
        return
    experts = sum(len(raised) for raised in result.raised.values())
    out.print(
        f"[bold]{escape(str(result.path))}[/bold]: {result.channels} channels of {experts} experts in an overlay of "
        f"{size(result.bytes_written)}; {result.seconds:.1f} s, {result.noted:.1f} s of them looking at the texts"
    )


@app.command(epilog="Examples:\n\n  moebit drift olmoe-3 --text c=reference/text/c.calib.txt --text wiki=reference/text/wiki.eval.txt")
def drift(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A native output made with allocation or switching.")],
    text: TextOption = None,
    samples: Annotated[int, typer.Option(help="Windows of every text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    memory: MemoryOption = "4GiB",
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """How far the use of experts on texts is from the data that an output was made for."""
    import moebit

    with _progress() as progress:
        result = moebit.drift(
            output, text=text or [], samples=samples, length=length, memory=parse_size(memory), seed=seed, progress=progress
        )
    if not _write_json(json_file, result):
        _show_drift(result)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInputError(f"{option} {text}: expected widths with commas between them, like 2,3,4") from None


@app.command(
    epilog="Examples:\n\n  moebit report olmoe-w3\n\n  moebit evaluate olmoe-w3 --against reference/olmoe --text wiki.txt --json e.json\n\n"
    "  moebit report olmoe-w3 --evaluation e.json -o olmoe-w3.html"
)
def report(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="What `moebit quantize -o OUT` wrote.")],
    page: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.html", help="Where it goes (default: OUT/report.html).")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--evaluation", metavar="FILE", help="Result of `moebit evaluate OUT --json`, to be shown; repeats."),
    ] = None,
) -> None:
    """Write an output's report.html again, with its evaluation where one is given."""
    import moebit

    out.print(f"written: {escape(str(moebit.report(output, page, evaluation=evaluation or [])))}", soft_wrap=True)


@app.command(
    epilog="Examples:\n\n  moebit compare reference/olmoe olmoe-w3 olmoe-w4 --text wiki.txt -o compared.html\n\n"
    "  moebit compare MODEL OURS THEIRS --text a.txt --text b.txt --max-tokens 20000 -o compared.html --json compared.json"
)
def compare(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The full-precision model.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Its quantized outputs, moebit's or other libraries'.")],
    page: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page to write.")],
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most so many tokens of each text.")] = None,
    memory: MemoryOption = "4GiB",
    tasks: TasksOption = None,
    task_data: TaskDataOption = None,
    limit: LimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Several outputs of one model side by side: size against quality. What did not load as it should is named and not scored."""
    import moebit

    with _progress() as progress:
        result = moebit.compare(
            reference, models, page, text=text or [], window=window, max_tokens=max_tokens, memory=parse_size(memory),
            tasks=_names(tasks), task_data=task_data, limit=limit, progress=progress,
        )  # fmt: skip
    if not _write_json(json_file, result):
        _show_comparison(result)
        out.print(f"written: {escape(str(page))}", soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        out.print(f"moebit {installed('moebit')}", highlight=False)
        raise typer.Exit


def _command() -> str:
    """What was typed, so that it can be typed again; a resumed run is made again without --resume."""
    return shlex.join(["moebit", *(word for word in sys.argv[1:] if word != "--resume")])


def _names(text: str | None) -> list[str]:
    """a,b -> [a, b]"""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def parse_size(text: str) -> int:
    """Bytes from `4GiB`, `500MB`, `2G` (binary) or a plain number.

    Raises:
        BadInputError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*", text, flags=re.IGNORECASE)
    if not match or not float(match[1]):
        raise BadInputError(f"--memory {text}: expected a size like 4GiB or 500MB")
    base = 1000 if match[2] and match[3].lower() == "b" else 1024
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def size(count: float) -> str:
    """A human form of a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextmanager
def _progress() -> Iterator[Any]:
    """A callback (what, done, total) that draws bars with the time left, on standard error."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Interrupts() as interrupts, Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            interrupts.check()
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _write_json(file: Path | None, result: dict[str, Any]) -> bool:
    """Write to a file, or to standard output for `-`; whether standard output is taken."""
    if file is None:
        return False
    if str(file) == "-":
        out.print_json(json.dumps(result))
        return True
    try:
        file.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise BadInputError(f"--json {file}: {error.strerror}") from error
    return False


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _show_structure(result: dict[str, Any]) -> None:
    shared = "with shared experts" if result["shared_experts"] else "no shared experts"
    out.print(
        f"[bold]{escape(result['model'])}[/bold]: {result['architecture']}, "
        f"{result['parameters'] / 1e6:,.1f} M parameters, {size(result['size_bytes'])}"
    )
    out.print(
        f"{result['layers']} layers, {result['moe_layers']} with {result['experts']} experts of "
        f"{result['expert_intermediate_size']} x {result['hidden_size']}, "
        f"top-{result['top_k']}, {shared}; router: {result['router']}"
    )
    table = _table("part", "parameters", "bytes", "share")
    for label, part in result["parts"].items():
        table.add_row(label, f"{part['parameters']:,}", size(part["bytes"]), f"{part['parameters'] / result['parameters']:.1%}")
    out.print(table)
    if "quantized" in result:
        out.print(f"quantized: {result['quantized']['format']}, {result['quantized']['average_bits']:.3f} bits per quantized weight")
        if "activations" in result["quantized"]:
            _show_activations(result["quantized"]["activations"])
        _show_engines(result["quantized"]["engines"])
    if result["shipped"]:
        out.print(f"shipped quantized: {result['shipped']['scheme']}, read as {result['shipped']['read_as']}")
    if result["not_in_model"]:
        out.print(
            f"{len(result['not_in_model'])} stored tensors ({size(result['not_in_model_bytes'])}) that {result['architecture']} does not "
            f"use (multi-token prediction layers are like this) are kept byte for byte, first {result['not_in_model'][0]}"
        )


def _show_plan(plan: dict[str, Any], before: int | None) -> None:
    table = _table("plan", "")
    table.add_row("size", size(plan["size_bytes"]) + (f" (from {size(before)})" if before else ""))
    table.add_row("average bits", f"{plan['average_bits']:.3f}")
    table.add_row("quantized", f"{plan['quantized_linears']} linears, {plan['quantized_experts_modules']} layers of experts")
    table.add_row("peak memory, about", size(plan["peak_memory_bytes"]))
    table.add_row("time, about", _duration(plan["seconds"]))
    out.print(table)
    if "activations" in plan:
        _show_activations(plan["activations"])
    if plan["peak_memory_bytes"] > plan["memory"]:
        out.print(f"[yellow]more than --memory {size(plan['memory'])}[/yellow]: the smallest pieces of this model need that much")
    _show_engines(plan["engines"])
    reasons: dict[str, int] = {}
    for reason in plan["kept"].values():
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        out.print("kept in full precision: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.items()))
    if plan["kept_as_stored"]:
        out.print(
            f"kept as stored: {len(plan['kept_as_stored'])} tensors that the model class does not use, first {plan['kept_as_stored'][0]}"
        )
    if plan["unquantized_expert_share"]:
        out.print(f"[yellow]{plan['unquantized_expert_share']:.1%} of the expert parameters[/yellow] stay in full precision")


def _show_activations(said: dict[str, Any]) -> None:
    """How inputs are rounded and rotated, and where not."""

    def grid(part: dict[str, Any]) -> str:
        if part.get("float8"):
            return "float8 per token"
        kind = "symmetric" if part["symmetric"] else "asymmetric"
        return f"{part['bits']} bits per token, {kind}, clip {part['clip']}"

    if said["inputs"]:
        out.print(f"inputs: {grid(said['inputs'])}")
    if said["attention"]:
        out.print(f"query, key and value: {grid(said['attention'])}, in {said['attention']['modules']} attention modules")
    if said["transforms"]:
        out.print(f"inputs rotated: {said['transforms']['kind']}, {said['transforms']['count']} transforms")
    for key, what in (("inputs_only", "query, key and value stay whole in"), ("untransformed", "not rotated:")):
        reasons: dict[str, list[str]] = {}
        for name, why in said.get(key, {}).items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            out.print(f"[yellow]{what}[/yellow] {escape(names[0])}{more}: {escape(why)}")


def _show_engines(engines: dict[str, Any]) -> None:
    for name, verdict in engines.items():
        said = verdict["notes"] if verdict["runs"] else verdict["reasons"]
        out.print(f"{name}: {'runs it' if verdict['runs'] else 'cannot run it'}" + escape(f" ({'; '.join(said)})" if said else ""))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _show_result(result: Any) -> None:
    table = _table(str(result.path), "")
    table.add_row(
        "size", f"{size(result.size_before)} -> {size(result.size_after)} ({result.size_before / result.size_after:.2f}x smaller)"
    )
    table.add_row("average bits", f"{result.plan.average_bits:.3f}")
    table.add_row("time", _duration(result.seconds))
    table.add_row("report", str(result.path / "report.html"))
    out.print(table)
    if result.unseen_experts:
        out.print(
            f"[yellow]{result.unseen_experts} experts saw no calibration token[/yellow] and were calibrated on their layer's tokens; "
            "more or other --text would help"
        )
    if result.fallbacks:
        out.print(f"[yellow]{result.fallbacks} matrices fell back to round-to-nearest[/yellow] (report.json names them)")
    for what, count in result.skipped.items():
        out.print(f"[yellow]left in {count} places[/yellow]: {escape(what)}")


def _show_verification(result: dict[str, Any]) -> None:
    findings = result["findings"]
    out.print(
        f"[bold]{escape(result['output'])}[/bold]: [{'red' if findings else 'green'}]{result['state']}[/], "
        f"{result['files']} files, {result['tensors']} tensors, {size(result['bytes'])}"
    )
    if "durable" in result:
        durable = result["durable"]
        of = f" of {durable['of']}" if durable["of"] is not None else ""
        rest = ", and the rest of the model" if durable["rest"] else ""
        out.print(f"durable so far: {durable['layers']}{of} layers{rest}; the same `moebit quantize` with --resume goes on from there")
    if findings:
        table = Table("where", "what", "remedy", box=None, pad_edge=False)
        for finding in findings[:SHOWN_FINDINGS]:
            table.add_row(*(escape(finding[key]) for key in ("where", "what", "remedy")))
        out.print(table)
    if len(findings) > SHOWN_FINDINGS:
        out.print(f"and {len(findings) - SHOWN_FINDINGS} more (--json has them all)")


def _show_evaluation(result: dict[str, Any]) -> None:
    bits = f", {result['average_bits']:.3f} bits per weight"
    out.print(
        f"[bold]{escape(result['model'])}[/bold], {size(result['size_bytes'])}{bits}"
        + (f", against {escape(result['reference'])}" if result["reference"] else "")
    )
    if not result["texts"]:
        return
    compared = result["reference"] is not None
    table = _table("text", "tokens", "perplexity", "bits/byte", *(("KL x 1000", "top-1", "same experts", "overlap") if compared else ()))
    for name, row in result["texts"].items():
        cells = [
            name,
            f"{row['tokens']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] is not None else "-",
        ]
        if compared:
            cells += [
                f"{1000 * row['kl']:.3f}",
                f"{row['top1_agreement']:.1%}",
                f"{row['routing_exact']:.1%}",
                f"{row['routing_overlap']:.1%}",
            ]
        table.add_row(*cells)
    out.print(table)


def _show_sample(output: Path, result: dict[str, Any]) -> None:
    settings, speed = result["settings"], result["tokens_per_second"]
    out.print(
        f"[bold]{escape(str(output))}[/bold]: {settings['sequences']} sequences of {settings['length']} tokens, {settings['kind']}"
        + (f", {speed:,.0f} tokens/s" if speed else "")
    )
    out.print(f"perplexity {result['perplexity']:.2f}, distinct 4-grams {result['distinct_4grams']:.1%}")
    table = _table("layer", "sigma", "std", "tokens per expert: least", "median", "most", "never seen")
    for row in [{"layer": "all", **result}, *result["per_layer"]]:
        tokens = row["tokens_per_expert"]
        numbers = (f"{row['sigma']:.4f}", f"{row['std']:.4f}", f"{tokens['min']:,}", f"{tokens['median']:,.0f}", f"{tokens['max']:,}")
        table.add_row(str(row["layer"]), *numbers, str(row["unseen"]))
    out.print(table)


def _show_profile(found: Any) -> None:
    table = _table("data set", "tokens", "errors")
    for name, facts in found.sets.items():
        table.add_row(escape(name), f"{facts['tokens']:,}", "measured" if facts["errors"] else "-")
    out.print(table)
    out.print(f"[bold]{escape(str(found.path))}[/bold]: {len(found.experts)} layers with experts, {len(found.linears)} linears")


def _show_drift(result: dict[str, Any]) -> None:
    table = _table("text", "nearest set", "distance", "of its own halves", "")
    for name, row in result["texts"].items():
        verdict = "[yellow]other data: moebit adapt[/yellow]" if row["drifted"] else "as the sets"
        table.add_row(escape(name), escape(row["nearest"]), f"{row['distance']:.3f}", f"{row['noise']:.3f}", verdict)
    out.print(table)
    for name, distance in result["sets"].items():
        out.print(f"{escape(name)} is {distance:.3f} from the nearest other set", highlight=False)


def _show_plots(profile: Any, directory: Path, bits: Any) -> None:
    import moebit

    files = moebit.heatmaps(profile, directory, widths=bits.experts if bits else None)
    out.print(f"{len(files)} heat maps in {escape(str(directory))}", highlight=False)


def _show_allocation(result: Any, file: Path) -> None:
    widths = sorted({width for counts in result.counts.values() for width in counts})
    table = _table("matrices", *(f"{width} bits" for width in widths))
    for name, counts in result.counts.items():
        table.add_row(escape(name), *(str(counts.get(width, 0)) for width in widths))
    out.print(table)
    out.print(f"[bold]{escape(str(file))}[/bold]: {result.average_bits:.4f} bits per quantized weight on disk")


def _show_tasks(tasks: dict[str, Any]) -> None:
    if not tasks:
        return

    def around(value: float, ends: list[float] | None) -> str:
        return f"{value:.4f}" if ends is None else f"{value:.4f} ± {(ends[1] - ends[0]) / 2:.4f}"

    table = _table("task", "metric", "items", "score", "reference", "difference, paired")
    for name, row in tasks.items():
        for metric, found in row["metrics"].items():
            compared = "reference" in found
            cells = [f"{found['reference']:.4f}", around(found["difference"], found["difference_interval"])] if compared else ["-", "-"]
            table.add_row(escape(name), escape(metric), str(row["items"]), around(found["score"], found["interval"]), *cells)
    out.print(table)
    out.print("±: half of a 95% confidence interval", style="dim")


def _show_comparison(result: dict[str, Any]) -> None:
    from moebit.report.compare import labels, mean_of

    names = labels([row["model"] for row in result["models"]])
    table = _table("output", "made by", "size", "bits/ parameter", "KL x 1000", "same experts")
    for column in table.columns[:2]:
        column.overflow = "fold"
    for name, row in zip(names, result["models"], strict=True):
        kl, same = mean_of(row, "kl"), mean_of(row, "routing_exact")
        cells = ["-" if kl is None else f"{1000 * kl:.3f}", "-" if same is None else f"{same:.1%}"]
        table.add_row(escape(name), row["made_by"], size(row["size_bytes"]), f"{row['bits_per_parameter']:.2f}", *cells)
    out.print(table)
    for name, row in zip(names, result["models"], strict=True):
        if row["refused"]:
            out.print(f"[yellow]{escape(name)} is not scored[/yellow]: {escape(row['refused'])}", soft_wrap=True)


def _show_generation(prompt: str, result: Any) -> None:
    runs = [result.model] if result.reference is None else [result.model, result.reference]
    for run in runs:
        out.print(f"[bold]{escape(run.model)}[/bold]")
        out.print(prompt, style="dim", end="", markup=False, highlight=False, soft_wrap=True)
        out.print(run.text, markup=False, highlight=False, soft_wrap=True)
    table = _table("", "prompt", "tokens/s", "written", "tokens/s", "weights", "whole process", "products")
    for run in runs:
        decode = "-" if run.decode is None else f"{run.decode:.1f}"
        row = (
            str(run.prompt_tokens),
            f"{run.prefill:.1f}",
            str(len(run.tokens)),
            decode,
            size(run.weights_bytes),
            size(run.resident_bytes),
            ", ".join(run.products) or "-",
        )
        table.add_row(escape(run.model), *row)
    out.print(table)
    if result.reference is not None:
        same = result.differ_at is None
        out.print("both wrote the same" if same else f"they differ from new token {result.differ_at + 1} on")
