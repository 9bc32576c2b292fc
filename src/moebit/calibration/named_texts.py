"""Which texts are meant: names and files, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moebit.errors import BadInputError
from moebit.recipe.reading import is_there

Item = str | os.PathLike[str]  # `[NAME=]FILE`, or a path
Texts = Item | Sequence[Item] | Mapping[str, Item]  # one file, several, or files by name


def parse_texts(items: Texts) -> dict[str, Path]:
    """Files by name, from one `[NAME=]FILE` item or path, several of them, or a mapping; the name defaults to the file's.

    Raises:
        BadInputError: a missing file, a directory, the same name twice, something that is no text.
    """
    if isinstance(items, Mapping):
        pairs = [(str(name), _path(file)) for name, file in items.items()]
    else:
        pairs = [_pair(item) for item in ([items] if isinstance(items, str | os.PathLike) else items)]
    result: dict[str, Path] = {}
    for name, path in pairs:
        if name in result:
            raise BadInputError(f"--text: the name {name!r} is given twice ({result[name]} and {path}); write NAME=FILE to tell them apart")
        if is_there(path) and path.is_dir():
            raise BadInputError(f"--text: {path} is a directory; give the files in it, one --text for each")
        if not is_there(path) or not path.is_file():
            raise BadInputError(f"--text: no such file: {path}")
        result[name] = path
    return result


def _path(item: object) -> Path:
    if not isinstance(item, str | os.PathLike):
        raise BadInputError(f"--text: {item!r} is no file's name; give a str or a Path")
    return Path(item)


def _pair(item: Item) -> tuple[str, Path]:
    if not isinstance(item, str):
        return _path(item).name, _path(item)
    name, equals, file = item.partition("=")
    if equals and not is_there(item):
        return name, Path(file)
    return Path(item).name, Path(item)
