"""Documents that people and programs get wrong: each is refused in one sentence, and none hangs or is read as something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moebit.errors import BadInputError
from moebit.recipe.reading import DOCUMENT_BYTES, parse_json, parse_yaml, read_object, read_text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1|Expecting"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1e999}', "too large for a number"),
        ("1" * 5000, "digits"),
        ('{"a": "\\ud800"}', "no valid Unicode"),
        ("﻿{}", "BOM"),
        ("{}{}", "Extra data"),
    ],
)
def test_no_json(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json() -> None:
    text = '{"a": ["' + "[" * 100 + '\\"{", 1.5, -2, null, true, "\\ud83d\\ude00"]}'
    assert parse_json(text) == json.loads(text)
    assert parse_json('{"limit": [0.0, Infinity]}', infinite=True) == {"limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1"),
        ("a: &x [1, 2]\nb: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !!binary aGVsbG8=", "tag"),
        ("a: 2020-01-01", "in quotes"),
        ("a: .nan", "no finite number"),
        ("a: -.inf", "no finite number"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("1: 2", "the key 1 is no text"),
        ("<<: {a: 1}", "in quotes"),
        ("? [a]\n: 1", "no text|unhashable"),
        ("{" * 1000, "nested deeper"),
        ("- " * 100, "nested deeper"),
        ("a: \x00", "not allowed"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_no_plain_yaml(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)


def test_yaml() -> None:
    assert parse_yaml("a:\n  b: [1, 2.5, x, true, null]\n  c: '2020-01-01'\n") == {"a": {"b": [1, 2.5, "x", True, None], "c": "2020-01-01"}}


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(DOCUMENT_BYTES + 1)
    (tmp_path / "list").write_text("[]")
    for name, said in (("pipe", "a pipe"), ("latin", "not UTF-8"), ("sparse", "bytes, more than"), ("absent", "No such file")):
        with pytest.raises(BadInputError, match=said):
            read_text(tmp_path / name)
    for path, said in ((tmp_path, "a directory"), ("/dev/zero", "a device"), (tmp_path / ("x" * 300), "too long"), ("a\0b", "null")):
        with pytest.raises(BadInputError, match=said):
            read_text(path)
    with pytest.raises(BadInputError, match="expected a JSON object, got list"):
        read_object(tmp_path / "list")
