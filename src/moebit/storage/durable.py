"""Small files that are there as a whole, on disk, or not at all; and never in another place than was asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

from moebit.storage.files import sync_directory


def new_file(file: Path) -> BinaryIO:
    """A new file, open to be written, unbuffered. What has this name goes first, so that nothing is written through a link.

    Raises:
        OSError: the disk says no.
    """
    file.unlink(missing_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return open(handle, "wb", buffering=0)


def write_new(file: Path, text: str) -> None:
    """Write a new file in a directory that has no name of its own yet; its content is on disk, its name when the directory is synced.

    Raises:
        OSError: the disk says no.
    """
    sys.audit("moebit.document", str(file))
    with new_file(file) as handle:
        write_all(handle, text.encode("utf-8"))
        os.fsync(handle.fileno())


def write_all(handle: BinaryIO, data: bytes | memoryview) -> None:
    """Write everything: an unbuffered file may take less at a time."""
    done = 0
    while done < len(data):
        done += handle.write(data[done:])


def replace_text(file: Path, text: str) -> None:
    """Put a text in place of a file, all of it or none; afterwards content and name are on disk.

    Raises:
        OSError: the disk says no.
    """
    temporary = file.with_name(f"{file.name}.writing")
    try:
        write_new(temporary, text)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(file.parent)
