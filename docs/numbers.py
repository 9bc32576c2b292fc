"""Fill the numbers of README and documentation from the committed tables: python docs/numbers.py [--check]

A marked place is a value between two comments that Markdown does not show:

    <!--=quality; reference/olmoe; 3.125 + GPTQ; known, mean-->5.74<!--/-->

The first comment names a table of benchmarks/results, the heading of level two that it stands under (empty: above the first one), cells
that tell its row from all others, and a column. A spread behind a mean is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"<!--=([^;>]+);([^;>]*);([^;>]+);([^;>]+)-->(.*?)<!--/-->")


def pages() -> list[Path]:
    """The pages that may have marked places."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every marked place as the tables have it.

    Raises:
        ValueError: no row, or more than one, has the cells that a place names.
    """

    def fill(place: re.Match[str]) -> str:
        table, heading, cells, column = (part.strip() for part in place.groups()[:4])
        document = (results / f"{table}.md").read_text(encoding="utf-8")
        found = [row[column] for row in rows(document, heading) if column in row and {*cells.split(" + ")} <= {*row.values()}]
        if len(found) != 1:
            raise ValueError(f"{place[0]}: {len(found)} rows have these cells and this column")
        start, end = place.start(5) - place.start(), place.end(5) - place.start()
        return place[0][:start] + found[0].split(" ± ")[0] + place[0][end:]

    return PLACE.sub(fill, text)


def rows(document: str, heading: str) -> Iterator[dict[str, str]]:
    """Every row of the tables under a heading, its cells by column; columns without a name by their number."""
    section = re.split(r"^## ", document, flags=re.MULTILINE)
    text = next((part.partition("\n")[2] for part in section[1:] if part.partition("\n")[0] == heading), "") if heading else section[0]
    names: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or set(line) <= set("|-: "):
            names = names if cells else []
        elif not names:
            names = [name or str(number) for number, name in enumerate(cells)]
        else:
            yield dict(zip(names, cells, strict=False))


def main() -> None:
    stale = [page for page in pages() if page.read_text(encoding="utf-8") != filled(page.read_text(encoding="utf-8"))]
    for page in stale:
        if "--check" not in sys.argv:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(", ".join(map(str, stale)) + ": not the tables' numbers" if stale and "--check" in sys.argv else None)


if __name__ == "__main__":
    main()
