"""A checkpoint's configuration: config.json as it stands, and as transformers understands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from moebit.errors import BadInputError
from moebit.recipe.reading import read_object
from moebit.storage.documents import check_config

# Types that transformers does not know, each -> the type whose class computes the same from the same tensors. The code that such a
# checkpoint names in `auto_map` is a copy of that class; moebit runs none of it.
ALIASES = {
    "kimi_k2": "deepseek_v3",  # Moonshot AI: modeling_deepseek.py, DeepseekV3ForCausalLM
}


def known_type(raw: dict[str, Any]) -> str | None:
    """The type under which transformers is to read a configuration whose own it does not know; None where it needs none."""
    kind = raw.get("model_type")
    return ALIASES.get(kind) if isinstance(kind, str) and kind not in CONFIG_MAPPING else None


def portable_config(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json for a directory without a checkpoint's code: a type that transformers knows, and no `auto_map` to look for code."""
    kind = known_type(raw)
    kept = {key: value for key, value in raw.items() if key != "auto_map"}
    return {**kept, "model_type": kind} if kind else kept


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
        kind = known_type(raw)
        if kind:
            return CONFIG_MAPPING[kind].from_dict(portable_config(raw))
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
