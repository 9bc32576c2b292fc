"""A checkpoint's configuration: config.json as it stands, and as transformers understands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moebit.errors import BadInputError
from moebit.recipe.reading import read_object
from moebit.storage.documents import check_config


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        BadInputError: not a JSON object.
    """
    raw = read_object(path / "config.json", remedy="copy it again", infinite=True)
    check_config(raw, path / "config.json")
    return raw


def load_config(path: Path) -> Any:
    """The transformers configuration of a checkpoint directory.

    Raises:
        BadInputError: unreadable, or an architecture that the installed transformers does not know.
    """
    raw = read_config(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise BadInputError(
            f"{path}: transformers does not know the architecture {raw.get('model_type')!r} ({first_line(error)}); a newer transformers may"
        ) from error
    except Exception as error:  # a configuration's own checks raise what they like
        raise BadInputError(f"{path / 'config.json'}: transformers refuses it ({first_line(error)}); copy it again") from error
    return config


def first_line(error: Exception) -> str:
    """The first line of an error's message, and the second where the first only announces it; what follows are lists and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told if len(told) <= 300 else told[:300] + " …"
