"""An output directory that is either complete or visibly unfinished.

Work goes on in OUT.partial: shards that have their final name are whole and synced, journal.jsonl says which there are. `finish` adds what
belongs to the whole model and renames the directory. The order is always the same: a file's content reaches the disk, then its name, then
the journal entry that speaks of it, then what it replaces is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError, InterruptedWorkError
from moebit.formats.seal import SEALED, is_report, seal
from moebit.storage.files import INDEX, ShardFile, TensorSpec, read_header, sha256, sync_directory

JOURNAL = "journal.jsonl"
SAMPLE = "calibration.jsonl"  # text that the model wrote for its own calibration; beginning with this name, what is finished of it
PROFILE_DIRECTORY = "profile"  # in OUT.partial: whole after every data set, gone when the output is finished
# Everything beside the weights that makes a checkpoint usable is carried along; weights, code and papers are not.
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
NOT_CARRIED = {"config.json", INDEX, "training.json", "report.json", SEALED, "requirements.txt"}


class OutputDirectory:
    """The writer of one output."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path, self.partial = path, partial_of(path)
        self.entries: list[dict[str, Any]] = []
        self._held: int | None = None
        if resume:
            self._reopen(identity)
        check_free(path, resume=resume, overwrite=overwrite)
        for directory in (path, self.partial):
            _check_own(directory)
        if self.partial.exists() and resume:
            self._lock()
            try:
                self._take_up(identity)
            except BaseException:
                self.release()
                raise
            return
        if self.partial.exists():
            shutil.rmtree(self.partial)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise BadInputError(f"cannot write {self.partial}: {error.strerror}; choose another -o") from error
        sync_directory(self.partial.parent)
        self._lock()
        self._write_journal([{"started": dict(identity)}])

    def _lock(self) -> None:
        """One run at a time may write here; the lock ends with the process, however it ends."""
        self._held = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise BadInputError(f"{self.partial}: another run is writing there; wait for it, or choose another -o") from error

    def _reopen(self, identity: Mapping[str, Any]) -> None:
        """A run that ended between the last rename and the tidying up left its journal in OUT: it is finished once more."""
        records = read_journal(self.path / JOURNAL)
        if records and records[0].get("started") == dict(identity) and not self.partial.exists():
            os.replace(self.path, self.partial)
            sync_directory(self.path.parent)

    def _take_up(self, identity: Mapping[str, Any]) -> None:
        """Go on with an interrupted run: every journaled shard is checked, what is not in the journal is removed."""
        records = read_journal(self.partial / JOURNAL)
        if not records and not any(self.partial.glob("model-*.safetensors")):
            records = [{"started": dict(identity)}]  # it ended before the first line: nothing is lost
        if not records:
            raise BadInputError(f"{self.partial / JOURNAL} is missing or damaged; --overwrite starts again")
        if records[0].get("started") != dict(identity):
            other = _difference(records[0], identity)
            raise BadInputError(f"{self.partial} was started with another {other}; give the same again, or --overwrite starts again")
        self.entries = records[1:]
        keep = {JOURNAL, PROFILE_DIRECTORY}
        for entry in self.entries:
            for name, checksum in entry["files"].items():
                file = self.partial / name
                if name.startswith("stream-") and entry is not self.entries[-1]:
                    continue  # only the state behind the last layer is needed to go on
                if not file.exists() or sha256(file) != checksum:
                    raise BadInputError(f"{file} is not what the journal says; --overwrite starts again")
                keep.add(name)
        for file in self.partial.iterdir():
            if file.name not in keep and not file.name.startswith(SAMPLE):
                file.unlink() if file.is_file() else shutil.rmtree(file)
        self._write_journal([{"started": dict(identity)}, *self.entries])

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let another run write here."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

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
        temporary = f"{JOURNAL}.writing"
        self._document(temporary, "".join(json.dumps(record) + "\n" for record in records))
        os.replace(self.partial / temporary, self.partial / JOURNAL)
        sync_directory(self.partial)

    def remove(self, name: str) -> None:
        """Delete a file that a recorded one has replaced."""
        (self.partial / name).unlink(missing_ok=True)

    def finish(self, source: Path, config: Mapping[str, Any], documents: Mapping[str, str]) -> None:
        """Index, configuration, tokenizer and documents; then the directory gets its name.

        Args:
            source: the checkpoint, whose tokenizer, generation and template files are carried along.
            documents: further files, name -> text; `moebit.json` gets the checksums of all the others.
        """
        checksums = {name: digest for entry in self.entries for name, digest in entry["files"].items() if not name.startswith("stream-")}
        self._index([name for name in checksums if name.startswith("model-")])
        small = {INDEX, "config.json", *self._carry(source), *documents} - {SEALED}
        self._document("config.json", json.dumps(config, indent=2) + "\n")
        for name, text in documents.items():
            if name != SEALED:
                self._document(name, text)
        checksums |= {name: sha256(self.partial / name) for name in small if not is_report(name)}
        self._document(SEALED, seal(json.loads(documents[SEALED]), checksums))
        for file in self.partial.glob("stream-*"):
            file.unlink()
        shutil.rmtree(self.partial / PROFILE_DIRECTORY, ignore_errors=True)
        sync_directory(self.partial)
        self._give_name()

    def finish_file(self, name: str, documents: Mapping[str, str]) -> None:
        """Documents beside one file that was made of all shards; then the directory gets its name, and the shards are removed."""
        for document, text in documents.items():
            if document != SEALED:
                self._document(document, text)
        checksums = {file: sha256(self.partial / file) for file in [name, *documents] if file != SEALED and not is_report(file)}
        self._document(SEALED, seal(json.loads(documents[SEALED]), checksums))
        sync_directory(self.partial)
        self._give_name(keep=checksums.keys() | documents.keys())

    def _carry(self, source: Path) -> list[str]:
        """Copy tokenizer, generation and template files; their names."""
        files = {file for pattern in CARRIED for file in source.glob(pattern)}
        chosen = sorted(f for f in files if f.is_file() and f.name not in NOT_CARRIED and not f.name.startswith("model.safetensors"))
        for file in chosen:
            with open(file, "rb") as original, open(self.partial / file.name, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
        return [file.name for file in chosen]

    def _index(self, shards: list[str]) -> None:
        headers = {name: read_header(self.partial / name) for name in shards}
        weight_map = {tensor: name for name, header in headers.items() for tensor in header}
        total = sum(entry.spec.nbytes for header in headers.values() for entry in header.values())
        self._document(INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1))

    def _give_name(self, keep: Collection[str] = ()) -> None:
        replaced = self.path.with_name(self.path.name + ".replaced")
        if self.path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.path, replaced)
        os.replace(self.partial, self.path)
        sync_directory(self.path.parent)
        # OUT is whole. What follows only tidies up; the journal goes last, because --resume takes OUT up again as long as it is there.
        shutil.rmtree(replaced, ignore_errors=True)
        if keep:
            # The journal first forgets the shards that go, so that a run that ends here begins anew if it is resumed.
            os.truncate(self.path / JOURNAL, 0)
            for file in [file for file in self.path.iterdir() if file.name not in (JOURNAL, *keep)]:
                file.unlink() if file.is_file() else shutil.rmtree(file)
        (self.path / JOURNAL).unlink()

    def _document(self, name: str, text: str) -> None:
        with open(self.partial / name, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def check_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that exists, or whose interrupted run would have to be decided about.

    Raises:
        BadInputError: naming it and the options.
    """
    partial = partial_of(path)
    if path.exists() and not overwrite:
        raise BadInputError(f"{path} exists; choose another -o, or --overwrite to replace it")
    if partial.exists() and not resume and not overwrite:
        raise BadInputError(f"{partial} holds an interrupted run; --resume goes on with it, --overwrite starts again")


def _check_own(directory: Path) -> None:
    """Only what moebit wrote is ever replaced or tidied up: an empty directory, an output, an interrupted run."""
    if not directory.exists():
        return
    names = {file.name for file in directory.iterdir()} if directory.is_dir() else {"a file"}
    if names and not names & {JOURNAL, f"{JOURNAL}.writing", SEALED} and not any(name.startswith("model-") for name in names):
        raise BadInputError(f"{directory} is no output of moebit and would be deleted; choose another -o, or remove it yourself")


def partial_of(path: Path) -> Path:
    """Where the work for an output goes on."""
    return path.with_name(path.name + ".partial")


def read_journal(file: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the one that was being written when the run ended; none where there is no journal."""
    records: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _difference(started: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """What a journal's first line and this run disagree about."""
    known = started.get("started", {})
    changed = sorted(key for key in {*identity, *known} if known.get(key) != identity.get(key))
    if changed == ["shards"]:
        old, new = known.get("shards", {}), identity.get("shards", {})
        written = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return f"state of the input ({', '.join(written)} changed since)"
    simple = (str, int, float, type(None))
    told = [key for key in changed if isinstance(known.get(key), simple) and isinstance(identity.get(key), simple)]
    return ", ".join(f"{key} ({known[key]}, now {identity[key]})" if key in told and key in known else key for key in changed)


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
    """What to say when a file could not be read or written on the way."""
    elsewhere = isinstance(error.filename, str) and not Path(error.filename).absolute().is_relative_to(partial.absolute())
    failed = f"reading {error.filename} failed" if elsewhere else f"writing to {partial} failed"
    return InterruptedWorkError(
        f"{failed}: {error.strerror or error}; what is finished is kept in {partial}, go on with --resume when this is mended"
    )
