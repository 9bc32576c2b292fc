"""Bit plans: widths that differ from a recipe's, as a file that a person can look at, edit and use again."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebit.errors import BadInputError
from moebit.recipe import BIT_WIDTHS
from moebit.recipe.reading import is_there, read_json
from moebit.recipe.weights import GGML_TYPES


@dataclass(frozen=True)
class BitPlan:
    """Bit widths that differ from the recipe's, by full module name. Specified in docs/format.md; a person can edit it.

    Attributes:
        experts: experts module -> projection -> one width, or one per expert.
        linears: linear -> width.
        types: GGUF tensor -> block type of ggml, for format gguf; it goes before the recipe's type, mixture and overrides.
    """

    experts: Mapping[str, Mapping[str, int | list[int]]] = field(default_factory=dict)
    linears: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 of the widths and types."""
        said = [self.experts, self.linears, *([self.types] if self.types else [])]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The parts of a plan's file."""
        return {"experts": self.experts, "linears": self.linears, **({"types": self.types} if self.types else {})}

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> BitPlan:
        """The inverse of `describe`."""
        return cls(parts.get("experts", {}), parts.get("linears", {}), parts.get("types", {}))

    def widths(self, name: str, projection: str, count: int, default: int) -> tuple[int, ...]:
        """One width per expert.

        Raises:
            BadInputError: not as many as there are experts, or a width that does not exist.
        """
        bits = self.experts.get(name, {}).get(projection, default)
        if not isinstance(bits, int | list):
            raise BadInputError(f"plan: {name}.{projection}: expected a width or a list of widths, got {bits!r}")
        result = (bits,) * count if isinstance(bits, int) else tuple(bits)
        if len(result) != count:
            raise BadInputError(f"plan: {name}.{projection} has {len(result)} widths for {count} experts")
        return _check_widths(f"{name}.{projection}", result)

    def width(self, name: str, default: int) -> tuple[int]:
        """The width of a linear.

        Raises:
            BadInputError: a width that does not exist.
        """
        (width,) = _check_widths(name, (self.linears.get(name, default),))
        return (width,)

    def check_names(self, known: Mapping[str, Iterable[str]]) -> None:
        """Refuse widths of what is not quantized.

        Args:
            known: what is quantized, by full name: the projections of experts, {""} of linears.

        Raises:
            BadInputError: naming the module, and the one with the nearest name.
        """
        for name, wanted in [*self.experts.items(), *((name, None) for name in self.linears)]:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            parts = {""} if wanted is None else set(wanted)
            if name not in known or not parts <= set(known[name]):
                what = name if wanted is None else f"{name} ({', '.join(wanted)})"
                raise BadInputError(f"plan: {what} is not quantized by this recipe in this model; nearest: {near[0] if near else 'none'}")


def _check_widths(name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    for number, width in enumerate(widths):
        if type(width) is not int or width not in BIT_WIDTHS:
            raise BadInputError(f"plan: {name}, entry {number}: {width!r} bits; choose one of {', '.join(map(str, BIT_WIDTHS))}")
    return widths


def load_bit_plan(file: str | Path) -> BitPlan:
    """Read a plan file.

    Raises:
        BadInputError: no such file, not JSON, another version, unknown keys.
    """
    path = Path(file)
    if not is_there(path):
        raise BadInputError(f"--plan: no such file: {path}")
    data = read_json(path, "--plan ")
    if not _has_form(data):
        raise BadInputError(f'--plan {path}: expected {{"version": 1, "experts": {{...}}, "linears": {{...}}}} as docs/format.md has it')
    unknown = sorted(set(data) - {"version", "made", "experts", "linears", "types"})
    wrong = [name for name, parts in data.get("experts", {}).items() if not isinstance(parts, dict)]
    if unknown or wrong:
        what = f"unknown key {unknown[0]!r}" if unknown else f"{wrong[0]}: expected {{projection: width or list of widths}}"
        raise BadInputError(f"--plan {path}: {what}; docs/format.md has the form")
    found = BitPlan.of(data)
    strange = [name for name, kind in found.types.items() if kind not in GGML_TYPES]
    if strange:
        kind = found.types[strange[0]]
        raise BadInputError(f"--plan {path}: {strange[0]}: {kind!r} is no block type of ggml; choose one of {', '.join(GGML_TYPES)}")
    return found


def _has_form(data: Any) -> bool:
    """Whether a document has a plan's version and parts."""
    if not isinstance(data, dict) or data.get("version") != 1:
        return False
    return all(isinstance(data.get(part, {}), dict) for part in ("experts", "linears", "types"))
