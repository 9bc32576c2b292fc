"""The files of calibration text that a model writes: what is finished of it, and the text itself."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.recipe.reading import TEXT_BYTES, parse_json, read_text
from moebit.storage.documents import understood
from moebit.storage.durable import replace_text, write_all
from moebit.storage.files import sync_directory


def fingerprint(path: Path) -> str:
    """sha256 over a checkpoint's configuration and its shards' names, sizes and times."""
    state = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        state.update(json.dumps([file.name, file.stat().st_size, file.stat().st_mtime_ns]).encode())
    return state.hexdigest()


BEGINNING = b'{"started": '  # of the file in which an interrupted run is kept


@dataclass
class Partial:
    """Groups that are finished, in a file beside the one that will be written: what it belongs to, then a line a group.

    The file is locked as long as this is open, so that one run at a time writes there. It is used as a context.

    Attributes:
        groups: (tokens [n, L], usage [n, M, E]) of each.
    """

    file: Path
    groups: list[tuple[Tensor, Tensor]]
    handle: BinaryIO

    @classmethod
    def of(cls, out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> Partial:
        """Begin, or go on.

        Raises:
            BadInputError: the output exists, an interrupted run that would have to be decided about, one of something else, or another run
                is writing there.
        """
        file = out.with_name(out.name + ".partial")
        if not overwrite and not (resume and file.exists()):  # a run that ended after writing OUT, before it tidied up, left both
            for there in (out, out.with_name(out.name + ".json")):
                if os.path.lexists(there):
                    raise BadInputError(f"{there} exists; choose another -o, or --overwrite to replace it")
        if file.exists() and not (resume or overwrite):
            raise BadInputError(f"{file} holds an interrupted run; --resume goes on with it, --overwrite starts again")
        return cls.take_up(file, identity) if file.exists() and resume else cls.begin(file, identity)

    @classmethod
    def begin(cls, file: Path, identity: dict[str, Any]) -> Partial:
        """An empty one, in place of whatever is there.

        Raises:
            BadInputError: another run is writing there, or the file cannot be written.
        """
        handle = _locked(file)
        try:
            _check_own(file, handle)
            handle.truncate(0)
            partial = cls(file, [], handle)
            partial._append({"started": identity})
            sync_directory(file.parent)
        except OSError as error:
            handle.close()
            raise BadInputError(f"cannot write {file}: {error.strerror}; choose another place") from error
        except BadInputError:
            handle.close()
            raise
        return partial

    @classmethod
    def take_up(cls, file: Path, identity: dict[str, Any]) -> Partial:
        """What an interrupted run has finished; a line that it did not finish is dropped.

        Raises:
            BadInputError: the run was another one, or another run is writing there.
        """
        handle = _locked(file)
        try:
            lines, size = _whole_lines(file)
            groups = _groups(file, lines, identity)
            handle.truncate(size)
        except BaseException:
            handle.close()
            raise
        if not lines:
            handle.close()
            return cls.begin(file, identity)
        return cls(file, groups, handle)

    def add(self, tokens_NL: Tensor, usage_NME: Tensor) -> None:
        """Keep a finished group."""
        self.groups.append((tokens_NL, usage_NME))
        self._append({"input_ids": tokens_NL.tolist(), "usage": usage_NME.tolist()})

    def _append(self, line: dict[str, Any]) -> None:
        self.handle.seek(0, os.SEEK_END)
        write_all(self.handle, (json.dumps(line) + "\n").encode())
        os.fsync(self.handle.fileno())

    def remove(self) -> None:
        """What it was for is written."""
        sys.audit("moebit.tidy", str(self.file))
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()  # and with it the lock


def _locked(file: Path) -> BinaryIO:
    """The file, made where it is not there, locked against other runs until it is closed or the process ends, however it ends."""
    try:
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise BadInputError(f"cannot write {file}: {error.strerror}; choose another place") from error
    handle = open(number, "r+b", buffering=0)  # noqa: SIM115 - closed by its Partial
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.lexists(file) and os.path.samestat(os.fstat(handle.fileno()), os.lstat(file))
    except OSError:
        held = False
    if not held:
        handle.close()
        raise BadInputError(f"{file}: another run is writing there; wait for it, or choose another -o")
    return handle


def _check_own(file: Path, handle: BinaryIO) -> None:
    """Refuse to empty a file that is not the beginning of an interrupted run."""
    found = handle.read(len(BEGINNING))
    if not BEGINNING.startswith(found):
        raise BadInputError(f"{file} is in the way: an interrupted run is kept under this name, and this is none; move it away")


def _groups(file: Path, lines: list[dict[str, Any]], identity: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The groups of an interrupted run; an error says what differs from this one."""
    if not lines:
        return []
    with understood(file, "--overwrite starts again"):
        started = dict(lines[0].get("started", {}))
        changed = sorted(key for key in {*started, *identity} if started.get(key) != identity.get(key))
        if changed:
            raise BadInputError(f"{file} was started with another {', '.join(changed)}; give the same again, or --overwrite starts again")
        return [(torch.tensor(line["input_ids"]), torch.tensor(line["usage"], dtype=torch.int32)) for line in lines[1:]]


def _whole_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and their bytes."""
    found, size = [], 0
    for line in read_text(file, limit=TEXT_BYTES).splitlines(keepends=True):
        try:
            value = parse_json(line)
        except ValueError:
            break
        if not isinstance(value, dict) or not line.endswith("\n"):
            break
        found.append(value)
        size += len(line.encode())
    return found, size


def write_sample(file: Path, windows_SL: Tensor, tokenizer: Any | None) -> None:
    """A .jsonl with a line per window: its ids and, where there is a tokenizer, their text."""
    lines = []
    for ids in windows_SL.tolist():
        text = {} if tokenizer is None else {"text": tokenizer.decode(ids, skip_special_tokens=False)}
        lines.append(json.dumps({**text, "input_ids": ids}))
    write_whole(file, "".join(line + "\n" for line in lines))


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        BadInputError: it cannot be written.
    """
    try:
        replace_text(file, text)
    except OSError as error:
        raise BadInputError(f"cannot write {file}: {error.strerror}; choose another place") from error
