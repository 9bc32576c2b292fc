"""`moebit inspect`: what a model is made of, and what a recipe would make of it."""

from __future__ import annotations

from typing import Annotated

import typer

from moebit.cli.options import EngineOption, FormatOption, JsonOption, LinksOption, LlamaOption, MemoryOption, ModelArgument, check_recipe
from moebit.cli.screens.model import show_gguf, show_structure
from moebit.cli.screens.plan import show_plan
from moebit.cli.terminal import write_json
from moebit.memory import DEFAULT_MEMORY

EXAMPLES = ("moebit inspect reference/olmoe", "moebit inspect reference/olmoe --recipe gptq-w3 --json plan.json")


def inspect(
    model: ModelArgument,
    recipe: Annotated[str | None, typer.Option(help="Preset or YAML file: show what it would make of the model.")] = None,
    output_format: FormatOption = None,
    llama_cpp: LlamaOption = None,
    engine: EngineOption = "any",
    memory: MemoryOption = DEFAULT_MEMORY,
    follow_links: LinksOption = False,
    json_file: JsonOption = None,
) -> None:
    """Show what a model is made of, and what a recipe would make of it. Only headers are read."""
    if recipe is not None:
        check_recipe(recipe, {}, output_format)
    import moebit

    result = moebit.inspect(
        model, recipe, format=output_format, llama_cpp=llama_cpp, engine=engine, memory=memory, follow_links=follow_links
    )
    if write_json(json_file, result):
        return
    if "gguf" in result:
        show_gguf(result)
        return
    show_structure(result)
    if "plan" in result:
        show_plan(result["plan"], result["size_bytes"])
