"""Sizes that a person writes, and sizes and durations that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moebit
from moebit import words
from moebit.calibration.rows import Chosen
from moebit.calibration.text import parse_texts
from moebit.errors import BadInputError
from moebit.memory import DEFAULT_MEMORY, memory_bytes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("500MB", 500 * 10**6),
        ("2G", 2 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        (" 128KiB ", 2**17),
        ("1000000B", 10**6),
        ("0.5T", 2**39),
        (2**32, 2**32),
        (DEFAULT_MEMORY, 4 * 2**30),
    ],
)
def test_memory(given: int | str, count: int) -> None:
    assert memory_bytes(given) == count


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "a size such as 4GiB"),
        ("4 apples", "a size such as 4GiB"),
        ("-1GiB", "a size such as 4GiB"),
        ("nan", "a size such as 4GiB"),
        ("inf", "a size such as 4GiB"),
        ("1e9GiB", "a size such as 4GiB"),
        ("٤GiB", "a size such as 4GiB"),
        ("4", "the unit is missing; write 4GiB"),
        ("0.0001", "the unit is missing"),
        ("0", "the unit is missing"),
        ("0GiB", "less than can be meant"),
        ("1KiB", "less than can be meant"),
        ("99999999999TiB", "more than can be meant"),
        (4, "less than can be meant"),
        (-1, "less than can be meant"),
        (10**30, "more than can be meant"),
        (4e9, "bytes as an integer"),
        (float("nan"), "bytes as an integer"),
        (True, "bytes as an integer"),
        (None, "bytes as an integer"),
    ],
)
def test_memory_that_is_none(given: Any, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as error:
        memory_bytes(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", ["evaluate", "compare", "profile", "quantize", "inspect", "sample", "drift", "adapt"])
def test_every_verb_has_the_same_default_and_takes_a_text(verb: str) -> None:
    import inspect

    assert inspect.signature(getattr(moebit, verb)).parameters["memory"].default == DEFAULT_MEMORY


def test_verbs_take_sizes_in_words() -> None:
    text = ROOT / "reference" / "text" / "wiki.eval.txt"
    found = [
        moebit.evaluate(ROOT / "reference" / "olmoe", text=given, window=32, max_tokens=64, memory=memory)
        for given, memory in ((text, "1GiB"), (str(text), 2**30), ([text], "1024MiB"), ({"wiki.eval.txt": text}, "1G"))
    ]
    assert all(one == found[0] for one in found)
    with pytest.raises(BadInputError, match="unit is missing"):
        moebit.inspect(ROOT / "reference" / "olmoe", "rtn-w4", memory="4")


def test_texts_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "a=b.txt"
    file.write_text("x")
    for given in (file, str(file), [file], [str(file)], {"a=b.txt": file}, {"a=b.txt": str(file)}, (file,)):
        assert parse_texts(given) == {"a=b.txt": file}
    assert parse_texts(f"n={file}") == {"n": file}
    assert parse_texts(()) == {}
    assert parse_texts([f"n={file}:title"]) == {"n": Chosen(file, "title")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="none of the 0 files"):
        parse_texts(tmp_path / "empty")
    with pytest.raises(BadInputError, match="3 is no file's name"):
        parse_texts([3])  # type: ignore[list-item] # what a caller without a type checker gives


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (640, "640 B"), (12_345_678, "12.3 MB"), (4 * 2**30, "4.3 GB"), (7 * 10**12, "7.00 TB")]
)
def test_sizes_in_words(count: int, said: str) -> None:
    assert words.size(count) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.5, "0.5 s"), (12, "12 s"), (200, "3 min"), (16_200, "4.5 h")])
def test_durations_in_words(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


@pytest.mark.parametrize("bits", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_target_that_is_no_number(bits: float, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="--target-bits"):
        moebit.allocate(tmp_path, target_bits=bits)


@pytest.mark.parametrize("windows", [{"samples": -3}, {"samples": 0}, {"length": -1}])
def test_windows_that_cannot_be(windows: dict[str, int], tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some words")
    with pytest.raises(BadInputError, match="at least one window"):
        moebit.profile(ROOT / "reference" / "olmoe", tmp_path / "p", text=file, **windows)  # type: ignore[arg-type] # of the names above


def test_a_configuration_that_transformers_refuses_says_why(tmp_path: Path) -> None:
    """The first line of transformers' message only announces the second."""
    import json

    from moebit.storage.config import load_config

    config = json.loads((ROOT / "reference" / "olmoe" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": "many"}))
    with pytest.raises(BadInputError, match=r"attention_dropout.*expected.*many"):
        load_config(tmp_path)
