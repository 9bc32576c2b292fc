"""Which texts are meant: names and files, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moebit.calibration.rows import Chosen, files_of
from moebit.errors import BadInputError
from moebit.recipe.reading import is_there

Item = str | os.PathLike[str]  # `[NAME=]FILE[:COLUMN]`, or a path
Texts = Item | Sequence[Item] | Mapping[str, Item]  # one file, several, or files by name


def parse_texts(items: Texts) -> dict[str, Path | Chosen]:
    """Files and folders by name, from one `[NAME=]FILE[:COLUMN]` item or path, several, or a mapping; the name defaults to the file's.

    Raises:
        BadInputError: a missing file, an empty folder, the same name twice, something that is no text.
    """
    if isinstance(items, Mapping):
        pairs = [(str(name), _source(_path(file))) for name, file in items.items()]
    else:
        pairs = [_pair(item) for item in ([items] if isinstance(items, str | os.PathLike) else items)]
    result: dict[str, Path | Chosen] = {}
    for name, source in pairs:
        if name in result:
            raise BadInputError(
                f"--text: the name {name!r} is given twice ({_said(result[name])} and {_said(source)}); write NAME=FILE to tell them apart"
            )
        path = source if isinstance(source, Path) else source.path
        if not is_there(path) or not (path.is_file() or path.is_dir()):
            raise BadInputError(f"--text: no such file: {_said(source)}")
        files_of(path)
        result[name] = source
    return result


def _said(source: Path | Chosen) -> str:
    return str(source) if isinstance(source, Path) else f"{source.path}:{source.column}"


def _path(item: object) -> Path:
    if not isinstance(item, str | os.PathLike):
        raise BadInputError(f"--text: {item!r} is no file's name; give a str or a Path")
    return Path(item)


def _source(path: Path) -> Path | Chosen:
    """`FILE:COLUMN`, where there is no file of the whole name."""
    file, colon, column = str(path).rpartition(":")
    return Chosen(Path(file), column) if colon and column and not is_there(path) and is_there(file) else path


def _pair(item: Item) -> tuple[str, Path | Chosen]:
    if isinstance(item, str) and not is_there(item):
        name, equals, file = item.partition("=")
        if equals:
            return name, _source(Path(file))
    source = _source(_path(item))
    return (source if isinstance(source, Path) else source.path).name, source
