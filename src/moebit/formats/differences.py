"""What two runs disagree about, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS = "settings"  # the recipe's values in a journal's first line, beside its digest: to say what differs


def difference(known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """What two runs disagree about; of recipes, every value that differs."""
    changed = sorted(key for key in {*identity, *known} if known.get(key) != identity.get(key))
    if changed == ["shards"]:
        old, new = known.get("shards", {}), identity.get("shards", {})
        written = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return f"state of the input ({', '.join(written)} changed since)"
    if isinstance(known.get(SETTINGS), Mapping) and "recipe" in changed:
        values = _values_that_differ(known[SETTINGS], identity.get(SETTINGS, {}))
        changed = [key for key in changed if key not in ("recipe", SETTINGS)]
        return ", ".join([f"recipe ({values})", *([difference(_of(known, changed), _of(identity, changed))] if changed else [])])
    simple = (str, int, float, type(None))
    told = [key for key in changed if isinstance(known.get(key), simple) and isinstance(identity.get(key), simple)]
    return ", ".join(f"{key} ({known[key]}, now {identity[key]})" if key in told and key in known else key for key in changed)


def _of(values: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _values_that_differ(known: Mapping[str, Any], given: Mapping[str, Any], path: str = "") -> str:
    """`weights.bits 4, now 3` for every value of two nested mappings that is not the same; a value that is not there counts as default."""
    told = []
    for key in dict.fromkeys([*known, *given]):
        old, new = known.get(key, "default"), given.get(key, "default")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            told.append(_values_that_differ(old, new, f"{path}{key}."))
        elif old != new:
            told.append(f"{path}{key} {old}, now {new}")
    return ", ".join(text for text in told if text)
