"""An output directory that is either complete or visibly unfinished.

Work goes on in OUT.partial: shards that have their final name are whole and synced, journal.jsonl says which there are. `finish` adds what
belongs to the whole model and renames the directory. The order is always the same: a file's content reaches the disk, then its name, then
the journal entry that speaks of it, then what it replaces is removed. The directory is locked before anything in it is touched, and the one
that gets the name OUT is the one that was locked.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError, InterruptedWorkError
from moebit.formats.carried import carried_files, copy_carried
from moebit.formats.ownership import (
    JOURNAL,
    LINE,
    PROFILE_DIRECTORY,
    SAMPLE,
    chained,
    check_own,
    empty,
    foreign_to_output,
    foreign_to_partial,
    read_journal,
    remove_output,
    seal_of,
)
from moebit.formats.seal import SEALED, is_report, seal
from moebit.storage.durable import replace_text, write_new
from moebit.storage.files import INDEX, ShardFile, TensorSpec, read_header, sha256, sync_directory

__all__ = [
    "JOURNAL", "PROFILE_DIRECTORY", "SAMPLE", "OutputDirectory", "check_free", "check_space", "disk_error", "partial_of", "read_journal",
]  # fmt: skip


class OutputDirectory:
    """The writer of one output.

    Raises:
        BadInputError: OUT or OUT.partial is in the way, or not moebit's own; another run is writing there; an interrupted run of something
            else, or one whose files are not what its journal says.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path, self.partial, self.replaced = path, partial_of(path), path.with_name(path.name + ".replaced")
        self.entries: list[dict[str, Any]] = []
        self._line = ""
        self._held: int | None = None
        if resume:
            self._reopen(identity)
        check_free(path, resume=resume, overwrite=overwrite)
        there = os.path.lexists(self.partial)
        if there:
            _check_no_link(self.partial)
        else:
            self._make()
        self._lock()
        try:
            self._begin(identity, there=there, resume=resume)
        except BaseException:
            self.release()
            raise

    def _begin(self, identity: Mapping[str, Any], *, there: bool, resume: bool) -> None:
        """Behind the lock: go on with what is there, or start over."""
        check_own(self.partial, foreign_to_partial(self.partial) if not resume else None)
        if there and resume and self._take_up(identity):
            return
        assert self._held is not None
        self._check_replaced([])
        empty(self._held, keep=[JOURNAL])  # the journal, which proves what this is, is replaced last
        self._write_journal([{"started": dict(identity)}])

    def _make(self) -> None:
        try:
            if not self.partial.parent.exists():
                self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        except OSError as error:
            raise BadInputError(f"cannot write {self.partial}: {error.strerror}; choose another -o") from error
        sync_directory(self.partial.parent)

    def _lock(self) -> None:
        """One run at a time may write here; the lock ends with the process, however it ends."""
        try:
            self._held = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = self._is_held(self.partial)
        except OSError:
            held = False
        if not held:
            self.release()
            raise BadInputError(f"{self.partial}: another run is writing there; wait for it, or choose another -o")

    def _is_held(self, path: Path) -> bool:
        """Whether this path is the directory that was locked, and not one that has come in its place."""
        assert self._held is not None
        ours, there = os.fstat(self._held), os.stat(path, follow_symlinks=False)
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)

    def _reopen(self, identity: Mapping[str, Any]) -> None:
        """A run that ended between the last rename and the tidying up left its journal in OUT: it is finished once more."""
        if self.path.is_symlink() or os.path.lexists(self.partial):
            return
        records = read_journal(self.path / JOURNAL)
        if not records or records[0].get("started") != dict(identity) or foreign_to_output(self.path) is not None:
            return
        made = next((record["names"] for record in records if record.get("kind") == "made"), None)
        if made is not None:  # its shards may be gone: it is whole, and only the tidying up is left
            self._tidy_finished(made)
            return
        os.replace(self.path, self.partial)
        sync_directory(self.path.parent)

    def _tidy_finished(self, keep: Collection[str]) -> None:
        """Remove what a finished output was made of; the journal, which proves whose it is, goes last."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            empty(handle, keep={JOURNAL, *keep})
            empty(handle, keep=keep)
        except BlockingIOError as error:
            raise BadInputError(f"{self.path}: another run is tidying up there; wait for it") from error
        finally:
            os.close(handle)

    def _take_up(self, identity: Mapping[str, Any]) -> bool:
        """Go on with an interrupted run: every journaled shard is checked, what is not in the journal is removed.

        Returns:
            False for one that ended before its first line, so that nothing is lost by starting over.
        """
        records = read_journal(self.partial / JOURNAL)
        if not records and {file.name for file in self.partial.iterdir()} <= {f"{JOURNAL}.writing"}:
            return False
        if not records:
            raise BadInputError(f"{self.partial / JOURNAL} is missing or damaged; remove {self.partial} yourself to start again")
        if records[0].get("started") != dict(identity):
            other = _difference(records[0], identity)
            raise BadInputError(f"{self.partial} was started with another {other}; give the same again, or --overwrite starts again")
        check_own(self.partial, foreign_to_partial(self.partial))
        self._check_replaced(records)
        self.entries = records[1:]
        _check_order(self.partial, self.entries)
        kept = {JOURNAL, PROFILE_DIRECTORY, SAMPLE, f"{SAMPLE}.partial", *_check_files(self.partial, self.entries)}
        assert self._held is not None
        empty(self._held, keep=kept)
        self._write_journal([{"started": dict(identity)}, *self.entries])
        return True

    def _check_replaced(self, records: list[dict[str, Any]]) -> None:
        """OUT.replaced is where the former OUT goes for a moment; what is there already is the user's, unless the journal put it there."""
        moved = [record["seal"] for record in records if record.get("kind") == "replacing"]
        wanted = os.path.lexists(self.path) or moved
        if wanted and os.path.lexists(self.replaced) and seal_of(self.replaced) not in moved:
            raise BadInputError(f"{self.replaced} is in the way: the former {self.path.name} is put there for a moment; move it away")

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
        sys.audit("moebit.record", str(self.partial), kind)
        self._append({"kind": kind, "files": {name: sha256(self.partial / name) for name in files}, **facts})

    def _append(self, record: dict[str, Any]) -> None:
        entry = self._chain(record)
        self.entries.append(entry)
        with open(self.partial / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _chain(self, record: Mapping[str, Any]) -> dict[str, Any]:
        entry = chained(json.loads(json.dumps(record)), self._line)
        self._line = entry[LINE]
        return entry

    def _write_journal(self, records: list[dict[str, Any]]) -> None:
        self._line = ""
        lines = [self._chain(record) for record in records]
        self.entries = lines[1:]
        replace_text(self.partial / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))

    def remove(self, name: str) -> None:
        """Delete a file that a recorded one has replaced."""
        (self.partial / name).unlink(missing_ok=True)

    def finish(self, source: Path, config: Mapping[str, Any], documents: Mapping[str, str], *, follow_links: bool = False) -> None:
        """Index, configuration, tokenizer and documents; then the directory gets its name.

        Args:
            source: the checkpoint, whose tokenizer, generation and template files are carried along.
            documents: further files, name -> text; `moebit.json` gets the checksums of all the others.
        """
        checksums = {name: digest for entry in self.entries for name, digest in entry["files"].items() if not name.startswith("stream-")}
        shards = [name for name in checksums if name.startswith("model-")]
        _check_whole(self.partial, shards)
        carried = carried_files(source, {*documents, *checksums}, follow_links=follow_links)
        small = {INDEX, "config.json", *(file.name for file in carried), *documents}
        if not any(entry["kind"] == "finish" and set(entry["names"]) == small for entry in self.entries):
            self._append({"kind": "finish", "files": {}, "names": sorted(small)})
        self._index(shards)
        copy_carried(carried, self.partial)
        self._document("config.json", json.dumps(config, indent=2) + "\n")
        for name, text in documents.items():
            if name != SEALED:
                self._document(name, text)
        checksums |= {name: sha256(self.partial / name) for name in small - {SEALED} if not is_report(name)}
        self._document(SEALED, seal(json.loads(documents[SEALED]), checksums))
        self._tidy({*checksums, *small, JOURNAL})
        sync_directory(self.partial)
        self._give_name()

    def announce(self, name: str) -> None:
        """Note that finishing makes a file of this name, before it is begun: an interrupted run is then known as its owner."""
        if not any(entry["kind"] == "finish" and name in entry["names"] for entry in self.entries):
            self._append({"kind": "finish", "files": {}, "names": [name]})

    def finish_file(self, name: str, documents: Mapping[str, str]) -> None:
        """Documents beside one file that was made of all shards; then the directory gets its name, and the shards are removed."""
        small = set(documents)
        if not any(entry["kind"] == "finish" and set(entry["names"]) == small for entry in self.entries):
            self._append({"kind": "finish", "files": {}, "names": sorted(small)})
        for document, text in documents.items():
            if document != SEALED:
                self._document(document, text)
        checksums = {file: sha256(self.partial / file) for file in [name, *documents] if file != SEALED and not is_report(file)}
        self._document(SEALED, seal(json.loads(documents[SEALED]), checksums))
        check_own(self.partial, foreign_to_partial(self.partial))
        sync_directory(self.partial)
        self._append({"kind": "made", "files": {}, "names": sorted({*checksums, *documents})})  # from here on the shards may go
        self._give_name(keep={*checksums, *documents})

    def _tidy(self, keep: set[str]) -> None:
        """Work in progress goes: what is left is what the seal names, and the journal."""
        assert self._held is not None
        check_own(self.partial, foreign_to_partial(self.partial))
        empty(self._held, keep=keep)

    def _index(self, shards: list[str]) -> None:
        headers = {name: read_header(self.partial / name) for name in shards}
        weight_map = {tensor: name for name, header in headers.items() for tensor in header}
        total = sum(entry.spec.nbytes for header in headers.values() for entry in header.values())
        self._document(INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1))

    def _give_name(self, keep: Collection[str] = ()) -> None:
        if not self._is_held(self.partial):
            raise InterruptedWorkError(f"{self.partial} was moved or replaced while it was being written; {self.path} is left as it was")
        if os.path.lexists(self.path):
            check_own(self.path, foreign_to_output(self.path))
            if os.path.lexists(self.replaced):
                self._check_replaced(self.entries)
                remove_output(self.replaced)
            self._append({"kind": "replacing", "files": {}, "seal": seal_of(self.path)})
            os.replace(self.path, self.replaced)
        os.replace(self.partial, self.path)
        sync_directory(self.path.parent)
        # OUT is whole. What follows only tidies up; the journal goes last, because --resume takes OUT up again as long as it is there.
        moved = {entry["seal"] for entry in self.entries if entry["kind"] == "replacing"}
        if os.path.lexists(self.replaced) and seal_of(self.replaced) in moved:
            remove_output(self.replaced)
        if keep:  # the shards that the file was made of go
            assert self._held is not None
            sys.audit("moebit.tidy", str(self.path))
            empty(self._held, keep={JOURNAL, *keep})
        (self.path / JOURNAL).unlink()

    def _document(self, name: str, text: str) -> None:
        write_new(self.partial / name, text)


