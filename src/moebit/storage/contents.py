"""What was read of a checkpoint, as checksums taken while it was read: another content is noticed even if a file says that it is as old.

A file whose size and times (of its content and of its status, which no program can set back) are those that were seen has not been written
to. Where they differ, the content decides: it is read once more.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moebit.storage.files import TensorEntry, pieces
from moebit.storage.finite import check_piece

Seen = dict[str, dict[str, Any]]  # file name -> {"stat": [...], "crc32": of its tensors' content}


def status(file: Path) -> list[int]:
    """What changes when a file is written to: size, time of the content and of the status; zeros where it is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return [0, 0, 0]
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def statuses(entries: Iterable[TensorEntry]) -> dict[str, list[int]]:
    """`status` of every file of a checkpoint."""
    return {file.name: status(file) for file in sorted({entry.file for entry in entries})}


def look_through(entries: Iterable[TensorEntry]) -> Seen:
    """Read every tensor once: its numbers are finite, and its bytes make the checksum of its file.

    Raises:
        BadInputError: NaN or infinity, naming the tensor and the place.
    """
    found: Seen = {}
    for entry in sorted(entries, key=lambda e: (e.file, e.offset)):
        known = found.setdefault(entry.file.name, {"stat": status(entry.file), "crc32": 0})
        for begin, piece in pieces(entry):
            check_piece(entry, begin, piece)
            known["crc32"] = zlib.crc32(piece.reshape(-1).view(torch.uint8).numpy().data, known["crc32"])
    return found


def changed(entries: Mapping[str, TensorEntry], seen: Seen) -> list[str]:
    """The files whose content is another than what was seen; those with other times are read again to find out."""
    files = {entry.file.name: entry.file for entry in entries.values()}
    touched = {name for name, file in files.items() if name not in seen or seen[name]["stat"] != status(file)}
    gone = {name for name in touched if not files[name].exists() or name not in seen}
    again = look_through(entry for entry in entries.values() if entry.file.name in touched - gone)
    other = {name for name, found in again.items() if found["crc32"] != seen[name]["crc32"] or found["stat"][0] != seen[name]["stat"][0]}
    return sorted(gone | other | (seen.keys() - files.keys()))
