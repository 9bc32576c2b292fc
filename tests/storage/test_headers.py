"""A damaged safetensors header: what the safetensors library refuses is refused here, by name; the library itself is asked."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from moebit.errors import BadInputError
from moebit.storage.files import read_header

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def file_of(directory: Path, text: str | bytes, data: int = 12) -> Path:
    raw = text if isinstance(text, bytes) else text.encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(range(data)))
    return path


def header(**tensors: Any) -> str:
    return json.dumps(tensors)


def refused_by_the_library(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as tensors:
            return any(tensors.get_tensor(name) is None for name in tensors.keys())  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, TypeError, OverflowError):
        return True


DAMAGED = {
    "overlap": (header(a=A, b={**B, "data_offsets": [4, 8]}), "'b' .*overlaps"),
    "the same bytes twice": (header(a=A, b={**A}, c=B), "'b' .*overlaps"),
    "gap": (header(a=A, b={**B, "shape": [0], "data_offsets": [12, 12]}), "'b' .*gap"),
    "gap in front": (header(b={**B}), "'b' .*gap"),
    "bytes behind": (header(a=A), "goes on behind its last tensor"),
    "metadata is a list": (header(__metadata__=["pt"], a=A, b=B), "__metadata__"),
    "metadata holds a number": (header(__metadata__={"a": 1}, a=A, b=B), "__metadata__"),
    "byte order mark": (b"\xef\xbb\xbf" + header(a=A, b=B).encode(), "brace"),
    "shape of floats": (header(a={**A, "shape": [2.0]}, b=B), "'a': the shape"),
    "shape of texts": (header(a={**A, "shape": ["2"]}, b=B), "'a': the shape"),
    "shape of truth": (header(a=A, b={**B, "shape": [True]}), "'b': the shape"),
    "shape of billions": (header(a={**A, "shape": [2**40, 2**40]}, b=B), "'a': .*too many"),
    "offsets of floats": (header(a={**A, "data_offsets": [0.0, 8.0]}, b=B), "'a': the bytes"),
    "three offsets": (header(a={**A, "data_offsets": [0, 8, 8]}, b=B), "'a': the bytes"),
    "no type": (header(a={"shape": [2], "data_offsets": [0, 8]}, b=B), "'a' has no type"),
    "nested": ('{"a":' * 200_000, "nested"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged(damage: str, tmp_path: Path) -> None:
    text, said = DAMAGED[damage]
    path = file_of(tmp_path, text)
    assert refused_by_the_library(path)
    with pytest.raises(BadInputError, match=rf"model\.safetensors: .*{said}"):
        read_header(path)


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    """The library takes the last one, and nobody knows which was meant."""
    path = file_of(tmp_path, f'{{"a": {json.dumps(A)}, "b": {json.dumps(B)}, "a": {json.dumps(A)}}}')
    with pytest.raises(BadInputError, match=r"model\.safetensors: .*'a' is there twice"):
        read_header(path)


def test_a_header_begins_with_a_brace(tmp_path: Path) -> None:
    """The format asks for it, though the library reads over blanks."""
    with pytest.raises(BadInputError, match=r"model\.safetensors: .*brace"):
        read_header(file_of(tmp_path, " " + header(a=A, b=B)))


def test_no_file_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadInputError, match=r"regular file|directory"):
            read_header(path)
    with open(tmp_path / "sparse.safetensors", "wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**36)
    with pytest.raises(BadInputError, match="impossible header length"):
        read_header(tmp_path / "sparse.safetensors")


def test_random_damages_are_refused_where_the_library_refuses(tmp_path: Path) -> None:
    """And where the library reads the file, the same tensors with the same shapes and bytes are read here, or nothing."""
    chance, refused = random.Random(0), 0
    text = header(__metadata__={"format": "pt"}, a=A, b=B).encode()
    for _ in range(2000):
        raw = bytearray(text)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(raw))
            raw[at : at + chance.choice((0, 1, 1, 3))] = chance.choice(
                (b"", b"0", b"9", b"-", b",", b"[", b'"', bytes([chance.randrange(256)]))
            )
        path = file_of(tmp_path, bytes(raw))
        bad = refused_by_the_library(path)
        try:
            entries = read_header(path)
        except BadInputError:
            refused += 1
            continue
        assert not bad, bytes(raw)
        with safe_open(path, "pt") as tensors:
            assert {name: tensors.get_tensor(name).tolist() for name in tensors.keys()} == {  # noqa: SIM118
                name: entry.read().tolist() for name, entry in entries.items()
            }
    assert refused > 1000
