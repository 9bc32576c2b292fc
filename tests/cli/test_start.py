"""How long the command line takes before there is any work."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

BOUND, ROUNDS = 0.5, 24  # seconds of processor time; the machine may be disturbed in all rounds but one
# What is imported whatever moebit does, and what that takes on an idle machine (two cores of a server, Python 3.11).
LIBRARIES, LIBRARIES_IDLE = "import typer.main, typer._adapters, rich.console, rich.text, pydantic.main, yaml", 0.28


def processor_time(*arguments: str) -> float:
    """Seconds that a new Python process takes of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("recipes",), ("recipes", "gptq-w4")], ids=" ".join)
def test_what_needs_no_model_answers_at_once(arguments: tuple[str, ...]) -> None:
    """In half a second; on a loaded machine, longer by as much as importing the libraries alone is slower just then than on an idle one."""
    measured = []
    for _ in range(ROUNDS):
        slower = max(1.0, processor_time("-c", LIBRARIES) / LIBRARIES_IDLE)
        measured.append(processor_time("-m", "moebit", *arguments) / slower)
        if measured[-1] < BOUND:
            return
    pytest.fail(f"moebit {' '.join(arguments)} took {min(measured):.2f} s of the processor at best, and {BOUND} s are allowed")
