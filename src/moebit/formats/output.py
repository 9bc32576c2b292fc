"""An output directory that is either complete or visibly unfinished.

Work goes on in OUT.partial: shards that have their final name are whole and synced, journal.jsonl says which there are. `finish` adds what
belongs to the whole model and renames the directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError, InterruptedWorkError
from moebit.model.files import INDEX, ShardFile, TensorSpec, read_header, sha256

JOURNAL = "journal.jsonl"
# Everything beside the weights that makes a checkpoint usable is carried along; weights, code and papers are not.
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
NOT_CARRIED = {"config.json", INDEX, "training.json", "report.json", "moebit.json", "requirements.txt"}


class OutputDirectory:
    """The writer of one output."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.entries: list[dict[str, Any]] = []
        if path.exists() and not overwrite:
            raise BadInputError(f"{path} exists; choose another -o, or --overwrite to replace it")
        if self.partial.exists() and not resume and not overwrite:
            raise BadInputError(f"{self.partial} holds an interrupted run; --resume goes on with it, --overwrite starts again")
        if self.partial.exists() and resume:
            self._take_up(identity)
            return
        if self.partial.exists():
            shutil.rmtree(self.partial)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise BadInputError(f"cannot write {self.partial}: {error.strerror}; choose another -o") from error
        self._append({"started": dict(identity)})

    def _take_up(self, identity: Mapping[str, Any]) -> None:
        """Go on with an interrupted run: every journaled shard is checked, what is not in the journal is removed."""
        lines = (self.partial / JOURNAL).read_text().splitlines() if (self.partial / JOURNAL).exists() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the run ended
        if not records or records[0].get("started") != dict(identity):
            known = records[0].get("started", {}) if records else {}
            changed = sorted(key for key in {*identity, *known} if known.get(key) != identity.get(key))
            raise BadInputError(f"{self.partial} was started with another {', '.join(changed) or 'moebit'}; --overwrite starts again")
        self.entries = records[1:]
        keep = {JOURNAL}
        for entry in self.entries:
            for name, checksum in entry["files"].items():
                file = self.partial / name
                if name.startswith("stream-") and entry is not self.entries[-1]:
                    continue  # only the state behind the last layer is needed to go on
                if not file.exists() or sha256(file) != checksum:
                    raise BadInputError(f"{file} is not what the journal says; --overwrite starts again")
                keep.add(name)
        for file in self.partial.iterdir():
            if file.name not in keep:
                file.unlink() if file.is_file() else shutil.rmtree(file)
        self._write_journal([{"started": dict(identity)}, *self.entries])

    def shard_name(self, number: int, total: int) -> str:
        """The name of weight file `number` (from 0) of `total`."""
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def shard(self, name: str, specs: Mapping[str, TensorSpec]) -> ShardFile:
        """A new file of this output."""
        return ShardFile(self.partial / name, specs)

    def record(self, kind: str, files: list[str], **facts: Any) -> None:
        """Note in the journal that these files are whole; from here on a resumed run will not make them again."""
        entry = {"kind": kind, "files": {name: sha256(self.partial / name) for name in files}, **facts}
        self.entries.append(entry)
        self._append(entry)

    def _append(self, record: dict[str, Any]) -> None:
        with open(self.partial / JOURNAL, "a") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _write_journal(self, records: list[dict[str, Any]]) -> None:
        temporary = self.partial / f"{JOURNAL}.writing"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(temporary, self.partial / JOURNAL)

    def remove(self, name: str) -> None:
        (self.partial / name).unlink(missing_ok=True)

    def finish(self, source: Path, config: Mapping[str, Any], documents: Mapping[str, str]) -> None:
        """Index, configuration, tokenizer and documents; then the directory gets its name.

        Args:
            source: the checkpoint, whose tokenizer, generation and template files are carried along.
            documents: further files, name -> text.
        """
        shards = [name for entry in self.entries for name in entry["files"] if name.startswith("model-")]
        headers = {name: read_header(self.partial / name) for name in shards}
        weight_map = {tensor: name for name, header in headers.items() for tensor in header}
        total = sum(entry.spec.nbytes for header in headers.values() for entry in header.values())
        self._document(INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1))
        self._document("config.json", json.dumps(config, indent=2) + "\n")
        for pattern in CARRIED:
            for file in sorted(source.glob(pattern)):
                if file.name not in NOT_CARRIED and not file.name.startswith("model.safetensors"):
                    shutil.copyfile(file, self.partial / file.name)
        for name, text in documents.items():
            self._document(name, text)
        for file in self.partial.glob("stream-*"):
            file.unlink()
        _sync(self.partial)
        replaced = self.path.with_name(self.path.name + ".replaced")
        if self.path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.path, replaced)
        os.replace(self.partial, self.path)
        _sync(self.path.parent)
        # Until here a stop at any moment could be resumed; what follows only tidies up.
        (self.path / JOURNAL).unlink()
        shutil.rmtree(replaced, ignore_errors=True)

    def _document(self, name: str, text: str) -> None:
        with open(self.partial / name, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def check_space(path: Path, needed: int) -> None:
    """Refuse work whose result will not fit on the disk.

    Raises:
        BadInputError: naming how much is needed and free.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise BadInputError(f"cannot write to {parent}; choose another -o")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise BadInputError(
            f"{parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; free some space or choose another -o"
        )


def disk_error(error: OSError, partial: Path) -> InterruptedWorkError:
    return InterruptedWorkError(f"writing to {partial} failed: {error.strerror or error}; what is finished is kept, go on with --resume")


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
