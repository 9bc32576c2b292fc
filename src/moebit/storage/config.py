"""A checkpoint's configuration: config.json as it stands, and as transformers understands it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moebit.errors import BadInputError


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        BadInputError: not a JSON object.
    """
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadInputError(f"{path / 'config.json'}: not valid JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise BadInputError(f"{path / 'config.json'}: expected a JSON object, got {type(raw).__name__}")
    return raw


def load_config(path: Path) -> Any:
    """The transformers configuration of a checkpoint directory.

    Raises:
        BadInputError: unreadable, or an architecture that the installed transformers does not know.
    """
    raw = read_config(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError) as error:
        raise BadInputError(
            f"{path}: transformers does not know the architecture {raw.get('model_type')!r} ({first_line(error)}); a newer transformers may"
        ) from error
    except Exception as error:  # a configuration's own checks raise what they like
        raise BadInputError(f"{path / 'config.json'}: transformers refuses it ({first_line(error)}); copy it again") from error
    return config


def first_line(error: Exception) -> str:
    """The first line of an error's message, which transformers continues with lists and advice."""
    lines = str(error).splitlines() or [""]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + " …"
