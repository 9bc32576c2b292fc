"""`moebit report`: an output's page, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.terminal import say

EXAMPLES = (
    "moebit report olmoe-w3",
    "moebit evaluate olmoe-w3 --against reference/olmoe --text wiki.txt --json e.json",
    "moebit report olmoe-w3 --evaluation e.json -o olmoe-w3.html",
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

    say("written: ", moebit.report(output, page, evaluation=evaluation or []))
