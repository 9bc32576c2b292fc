"""The files of calibration text that a model writes: what is finished of it, and the text itself."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.recipe.reading import TEXT_BYTES, parse_json, read_text
from moebit.storage.documents import understood
from moebit.storage.durable import replace_text


def fingerprint(path: Path) -> str:
    """sha256 over a checkpoint's configuration and its shards' names, sizes and times."""
    state = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        state.update(json.dumps([file.name, file.stat().st_size, file.stat().st_mtime_ns]).encode())
    return state.hexdigest()


@dataclass
class Partial:
    """Groups that are finished, in a file beside the one that will be written: what it belongs to, then a line a group.

    Attributes:
        groups: (tokens [n, L], usage [n, M, E]) of each.
    """

    file: Path
    groups: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> Partial:
        """Begin, or go on.

        Raises:
            BadInputError: the output exists, an interrupted run that would have to be decided about, or one of something else.
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
        """An empty one, in place of whatever is there."""
        write_whole(file, json.dumps({"started": identity}) + "\n")
        return cls(file, [])

    @classmethod
    def take_up(cls, file: Path, identity: dict[str, Any]) -> Partial:
        """What an interrupted run has finished; a line that it did not finish is dropped.

        Raises:
            BadInputError: the run was another one.
        """
        lines = list(_whole_lines(file))
        if not lines:
            return cls.begin(file, identity)
        started = lines[0].get("started", {})
        changed = sorted(key for key in {*started, *identity} if started.get(key) != identity.get(key))
        if changed:
            raise BadInputError(f"{file} was started with another {', '.join(changed)}; give the same again, or --overwrite starts again")
        write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
        with understood(file, "--overwrite starts again"):
            groups = [(torch.tensor(line["input_ids"]), torch.tensor(line["usage"], dtype=torch.int32)) for line in lines[1:]]
        return cls(file, groups)

    def add(self, tokens_NL: Tensor, usage_NME: Tensor) -> None:
        """Keep a finished group."""
        self.groups.append((tokens_NL, usage_NME))
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"input_ids": tokens_NL.tolist(), "usage": usage_NME.tolist()}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """What it was for is written."""
        sys.audit("moebit.tidy", str(self.file))
        self.file.unlink(missing_ok=True)


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in read_text(file, limit=TEXT_BYTES).splitlines():
        try:
            found = parse_json(line)
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        yield found


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
