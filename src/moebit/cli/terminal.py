"""What reaches the terminal. Every text that is printed goes through `safe`, and none of it is read as markup.

Names of tensors, files and models come from strangers. They may hold what rich reads as markup (`x[/bold]y`), escape sequences that a
terminal obeys, or characters that change the direction of writing. Here texts are put together from plain strings and from strings with
a style; only the style is ours to choose.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from moebit.cli.interrupts import Interrupts
from moebit.errors import BadInputError

if TYPE_CHECKING:
    from rich.table import Table

out, err = Console(), Console(stderr=True)

# Controls, surrogates, and separators of lines and paragraphs; and, beside these categories, what reorders the characters around it.
UNSAFE = frozenset({"Cc", "Cs", "Zl", "Zp"})
REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def safe(text: object, *, lines: bool = False) -> str:
    """The text with every character that a terminal would obey shown as an escape such as `\\x1b`; with `lines`, line breaks stay."""
    return "".join(_shown(character, lines) for character in str(text))


def _shown(character: str, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    if unicodedata.category(character) not in UNSAFE and character not in REORDERING:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def styled(text: object, style: str) -> Text:
    return Text(safe(text), style=style)


def bold(text: object) -> Text:
    return styled(text, "bold")


def warning(text: object) -> Text:
    return styled(text, "yellow")


def say(*parts: object, style: str = "") -> None:
    """One line on standard output, put together from texts of any origin and from styled ones; the terminal itself breaks it."""
    _print(out, Text(style=style).join(_text(part) for part in parts))


def say_lines(text: object, *, style: str = "", end: str = "\n") -> None:
    """A text whose line breaks are kept."""
    _print(out, Text(safe(text, lines=True), style=style), end)


def complain(label: str, style: str, message: object) -> None:
    """A labelled message on standard error. Further lines of it are indented, so that none of them looks like a message of its own."""
    told = safe(message, lines=True).replace("\n", "\n  ")
    _print(err, Text(label, style=style).append(f" {told}" if told else "", style="default"))


def table(*columns: object) -> Table:
    """An empty table: the first column is flush left, the others are flush right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(_text(column), justify="left" if number == 0 else "right")
    return made


def text_table(*columns: object) -> Table:
    """An empty table with every column flush left."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(_text(column))
    return made


def row(made: Table, *cells: object) -> None:
    made.add_row(*map(_text, cells))


def show(made: Table) -> None:
    out.print(made)


def write_json(file: Path | None, result: dict[str, Any]) -> bool:
    """Write the result to a file, or to standard output for `-`; whether standard output is taken."""
    if file is None:
        return False
    if str(file) == "-":
        say_lines(json.dumps(result, indent=1))  # ASCII alone
        return True
    try:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"--json {file}: {error.strerror}") from error
    return False


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that draws bars with the time left, on standard error."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>8}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
    )
    with Interrupts() as interrupts, Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            interrupts.check()
            if what not in tasks:
                tasks[what] = bars.add_task(safe(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _text(part: object) -> Text:
    return part if isinstance(part, Text) else Text(safe(part))


def _print(console: Console, text: Text, end: str = "\n") -> None:
    console.print(text, end=end, soft_wrap=True, markup=False, emoji=False, highlight=False)
