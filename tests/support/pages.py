"""The commands and Python blocks of the README and of pages of the documentation, and how to run them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from moebit import cli

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# Pages that a newcomer follows from the top to the bottom, in the clone. In this order they also run in one directory, one after the other.
FOLLOWED = (ROOT / "docs" / "quickstart.md", README, ROOT / "docs" / "api.md", ROOT / "docs" / "recipes.md")
# What cannot be run inside a test run: getting the clone, set-up itself (this run is its result), and the tests (this is them). The demo,
# the benchmarks and the retraining have tests of their own or take too long; that their make targets exist is checked.
NOT_HERE = ("git clone", "make ", "cd ", "source ")


class Step(NamedTuple):
    kind: str  # "bash": one command; "python": one block
    text: str


def commands(page: Path) -> list[str]:
    """Every shell command of a page, comments and line continuations removed."""
    return [step.text for step in _steps(page) if step.kind == "bash"]


def steps(page: Path) -> list[Step]:
    """What can be run of a page, in order."""
    return [step for step in _steps(page) if not step.text.startswith(NOT_HERE)]


def _steps(page: Path) -> Iterable[Step]:
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        if kind == "python":
            yield Step(kind, block)
            continue
        lines = [line.split("  #")[0].split() for line in block.replace("\\\n", " ").splitlines()]
        yield from (Step(kind, " ".join(line)) for line in lines if line and not line[0].startswith("#"))


def run_as_typed(step: Step, workplace: Path) -> None:
    """In a shell or an interpreter of its own."""
    command = ["bash", "-c", step.text] if step.kind == "bash" else [sys.executable, "-c", step.text]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "140"}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"


def run_here(step: Step) -> None:
    """In this process and directory: starting an interpreter with torch and transformers takes longer than most commands."""
    if step.kind == "python":
        exec(compile(step.text, "<block>", "exec"), {"__name__": "__main__"})
        return
    program, *arguments = shlex.split(step.text)
    assert program == "moebit", step.text
    target = None
    if ">" in arguments:
        *arguments, sign, target = arguments
        assert sign == ">", step.text
    before, sys.argv = sys.argv, ["moebit", *arguments]
    try:
        with contextlib.ExitStack() as stack:
            if target:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(target, "w", encoding="utf-8"))))
            with pytest.raises(SystemExit) as stop:
                cli.main()
    finally:
        sys.argv = before
    assert not stop.value.code, f"{step.text}: exit code {stop.value.code}"
