"""Runs of `moebit` by several ranks on one machine, as torchrun starts them, from one process that has imported everything already.

`python -m tests.support.ranked` forks a process per rank for every job that it reads from standard input. A rank can be told to kill
itself at one of its exchanges with the others. The product knows nothing of this.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RankServer:
    """The process that forks them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranked"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, size: int, arguments: Sequence[object], *, killed: int | None = None, at: int = 0) -> tuple[list[int], list[str]]:
        """(exit codes, negative for signals; what was written to standard error) of the ranks of `moebit ARGUMENTS`.

        Args:
            killed: the rank that is killed at its exchange number `at`.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"size": size, "arguments": list(map(str, arguments)), "killed": killed, "at": at}) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["codes"], answer["messages"]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def serve() -> None:
    import torch

    import moebit
    from moebit import cli  # noqa: F401 - what takes long

    for name in moebit.__all__:
        getattr(moebit, name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free, tempfile.TemporaryDirectory() as logs:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            children = [_fork(job, rank, port, Path(logs)) for rank in range(job["size"])]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            messages = [(Path(logs) / str(rank)).read_text() for rank in range(job["size"])]
        print(json.dumps({"codes": codes, "messages": messages}), flush=True)


def _fork(job: dict[str, Any], rank: int, port: int, logs: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(logs / str(rank), os.O_CREAT | os.O_WRONLY)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["size"] > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(job["size"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ["LOCAL_RANK"] = str(rank)
        if job["killed"] == rank:
            _die_at(job["at"])
        sys.argv = ["moebit", *job["arguments"]]
        from moebit.cli.entry import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(exchange: int) -> None:
    from moebit.ranks import Ranks

    told, count = Ranks.told, 0

    def dying(self: Ranks, mine: Any) -> list[Any]:
        nonlocal count
        if count == exchange:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return told(self, mine)

    Ranks.told = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
