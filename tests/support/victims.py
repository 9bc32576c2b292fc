"""Processes that come to harm at a chosen moment.

`python -m tests.support.victims` imports moebit once and then forks a process per job that it reads from standard input, so that a victim
costs
what its work costs and not the start-up. Inside, a victim counts what it does to files: every opening, syncing, renaming and removing
below the watched directory is one moment, noted in a trace *before* it happens. At the chosen moment it signals itself. The product
knows nothing of this.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Moment:
    """One event of a trace.

    Attributes:
        what: open (to read), write (open to write), sync, rename, remove, mkdir, rmdir.
        names: of the files, below the watched directory.
    """

    what: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Fate:
    """How a victim ended: exit code (negative: the signal), its messages, and what it did to files."""

    code: int
    messages: str
    trace: list[Moment]
    seconds: float


class Victims:
    """The process that forks them."""

    def __init__(self, directory: Path) -> None:
        """`directory`: what is watched."""
        self.directory = directory
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.victims"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def prepare(self, model: Path) -> None:
        """Import what a model needs, here and not in every victim."""
        self._ask({"inspect": str(model)})

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())  # type: ignore[no-any-return]

    def run(self, arguments: Sequence[object], **harm: Any) -> Fate:
        """`moebit ARGUMENTS`, with what happens to it.

        Args:
            harm: `at`: number of the moment (from 0) at which it is sent `signal` (SIGKILL); `after`: the same, seconds after its first
                moment; `file_size`: how large its files may become; `user`: who it runs as.
        """
        ended = self._ask({"arguments": list(map(str, arguments)), "watch": str(self.directory), **harm})
        moments = [json.loads(line) for line in ended["trace"].splitlines()]
        return Fate(ended["code"], ended["messages"], [Moment(what, tuple(names)) for what, names in moments], ended["seconds"])

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def serve() -> None:
    import time

    import torch

    import moebit
    from moebit import cli  # noqa: F401 - what takes long

    torch.set_num_threads(1)
    for line in sys.stdin:
        job, began = json.loads(line), time.perf_counter()
        if "inspect" in job:
            moebit.inspect(job["inspect"])
            os.write(1, b"{}\n")
            continue
        log, trace = pipe(), pipe()  # a limit on files does not limit pipes
        child = os.fork()
        if child == 0:
            suffer(job, log[1], trace[1])
        _, status = os.waitpid(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "messages": drained(log), "trace": drained(trace)}
        os.write(1, (json.dumps({**answer, "seconds": time.perf_counter() - began}) + "\n").encode())


def pipe() -> tuple[int, int]:
    """(reading end, writing end) of a pipe that holds a whole trace."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 2**20)
    return ends


def drained(ends: tuple[int, int]) -> str:
    os.close(ends[1])
    with open(ends[0], encoding="utf-8", errors="replace") as reader:
        return reader.read()


def suffer(job: dict[str, Any], log: int, trace: int) -> None:
    """The forked process: never returns."""
    from moebit import cli

    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "user" in job:
        os.setgid(job["user"])
        os.setuid(job["user"])
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    watch(job, trace)
    sys.argv = ["moebit", *job["arguments"]]
    code = 99
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(job: dict[str, Any], trace: int) -> None:
    """Count moments from here on."""
    count, below = 0, job["watch"] + os.sep
    wanted, number = job.get("at"), job.get("signal", signal.SIGKILL)

    def happens(what: str, *paths: object) -> None:
        nonlocal count
        names = [os.path.abspath(os.fspath(path)) for path in paths if isinstance(path, str | os.PathLike)]
        if not names or not names[0].startswith(below):
            return
        if count == 0 and "after" in job:
            threading.Timer(job["after"], lambda: os.kill(os.getpid(), number)).start()
        os.write(trace, (json.dumps([what, [name.removeprefix(below) for name in names]]) + "\n").encode())
        if count == wanted:
            os.kill(os.getpid(), number)
        count += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            happens("write" if set("wax+") & set(arguments[1] or "") else "open", arguments[0])
        elif event == "os.rename":
            happens("rename", arguments[0], arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            happens(event.removeprefix("os."), arguments[0])

    really_sync = os.fsync

    def sync(handle: int) -> None:
        happens("sync", os.readlink(f"/proc/self/fd/{handle}"))
        really_sync(handle)

    os.fsync = sync
    sys.addaudithook(audit)


if __name__ == "__main__":
    serve()
