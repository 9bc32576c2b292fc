"""Reading recipes: presets, files, dicts and overrides; what is wrong with one is said by name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from moebit.errors import BadInputError
from moebit.recipe.reading import is_there, parse_yaml, read_text
from moebit.recipe.recipe import Recipe

DEFAULT = "gptq-w4"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # for the package's own files; libyaml is six times as fast
NAME = re.compile(r"[a-z0-9._-]{1,64}")  # of a preset


def presets() -> dict[str, str]:
    """The shipped recipes: name -> YAML text."""
    files = sorted(resources.files("moebit").joinpath("recipe", "presets").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")}


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a preset's name, a YAML file, a dict, or nothing (the default: `gptq-w4`), with `key.path` overrides on top.

    Raises:
        BadInputError: unknown preset, unreadable file, unknown key (naming the nearest known one), a value that cannot be.
    """
    if isinstance(recipe, Recipe):
        data: dict[str, Any] = recipe.model_dump()
    elif isinstance(recipe, Mapping):
        data = _copied(recipe)
    else:
        data = _read(recipe if recipe is not None else DEFAULT)
    for path, value in (overrides or {}).items():
        _set(data, path, value)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise BadInputError("recipe: " + "; ".join(_explain(item) for item in error.errors())) from error


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` of the command line; the value is read as YAML.

    Raises:
        BadInputError: no `=`.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise BadInputError(f"--set {text}: expected key.path=value, for example --set weights.bits=3")
    try:
        return path, parse_yaml(value)
    except ValueError as error:
        raise BadInputError(f"--set {text}: the value is not valid YAML ({error})") from error


def _copied(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain values, which overrides may change."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(recipe)))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInputError(f"recipe: the dict holds something that a recipe cannot hold ({error}); give plain values") from error
    return copied


def _read(recipe: str | Path) -> dict[str, Any]:
    if (preset := _preset(recipe)) is not None:
        shipped: dict[str, Any] = yaml.load(preset, Loader=_LOADER)
        return shipped
    try:
        data = parse_yaml(_text(recipe))
    except ValueError as error:
        raise BadInputError(f"recipe {recipe}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise BadInputError(f"recipe {recipe}: expected a mapping of sections, got {type(data).__name__}")
    return data


def _preset(recipe: str | Path) -> str | None:
    """The YAML text of a preset; None where no preset has this name."""
    if not NAME.fullmatch(str(recipe)):
        return None
    preset = resources.files("moebit").joinpath("recipe", "presets", f"{recipe}.yaml")
    return preset.read_text(encoding="utf-8") if preset.is_file() else None


def _text(recipe: str | Path) -> str:
    """The YAML text of a file."""
    if is_there(Path(recipe)):
        return read_text(Path(recipe), "recipe ")
    known = list(presets())
    near = difflib.get_close_matches(str(recipe)[:200], known, n=3, cutoff=0.0)
    raise BadInputError(
        f"recipe {str(recipe)!r}: neither a preset nor a file; did you mean {', '.join(map(repr, near[:-1]))} or {near[-1]!r}? "
        f"(`moebit recipes` lists all {len(known)} presets)"
    )


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise BadInputError(f"--set {path}: {key!r} is a value, not a section")
    data[leaf] = value


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    model: Any = Recipe
    for part in item["loc"][:-1]:
        model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
    return f"{path}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f" (known here: {', '.join(known)})")