def check_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that exists or is not moebit's to replace, or whose interrupted run would have to be decided about.

    Raises:
        BadInputError: naming it and the options.
    """
    partial = partial_of(path)
    if os.path.lexists(path) and not overwrite:
        raise BadInputError(f"{path} exists; choose another -o, or --overwrite to replace it")
    if os.path.lexists(partial) and not resume and not overwrite:
        raise BadInputError(f"{partial} holds an interrupted run; --resume goes on with it, --overwrite starts again")
    if os.path.lexists(path):
        check_own(path, foreign_to_output(path))


def _check_no_link(partial: Path) -> None:
    if partial.is_symlink() or not partial.is_dir():
        raise BadInputError(f"{partial}: is {'a link' if partial.is_symlink() else 'no directory'}; moebit works in a directory of its own")


def _check_order(partial: Path, entries: list[dict[str, Any]]) -> None:
    """Layers are finished one after the other, and the rest behind the last: a journal that says otherwise is not believed."""
    indices = [entry.get("index") for entry in entries if entry["kind"] == "layer"]
    if indices != list(range(len(indices))):
        raise BadInputError(f"{partial / JOURNAL} lacks a layer; --overwrite starts again")


def _check_files(partial: Path, entries: list[dict[str, Any]]) -> set[str]:
    """The names of the files that a journal says are whole, and are.

    Raises:
        BadInputError: one is missing, or its bytes are others.
    """
    keep = set()
    for number, entry in enumerate(entries):
        for name, checksum in entry["files"].items():
            file = partial / name
            if name.startswith("stream-") and number < len(entries) - 1:
                continue  # only the state behind the last layer is needed to go on
            if not file.is_file() or sha256(file) != checksum:
                raise BadInputError(f"{file} is not what the journal says; --overwrite starts again")
            keep.add(name)
    return keep


def _check_whole(partial: Path, shards: list[str]) -> None:
    """All parts are there, as their names say.

    Raises:
        InterruptedWorkError: one is missing.
    """
    total = int(shards[0].rpartition("-of-")[2].removesuffix(".safetensors")) if shards else 0
    if len(set(shards)) != total:
        raise InterruptedWorkError(f"{partial}: {len(set(shards))} of {total} parts are finished; --overwrite starts again")


def partial_of(path: Path) -> Path:
    """Where the work for an output goes on."""
    return path.with_name(path.name + ".partial")


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
