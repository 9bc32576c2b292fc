"""`moebit recipes`: the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.terminal import say_lines

EXAMPLES = ("moebit recipes", "moebit recipes gptq-w3 > my-recipe.yaml")


def recipes(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one as YAML.")] = None) -> None:
    """List the shipped recipes, or print one as YAML."""
    from moebit.recipe import load_recipe, presets
    from moebit.recipe.reading import read_text

    known = presets()
    if name in known:
        say_lines(known[name], end="")
        return
    if name is not None:
        load_recipe(name)  # says what is wrong with a file
        say_lines(read_text(Path(name), "recipe "), end="")
        return
    rows = [("recipe", "bits", "group", "grid", "method", "what it is")]
    for key, text in known.items():
        recipe = load_recipe(key)
        bits = f"{recipe.allocation.target_bits or recipe.weights.bits:g}"
        grid = "symmetric" if recipe.weights.symmetric else "asymmetric"
        rows.append((key, bits, str(recipe.weights.group_size), grid, recipe.solver.method, text.splitlines()[0].removeprefix("# ")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows)
    say_lines("\n".join(lines))
