"""The program itself: its name, its help, its version. The verbs register themselves with it."""

from __future__ import annotations

from typing import Annotated

import typer

from moebit.cli.terminal import say, say_lines

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Mixture-of-Experts language models after training.\n\nStart with [bold]moebit inspect MODEL[/bold].",
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        say(f"moebit {installed('moebit')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        if text := context.get_help():  # empty where it has printed the help itself
            say_lines(text)
        raise typer.Exit(2)
