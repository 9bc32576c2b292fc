"""`moebit generate`: what a model writes, how fast and in how much memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from moebit.cli.options import JsonOption, ModelArgument, finite
from moebit.cli.screens.generation import show_generation
from moebit.cli.terminal import write_json
from moebit.errors import BadInputError

EXAMPLES = (
    'moebit generate olmoe-w3 --prompt "The history of the"',
    'moebit generate olmoe-w3 --prompt "def main(" --against reference/olmoe --max-new-tokens 40 --temperature 0.8 --seed 1',
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to go on from.")],
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="Another model: shows what it writes, and where they first differ.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Write at most so many tokens.")] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time (the default).")] = False,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="Draw tokens at this temperature instead.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    path: Annotated[
        str, typer.Option(help="How packed weights are multiplied: auto, reference, dequantize, float, integer or triton.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the models run: cpu or cuda.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Continue a prompt, and show the text, the speed and the memory."""
    if greedy and temperature:
        raise BadInputError(f"--greedy and --temperature {temperature}: choose one")
    import moebit

    result = moebit.generate(
        model, prompt=prompt, against=against, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        path=path,  # type: ignore[arg-type] # checked there
        device=device,
    )  # fmt: skip
    if not write_json(json_file, asdict(result)):
        show_generation(prompt, result)
