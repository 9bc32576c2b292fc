"""The checksums of an output, kept in its moebit.json, and the one of moebit.json itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moebit.recipe.reading import parse_json

SEALED = "moebit.json"
KEY = "sha256"
_BLANK = "0" * 64


def is_report(name: str) -> bool:
    """Whether a file tells times and places and is therefore no part of what the checksums cover."""
    return name.startswith("report.")


def seal(document: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The text of moebit.json.

    Args:
        document: its content. files: name -> sha256 of every other file of the output but the reports.

    Returns:
        The document with `files` and `sha256`, the digest of this very text with 64 zeros in the digest's place: anybody can
        check it without knowing how JSON is written here.
    """
    blank = json.dumps({**document, "files": dict(sorted(files.items())), KEY: _BLANK}, indent=1) + "\n"
    return blank.replace(_field(_BLANK), _field(hashlib.sha256(blank.encode()).hexdigest()))


def is_intact(text: str) -> bool:
    """Whether the text of a moebit.json is as `seal` made it.

    Raises:
        ValueError: not a JSON object. KeyError: no `sha256` in it.
    """
    document = parse_json(text)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return hashlib.sha256(text.replace(_field(document[KEY]), _field(_BLANK)).encode()).hexdigest() == document[KEY]


def _field(digest: object) -> str:
    return f'"{KEY}": "{digest}"'
