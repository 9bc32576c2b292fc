"""Work in a process forked after the imports: it costs what it costs and not the start-up, and may hang, crash or be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebit.errors import MoebitError

FINE, REFUSED, BROKEN = 0, 2, 1


@dataclass(frozen=True)
class Ending:
    """How forked work ended.

    Attributes:
        code: FINE, REFUSED (a `MoebitError`), BROKEN (any other exception), or the negative number of a signal.
        said: the message, or the last lines of the traceback. hung: whether it was ended because its time was over.
        outside: what it wrote to outside of the folders that it may write to.
    """

    code: int
    said: str
    hung: bool
    outside: tuple[str, ...]


def forked(work: Callable[[], object], allowed: tuple[Path, ...], seconds: float = 10.0) -> Ending:
    """Run `work` in a fork; `allowed`: folders in which it may write."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _suffer(work, allowed, writer)
    os.close(writer)
    hung = not _ended(child, seconds)
    if hung:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    else:
        status = _status.pop(child)
    with open(reader, encoding="utf-8", errors="replace") as pipe:
        lines = pipe.read().splitlines()
    outside = tuple(line[1:] for line in lines if line.startswith("!"))
    return Ending(os.waitstatus_to_exitcode(status), "\n".join(line for line in lines if not line.startswith("!")), hung, outside)


_status: dict[int, int] = {}


def _ended(child: int, seconds: float) -> bool:
    end, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _status[child] = status
            return True
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return False


def _suffer(work: Callable[[], object], allowed: tuple[Path, ...], writer: int) -> None:
    """The forked process: never returns."""
    code, said = BROKEN, ""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        _watch_writes(allowed, writer)
        work()
        code = FINE
    except MoebitError as error:
        code, said = REFUSED, str(error).splitlines()[0][:500] if str(error) else ""
    except BaseException as error:
        place = [frame for frame in traceback.extract_tb(error.__traceback__) if "moebit" in frame.filename][-1:]
        where = "".join(f"{Path(frame.filename).name}:{frame.lineno} " for frame in place)
        said = f"{where}{type(error).__name__}: {str(error)[:300]}".replace("\n", " ")
    finally:
        os.write(writer, said.encode("utf-8", errors="replace")[:60_000])
        os._exit(code)


def _watch_writes(allowed: tuple[Path, ...], writer: int) -> None:
    """Note every file that is opened to be written, renamed, linked or removed outside of the allowed folders."""
    roots = tuple(os.path.realpath(folder) + os.sep for folder in allowed)

    def look(path: object) -> None:
        if not isinstance(path, str | os.PathLike):
            return
        real = os.path.realpath(os.fspath(path))
        if not (real + os.sep).startswith(roots) and not real.startswith("/dev/") and "__pycache__" not in real:
            os.write(writer, f"!{real}\n".encode(errors="replace"))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if set("wax+") & set(arguments[1] or "") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                look(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            look(arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir") and arguments[-1] in (-1, None):
            look(arguments[0])

    sys.addaudithook(audit)
