"""The block types of a GGUF file by layer and projection, as a table for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moebit.report.facts import Documents


@dataclass(frozen=True)
class TypeTable:
    """Types of a GGUF file's quantized tensors.

    Attributes:
        parts: names of projections, as the file has them without `blk.N.` and `.weight`.
        rows: (layers, the type of every part; "–" where these layers have none). Neighbours with the same types share a row.
        others: (tensor, type) outside of the layers. instead: (tensor, the type that was wanted and does not divide its rows).
    """

    parts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    others: tuple[tuple[str, str], ...]
    instead: tuple[tuple[str, str], ...]


def type_table(documents: Documents) -> TypeTable | None:
    """The types of an output; None for one that is no GGUF file."""
    found: Mapping[str, Mapping[str, str]] = documents.manifest.get("plan", {}).get("gguf", {})
    types = found.get("types", {})
    if not types:
        return None
    layers: dict[int, dict[str, str]] = {}
    others = []
    for name, kind in types.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
        if layer is None:
            others.append((name, kind))
        else:
            layers.setdefault(int(layer[1]), {})[layer[2]] = kind
    parts = tuple(dict.fromkeys(part for row in layers.values() for part in row))
    rows = _merged({number: tuple(row.get(part, "–") for part in parts) for number, row in sorted(layers.items())})
    return TypeTable(parts, rows, tuple(others), tuple(found.get("wanted", {}).items()))


def _merged(rows: Mapping[int, tuple[str, ...]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Neighbouring layers of the same types as one row: 0–3."""
    spans: list[tuple[int, int, tuple[str, ...]]] = []
    for number, kinds in rows.items():
        if spans and spans[-1][1] == number - 1 and spans[-1][2] == kinds:
            spans[-1] = (spans[-1][0], number, kinds)
        else:
            spans.append((number, number, kinds))
    return tuple((f"{first}" if first == last else f"{first}–{last}", kinds) for first, last, kinds in spans)
