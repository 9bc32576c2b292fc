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
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
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
                moment; `torn`: what was not synced until `at` is lost, as by a power cut; `file_size`: how large its files may
                become; `user`: who it runs as.
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

    for name in moebit.__all__:  # imported once here, not in every child, which may be somebody who cannot read the library
        getattr(moebit, name)
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
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - the former ones knew of another file
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
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_directory(path: Any, handle: Any) -> Any:
    """A path that may be relative to an open directory."""
    if isinstance(handle, int) and handle >= 0 and isinstance(path, str):
        return os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path)
    return path


class Unsynced:
    """What a power cut would take: contents since a file's last sync, and names since their directory's last one.

    A disk may keep all of it, some or nothing. Here half of a file's content that was not synced stays, which is also what a write that was
    cut off leaves, and every name that was not is gone; a name that was replaced gets back what it stood for.
    """

    def __init__(self) -> None:
        self.contents: set[str] = set()
        self.names: list[tuple[str, str, str]] = []  # what happened, new name, and the former name or a copy of what was replaced
        self.copies = 0

    def note(self, what: str, names: list[str]) -> None:
        """A moment that is about to pass."""
        if what == "write":
            self.contents.add(names[0])
            if not os.path.lexists(names[0]):
                self.names.append(("made", names[0], ""))
        elif what == "sync":
            self.contents.discard(names[0])
            self.names = [item for item in self.names if os.path.dirname(item[1]) != names[0]]
        elif what == "rename" and len(names) == 2:
            self._rename(*names)

    def _rename(self, old: str, new: str) -> None:
        copy = ""
        if os.path.isfile(new):
            self.copies += 1
            copy = os.path.join(tempfile.gettempdir(), f"moebit-victim-{os.getpid()}-{self.copies}")
            shutil.copyfile(new, copy)
        if os.path.isfile(old):
            self.contents = {new if name == old else name for name in self.contents}
            self.names = [item for item in self.names if item[1] != old]
        else:
            self.contents = {new + name[len(old) :] if name.startswith(old + os.sep) else name for name in self.contents}
            self.names = [(w, new + n[len(old) :] if n.startswith(old + os.sep) else n, f) for w, n, f in self.names]
        self.names.append(("replaced" if copy else "renamed", new, copy or old))

    def lose(self) -> None:
        """The power is cut."""
        for name in self.contents:
            if os.path.isfile(name):
                os.truncate(name, os.path.getsize(name) // 2)
        for what, name, former in reversed(self.names):
            if not os.path.lexists(name):
                continue
            if what == "made":
                os.unlink(name)
            elif what == "replaced":
                shutil.move(former, name)
            elif not os.path.lexists(former):
                os.rename(name, former)


def watch(job: dict[str, Any], trace: int) -> None:
    """Count moments from here on."""
    count, below = 0, job["watch"] + os.sep
    unsynced = Unsynced()
    wanted, number = job.get("at"), job.get("signal", signal.SIGKILL)

    busy = False

    def happens(what: str, *paths: object) -> None:
        nonlocal count, busy
        if busy:
            return
        names = [os.path.abspath(os.fspath(path)) for path in paths if isinstance(path, str | os.PathLike)]
        if not names or not names[0].startswith(below):
            return
        if count == 0 and "after" in job:
            threading.Timer(job["after"], lambda: os.kill(os.getpid(), number)).start()
        os.write(trace, (json.dumps([what, [name.removeprefix(below) for name in names]]) + "\n").encode())
        if count == wanted:
            busy = True  # what follows is the power cut's doing, not the victim's
            if job.get("torn"):
                unsynced.lose()
            os.kill(os.getpid(), number)
            busy = False
        count += 1
        if job.get("torn"):
            busy = True
            unsynced.note(what, [name for name in names if name.startswith(below)])
            busy = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            written = set("wax+") & set(arguments[1] or "") or flags & (os.O_WRONLY | os.O_RDWR)
            happens("write" if written else "open", arguments[0])
        elif event == "os.rename":
            happens("rename", arguments[0], arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            happens(event.removeprefix("os."), in_directory(arguments[0], arguments[-1]))

    really_sync = os.fsync

    def sync(handle: int) -> None:
        happens("sync", os.readlink(f"/proc/self/fd/{handle}"))
        really_sync(handle)

    os.fsync = sync
    sys.addaudithook(audit)


if __name__ == "__main__":
    serve()
