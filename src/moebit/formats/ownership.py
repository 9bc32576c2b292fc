"""What moebit may delete: what it wrote itself, proved name by name.

A finished output is proved by its seal: moebit.json is as it was written, and names every other file of the directory. An interrupted
run is proved by its journal, whose lines are chained by checksums: it names the files that are whole and those that finishing makes; the
others are the work in progress, which has names of its own. A directory with anything else in it is somebody else's, and so is a link.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.seal import SEALED, is_intact
from moebit.recipe.reading import parse_json, read_text
from moebit.storage.places import is_plain

JOURNAL = "journal.jsonl"
SAMPLE = "calibration.jsonl"  # text that the model wrote for its own calibration; beginning with this name, what is finished of it
PROFILE_DIRECTORY = "profile"  # in OUT.partial: whole after every data set, gone when the output is finished
REPORTS = ("report.json", "report.html")  # they tell times and places, and the seal does not cover them
LINE = "line"  # of a journal: the checksum of a line and of all before it
_WORK = re.compile(r"(model-\d{5}-of-\d{5}|stream-\d{5}|switch)\.safetensors|activations-\w+")
_SAMPLED = {SAMPLE, f"{SAMPLE}.partial"}


def chained(record: Mapping[str, Any], before: str) -> dict[str, Any]:
    """A line of a journal with its checksum. `before`: that of the line before it, or nothing."""
    text = before + json.dumps({key: value for key, value in record.items() if key != LINE}, sort_keys=True)
    return {**record, LINE: hashlib.sha256(text.encode()).hexdigest()}


def read_journal(file: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that is not as it was written; none where there is no journal."""
    records: list[dict[str, Any]] = []
    try:
        text = read_text(file)
    except BadInputError:
        return records
    for line in text.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            break
        if not isinstance(record, dict) or record != chained(record, records[-1][LINE] if records else ""):
            break
        records.append(record)
    return records


def sealed_names(directory: Path) -> set[str] | None:
    """The files that the seal of an output names, with moebit.json itself; None where nothing is sealed here."""
    try:
        text = read_text(directory / SEALED)
        files = parse_json(text)["files"] if is_intact(text) else None
    except (BadInputError, ValueError, KeyError, TypeError):
        return None
    return {SEALED, *files} if isinstance(files, dict) and all(map(is_plain, files)) else None


def seal_of(directory: Path) -> str:
    """sha256 of the moebit.json of an output, by which a later run knows it again; nothing where there is none."""
    file = directory / SEALED
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() and not file.is_symlink() else ""


def foreign_to_output(directory: Path) -> str | None:
    """Why a directory is no output of moebit that may be deleted; None if it is one, or empty."""
    if (why := _no_directory(directory)) or not any(directory.iterdir()):
        return why
    known = sealed_names(directory)
    if known is None:
        return f"it has no intact {SEALED}"
    unfinished = journaled(read_journal(directory / JOURNAL))  # a run that ended while it tidied up left some of these
    return _others(directory, {*known, *REPORTS, JOURNAL, *unfinished}, directories=())


def foreign_to_partial(directory: Path) -> str | None:
    """Why a directory is no interrupted run of moebit that may be deleted or gone on with; None if it is one, or empty."""
    if why := _no_directory(directory):
        return why
    there = {file.name for file in directory.iterdir()}
    records = read_journal(directory / JOURNAL)
    if not records and there - {f"{JOURNAL}.writing"}:
        return f"it has no intact {JOURNAL}"
    known = {JOURNAL, *_SAMPLED, *journaled(records)}
    known |= {name for name in there if _WORK.fullmatch(name.removesuffix(".writing"))}
    return _others(directory, known, directories=(PROFILE_DIRECTORY,)) or _foreign_profile(directory / PROFILE_DIRECTORY)


def journaled(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Every file that a journal names: those that are whole, and those that finishing makes."""
    return {name for record in records for name in [*record.get("files", {}), *record.get("names", [])]}


def _no_directory(directory: Path) -> str | None:
    if directory.is_symlink():
        return "it is a link"
    return None if directory.is_dir() else "it is no directory"


def _others(directory: Path, known: set[str], directories: tuple[str, ...]) -> str | None:
    for file in sorted(directory.iterdir()):
        mode = file.lstat().st_mode
        if file.name in directories and stat.S_ISDIR(mode):
            continue
        if not (file.name in known or file.name.removesuffix(".writing") in known) or not stat.S_ISREG(mode):
            return f"it holds {file.name!r}, which moebit did not write"
    return None


def _foreign_profile(directory: Path) -> str | None:
    if not directory.exists():
        return None
    known = {file.name for file in directory.iterdir() if file.suffix == ".safetensors" or file.name.endswith(".safetensors.writing")}
    return _others(directory, {"profile.json", *known}, directories=())


def check_own(directory: Path, why: str | None) -> None:
    """Refuse to delete what is not moebit's own.

    Args:
        why: what `foreign_to_output` or `foreign_to_partial` says about it.

    Raises:
        BadInputError: naming what is in the way.
    """
    if why:
        raise BadInputError(f"{directory} is no output of moebit and would be deleted: {why}; choose another -o, or remove it yourself")


def empty(directory: int, keep: Iterable[str] = ()) -> None:
    """Remove what is in an open directory that was found to be moebit's own, but for some names."""
    for name in sorted(set(os.listdir(directory)) - set(keep)):
        if name == PROFILE_DIRECTORY:
            shutil.rmtree(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)


def remove_output(directory: Path) -> None:
    """Remove an output, the seal last, so that what a crash leaves of it is still known as moebit's own.

    Raises:
        BadInputError: it is not moebit's own. OSError: the disk says no.
    """
    check_own(directory, foreign_to_output(directory))
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        empty(handle, keep=[SEALED])
        empty(handle)
    finally:
        os.close(handle)
    directory.rmdir()
