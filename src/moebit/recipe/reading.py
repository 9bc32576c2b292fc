"""The one reader of JSON, YAML and text: every document that moebit reads comes through here, and nothing that is read here can hang it.

A document is a regular file of a bounded size, in UTF-8, not nested deeper than `DEPTH`, with every key of a mapping once. YAML is read
as data alone: plain scalars, lists and mappings, without tags, anchors or dates.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from moebit.errors import BadInputError

DOCUMENT_BYTES = 256 * 2**20  # of a document; the largest that models are shipped with, tokenizer.json, are a tenth of that
TEXT_BYTES = 16 * 2**30  # of a text to calibrate or judge on
DEPTH = 64
DIGITS = 4000  # of a number


def read_text(path: str | Path, what: str = "", limit: int = DOCUMENT_BYTES) -> str:
    """The content of a text file.

    Args:
        what: put before the path in messages, such as "--plan ". limit: bytes from which on the file is refused, unread.

    Raises:
        BadInputError: as `read_bytes`, and no UTF-8.
    """
    return as_text(read_bytes(path, what, limit), path, what)


def read_bytes(path: str | Path, what: str = "", limit: int = DOCUMENT_BYTES) -> bytes:
    """The content of a file. The arguments are those of `read_text`.

    Raises:
        BadInputError: missing, no regular file (a pipe or a device could block or never end), too large, not readable.
    """
    try:
        # O_NONBLOCK: to open a pipe that nobody writes to would wait for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadInputError(f"{what}{path}: no regular file, but {_kind(found.st_mode)}; give a file")
            if found.st_size > limit:
                raise BadInputError(f"{what}{path}: {found.st_size:,} bytes, more than the {limit:,} that moebit reads of such a file")
            return file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{what}{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def as_text(raw: bytes, path: str | Path, what: str = "") -> str:
    """Bytes of a file as UTF-8.

    Raises:
        BadInputError: they are none.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{what}{path}: not UTF-8 text ({error}); convert it first") from error


def is_there(path: str | Path) -> bool:
    """Whether there is anything of this name; where no file can have it (too long, with a zero byte), there is nothing."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_json(path: str | Path, what: str = "", *, remedy: str = "write or copy it again", infinite: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        remedy: what a message advises. infinite: whether the numbers NaN and Infinity, which are no JSON, are taken.

    Raises:
        BadInputError: as `read_text`; no JSON, a key twice, nested too deep.
    """
    try:
        return parse_json(read_text(path, what), infinite=infinite)
    except ValueError as error:
        raise BadInputError(f"{what}{path}: not valid JSON ({error}); {remedy}") from error


def read_object(path: str | Path, what: str = "", *, remedy: str = "write or copy it again", infinite: bool = False) -> dict[str, Any]:
    """The content of a JSON file that is an object.

    Raises:
        BadInputError: as `read_json`; something other than an object.
    """
    found = read_json(path, what, remedy=remedy, infinite=infinite)
    if not isinstance(found, dict):
        raise BadInputError(f"{what}{path}: expected a JSON object, got {type(found).__name__}; {remedy}")
    return found


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """JSON text as data.

    Raises:
        ValueError: saying what is wrong, in one line.
    """
    if len(text) > DEPTH:
        _check_brackets(text)
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_constant(infinite), parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH}") from None
    _check_unicode(text, found)
    return found


def _check_brackets(text: str) -> None:
    """How deep brackets are nested, outside of strings; a parser that finds out by recursion is not asked."""
    level, inside, skip = 0, False, False
    if text.count("[") + text.count("{") <= DEPTH:
        return
    for letter in text:
        if skip:
            skip = False
        elif inside:
            skip, inside = letter == "\\", letter != '"'
        elif letter == '"':
            inside = True
        elif letter in "[{":
            level += 1
            if level > DEPTH:
                raise ValueError(f"nested deeper than {DEPTH}")
        elif letter in "]}":
            level -= 1


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _constant(infinite: bool) -> Callable[[str], float]:
    def read(name: str) -> float:
        if not infinite:
            raise ValueError(f"{name} is no JSON")
        return float(name.replace("Infinity", "inf"))

    return read


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _check_unicode(text: str, found: Any) -> None:
    r"""Escapes such as \ud800 can smuggle in half a letter, which nothing can print or write."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    for value in _strings(found):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text that is no valid Unicode ({error.reason})") from None


def _strings(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    for value in [*found, *found.values()] if isinstance(found, dict) else found if isinstance(found, list) else []:
        yield from _strings(value)


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain scalars, lists and mappings."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Refused("anchors and aliases are not read; write the value out", event.start_mark)
        if (tag := getattr(event, "tag", None)) is not None:
            raise _Refused(f"the tag {tag!r} is not read; write plain values", event.start_mark)
        self.depth += 1
        if self.depth > DEPTH:
            raise _Refused(f"nested deeper than {DEPTH}", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise _Refused(f"the key {name!r} is no text", key.start_mark)
            if name in keys:
                raise _Refused(f"the key {name!r} is there twice", key.start_mark)
            keys.add(name)
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: Any) -> None:
        """Merge keys (<<) are like any other key."""


class _Refused(yaml.YAMLError):
    def __init__(self, what: str, mark: Any) -> None:
        super().__init__(f"line {mark.line + 1}: {what}")


def _scalar(loader: yaml.SafeLoader, node: Any) -> Any:
    raise _Refused(f"{node.value!r} is read as a date, bytes or another thing that is no plain value; put it in quotes", node.start_mark)


def _finite(loader: yaml.SafeLoader, node: Any) -> float:
    value = loader.construct_yaml_float(node)
    if not math.isfinite(value):
        raise _Refused(f"{node.value} is no finite number", node.start_mark)
    return float(value)


for _tag in ("timestamp", "binary", "set", "omap", "pairs", "merge", "value"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _finite)


def parse_yaml(text: str) -> Any:
    """YAML text as data.

    Raises:
        ValueError: saying what is wrong, in one line.
    """
    if len(text) > 2**20:
        raise ValueError(f"{len(text):,} letters of YAML, more than the {2**20:,} that moebit reads")
    loader = None
    try:
        loader = _PlainLoader(text)
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()
