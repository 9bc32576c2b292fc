"""`moebit verify`: whether an output is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebit.cli.options import JsonOption
from moebit.cli.screens.verification import show_verification
from moebit.cli.terminal import progress_bars, write_json

EXAMPLES = ("moebit verify olmoe-w3", "moebit verify olmoe-w3 --json findings.json")
EXIT_CODES = {"fine": 0, "damaged": 2, "unfinished": 3}


def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="What `moebit quantize -o OUT` wrote, finished or not.")],
    json_file: JsonOption = None,
) -> None:
    """Check that an output is whole: every file, every tensor. The exit code is 0 if it is, 2 if it is damaged, 3 if it is unfinished."""
    import moebit

    with progress_bars() as progress:
        result = moebit.verify(output, progress=progress)
    if not write_json(json_file, result):
        show_verification(result)
    raise typer.Exit(EXIT_CODES[result["state"]])
