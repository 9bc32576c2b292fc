"""Documents in files as people have them: prose, JSON, tables, compressed or not, one file or a folder of them.

What a file is, is told by its name (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`, and the first five with `.gz`); everything
else that is UTF-8 is prose, one document. What looks like something else than it is called is refused, never read as prose.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.recipe.reading import TEXT_BYTES, as_text, parse_json, read_bytes
from moebit.storage.documents import understood

UNPACKED_BYTES = 2 * 2**30  # of a compressed text, which may claim to be anything
MOST_FILES = 10_000  # of a folder
PIECE = 2**20
COMPRESSED = ".gz"
# Files that hold something else than a text, whatever may be inside.
NO_TEXT = {
    **dict.fromkeys((".arrow", ".feather", ".npy", ".npz", ".h5"), "convert it to .parquet or .jsonl"),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".tar", ".7z"), "unpack it, or compress it with gzip"),
    **dict.fromkeys((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".pkl", ".pickle"), "give a text"),
    **dict.fromkeys((".pdf", ".docx", ".epub", ".xlsx", ".xls"), "convert it to plain text"),
}
SIDE_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of folders that `datasets` writes


@dataclass(frozen=True)
class Chosen:
    """A file or folder of which one column is meant."""

    path: Path
    column: str


@dataclass(frozen=True)
class Row:
    """One document as data: its fields by name, and where it stands, for messages."""

    where: str
    fields: Any


def files_of(path: Path) -> list[Path]:
    """The files behind a path: itself, or everything in a folder that holds rows; where nothing does, everything that is called .txt.

    Raises:
        BadInputError: a folder with neither, or with too many files.
    """
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
    if len(found) > MOST_FILES:
        raise BadInputError(f"--text {path}: {len(found)} files, more than the {MOST_FILES:,} that moebit reads of a folder")
    rows = [file for file in found if _suffix(file) in READERS and file.name not in SIDE_FILES]
    chosen = rows or [file for file in found if _suffix(file) == ".txt"]
    if not chosen:
        raise BadInputError(f"--text {path}: none of the {len(found)} files in this folder is called {', '.join(READERS)} or .txt")
    return chosen


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffix(file: Path) -> str:
    """What a file is called, without .gz: `.jsonl` of `a.JSONL.gz`."""
    name = file.name.lower()
    return Path(name.removesuffix(COMPRESSED)).suffix


def read_documents(file: Path, columns: frozenset[str]) -> str | Iterator[Row]:
    """The prose of a file, or its rows.

    Args:
        columns: the fields that are of use; of tables with columns of their own, only these are read.

    Raises:
        BadInputError: what is no text, too large, or not what its name says.
    """
    suffix = _suffix(file)
    if suffix in NO_TEXT:
        raise BadInputError(f"{file}: a {suffix} file is no text; {NO_TEXT[suffix]}")
    if suffix == ".parquet":
        return _parquet(file, columns)
    text = as_text(unpacked(file), file)
    if suffix in READERS:
        return READERS[suffix](file, text.removeprefix("\ufeff"))  # spreadsheets begin their tables with it
    _check_prose(file, text)
    return text


def beginnings(source: Path | Chosen, size: int) -> list[str]:
    """The first `size` characters of every file that is prose."""
    files = files_of(source if isinstance(source, Path) else source.path)
    return [as_text(unpacked(file), file)[:size] for file in files if _suffix(file) not in READERS]


def unpacked(file: Path) -> bytes:
    """The content of a file, decompressed where it is called .gz.

    Raises:
        BadInputError: damaged, or larger than `UNPACKED_BYTES` when it is unpacked.
    """
    raw = read_bytes(file, limit=TEXT_BYTES)
    if not file.name.lower().endswith(COMPRESSED):
        return raw
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file_inside:
            content = file_inside.read(UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInputError(f"{file}: not compressed by gzip, or damaged ({error}); copy it again") from error
    if len(content) > UNPACKED_BYTES:
        raise BadInputError(f"{file}: more than {UNPACKED_BYTES:,} bytes when it is unpacked; cut it into smaller files")
    return content


def _check_prose(file: Path, text: str) -> None:
    """Prose does not begin with a line that is an object of JSON."""
    first = text[:PIECE].lstrip().partition("\n")[0].strip()
    if not (first.startswith("{") and first.endswith("}")):
        return
    try:
        found = parse_json(first)
    except ValueError:
        return
    if isinstance(found, dict) and found:
        raise BadInputError(f"{file}: its first line is an object of JSON with {', '.join(list(found)[:5])}; call the file .jsonl")


def _lines(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                yield Row(where, parse_json(line))
            except ValueError as error:
                raise BadInputError(f"{where}: not valid JSON ({error})") from error


def _json(file: Path, text: str) -> Iterator[Row]:
    """A list of documents, an object that holds one list of them, one document; or lines, as many a .json is."""
    try:
        found = parse_json(text)
    except ValueError as error:
        if not _looks_like_lines(text):
            raise BadInputError(f"{file}: not valid JSON ({error})") from error
        yield from _lines(file, text)
        return
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        found = lists[0] if len(lists) == 1 and not set(found) & WHOLE else [found]
    if not isinstance(found, list):
        raise BadInputError(f"{file}: expected a list of documents, got {type(found).__name__}")
    for number, item in enumerate(found, 1):
        yield Row(f"{file}, document {number}", item)


WHOLE = {"messages", "conversations", "prompt", "completion"}  # fields of one document whose values may be lists of objects


def _looks_like_lines(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(parse_json(first), dict)
    except ValueError:
        return False


def _table(file: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Rows under a header that names the columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise BadInputError(f"{file}: a column is named twice in its first line, which has to name them")
        for number, values in enumerate(reader, 2):
            if values:
                where = f"{file}, row {number}"
                if len(values) != len(header):
                    raise BadInputError(f"{where}: {len(values)} values for the {len(header)} columns of the first line")
                yield Row(where, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise BadInputError(f"{file}, row {reader.line_num}: no table with {delimiter!r} between its values ({error})") from error


def _parquet(file: Path, columns: frozenset[str]) -> Iterator[Row]:
    if file.name.lower().endswith(COMPRESSED):
        raise BadInputError(f"{file}: parquet is compressed inside; unpack it")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise BadInputError(f"{file}: parquet is read by pyarrow, which is not installed: pip install 'moebit[parquet]'") from error
    if not file.is_file():
        raise BadInputError(f"{file}: no regular file; give a file")
    with understood(file), parquet.ParquetFile(file) as table:
        names = [name for name in table.schema_arrow.names if name in columns]
        if not names:
            yield Row(f"{file}, row 1", dict.fromkeys(table.schema_arrow.names))
            return
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        if (size := sum(group.total_byte_size for group in groups)) > UNPACKED_BYTES:
            raise BadInputError(f"{file}: {size:,} bytes when it is unpacked, more than {UNPACKED_BYTES:,}; cut it into smaller files")
        number = 0
        for batch in table.iter_batches(columns=names):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{file}, row {number}", {name: value for name, value in fields.items() if value is not None})


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": lambda file, text: iter(()),  # read by itself: it is no text
}
