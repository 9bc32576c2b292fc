"""The entry point: errors become exit codes and one sentence each."""

from __future__ import annotations

import io
import os
import sys
import traceback

import typer

from moebit.cli.root import app
from moebit.cli.terminal import complain
from moebit.cli.verbs import register_verbs
from moebit.errors import BadInputError, InterruptedWorkError, is_out_of_memory

DONE, INTERNAL_ERROR, BAD_INPUT, INTERRUPTED, CTRL_C = 0, 1, 2, 3, 130
KEPT = {"quantize": "layers", "sample": "groups of sequences"}  # what an interrupted verb keeps of its work

register_verbs()


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 internal error, 2 bad input, 3 interrupted and resumable, 130 Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the characters of a name shows their numbers
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)  # the option parser returns the code of an Exit, and of Ctrl-C, instead of raising
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        code = CTRL_C
    except BadInputError as error:
        complain(f"{_who()}Error:", "red", error)
        return BAD_INPUT
    except InterruptedWorkError as error:
        complain(f"{_who()}Interrupted:", "yellow", error)
        return INTERRUPTED
    except Exception as error:
        return _unexpected(error)
    if code == CTRL_C:
        kept = _kept()
        complain("Stopped.", "yellow", f"{kept} The same command with --resume goes on." if kept else "")
    return code if isinstance(code, int) else DONE


def _unexpected(error: Exception) -> int:
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # usage errors of the option parser
        complain("Error:", "red", f"{error.format_message()} (see moebit --help)")
        return BAD_INPUT
    if is_out_of_memory(error):
        kept = _kept()
        again = f"{kept} Free some memory, then the same command with --resume goes on." if kept else "Give a smaller --memory."
        complain("Interrupted:", "yellow", f"The machine has no memory left for this. {again}")
        return INTERRUPTED
    complain("", "", "".join(traceback.format_exception(error)))
    complain("Internal error:", "red", "this is a bug in moebit; please report it with the lines above.")
    return INTERNAL_ERROR


def _who() -> str:
    """Which of several ranks speaks; nothing for one alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f"[rank {os.environ.get('RANK', '?')} of {size}] "


def _kept() -> str:
    what = KEPT.get("".join(sys.argv[1:2]))
    return f"Finished {what} are kept." if what else ""
