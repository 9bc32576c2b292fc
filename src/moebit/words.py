"""Numbers as people read them."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes: 640 B, 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """12 s, 3 min, 4.5 h."""
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def share(value: float) -> str:
    """A percentage with as many digits as tell something: 99.97%, 82.1%."""
    return f"{value:.2%}" if 0.99 < value < 1 or 0 < value < 0.01 else f"{value:.1%}"


def plain(value: float, digits: int = 3) -> str:
    """A number with so many digits that count, zeros too; "–" for what is none."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.0f}" if 1 <= abs(value) < 1e6 else f"{value:.{digits - 1}e}"


def count(number: int, what: str) -> str:
    """1 expert, 2 experts, 1,200 experts."""
    plural = what.removesuffix("ix") + "ices" if what.endswith("matrix") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"
