"""Which experts were removed."""

from __future__ import annotations

from typing import Any

from moebit.cli.terminal import bold, row, say, show, table
from moebit.words import size


def show_pruned(found: Any) -> None:
    layers = table("layer", "removed experts")
    for index, experts in found.removed.items():
        row(layers, index, ", ".join(map(str, experts)))
    show(layers)
    before, after = found.experts
    say(bold(found.path), f": {after} of {before} experts, {size(found.size_before)} -> {size(found.size_after)}")
