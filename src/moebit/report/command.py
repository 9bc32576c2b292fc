"""A call as it could be written again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any


def python_call(name: str, *arguments: Any, **options: Any) -> str:
    """`name(argument, option=value)` as Python text.

    Options that are None, False or empty are left out, and those given as (value, default) where the two are equal. What has no
    short form (an object) is named by its type.
    """
    told = [_shown(value) for value in arguments]
    for key, value in options.items():
        given, default = value if isinstance(value, tuple) and len(value) == 2 and key not in ("text",) else (value, None)
        if given in (None, False) or given == default or (isinstance(given, Mapping | Sequence) and not given):
            continue
        told.append(f"{key}={_shown(given)}")
    return f"{name}({', '.join(told)})"


def _shown(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return repr(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return repr(value) if isinstance(value, str | int | float | bool | None) else f"<{type(value).__name__}>"
