"""Names that come from documents, and links: what is read as part of a folder lies in that folder."""

from __future__ import annotations

from pathlib import Path

from moebit.errors import BadInputError

NAME_BYTES = 255  # of a file's name, as file systems have it
READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")  # kinds of files that moebit or transformers read


def is_plain(name: object) -> bool:
    """Whether this can be the name of a file in a folder, and of nothing outside of it."""
    if not isinstance(name, str) or not name or name in (".", ".."):
        return False
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return size <= NAME_BYTES and not any(letter in "/\\" or ord(letter) < 32 or ord(letter) == 127 for letter in name)


def home_of(directory: Path) -> tuple[Path, ...]:
    """The folders in which the files of a checkpoint may lie: itself, and for a snapshot of the hub's cache, the blobs beside it."""
    real = directory.resolve()
    return (real, real.parent.parent / "blobs") if real.parent.name == "snapshots" else (real,)


def check_inside(file: Path) -> Path:
    """A file of a checkpoint.

    Raises:
        BadInputError: a link that leads out of the checkpoint's folder.
    """
    if not file.is_symlink():
        return file
    real = file.resolve()
    if not any(real.is_relative_to(home) for home in home_of(file.parent)):
        raise BadInputError(
            f"{file}: is a link to {real}, outside of the checkpoint's folder; "
            "copy the file there if you trust it, or say --follow-links (to inspect and quantize)"
        )
    return file


def check_links(directory: Path) -> None:
    """No file of a checkpoint that is read is a link that leads out of its folder.

    Raises:
        BadInputError: naming the first.
    """
    for file in sorted(directory.iterdir()):
        if file.suffix in READ:
            check_inside(file)
