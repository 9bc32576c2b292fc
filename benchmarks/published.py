"""Which recipes and formats work on the models that people have, made small: docs/published.md.

    make published        (or: .venv/bin/python -m benchmarks.published [NAME ...])

tests/support/published.py says which models, and what is compared. Rows are kept in runs/published, so that naming some models runs those
alone; the table is written when every model has a row.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.machine import facts
from tests.support.published import PUBLISHED, RECIPES, Tried, trials

ROOT = Path(__file__).resolve().parent.parent
TABLE, DONE = ROOT / "docs" / "published.md", ROOT / "runs" / "published"
COLUMNS = (*RECIPES, "compressed-tensors")
ABOUT = """\
Each of these models was made small with the settings kept that it is known for, filled with random numbers, quantized with a recipe of
every family and loaded with every auto class of transformers that knows its type. A number is the largest difference of the logits, as a
share of the largest: of a native output in transformers from moebit's own streaming of the same files, of a compressed-tensors output from
the native one. *no*: refused before any work, with the reason below.""".splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PUBLISHED, []], help="models, by their names in the table")
    names = parser.parse_args().names or list(PUBLISHED)
    DONE.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            found = trials(PUBLISHED[name], Path(work) / "work")
        _row(name).write_text(json.dumps({column: asdict(tried) for column, tried in found.items()}, indent=1))
        print(name, {column: tried.refused or f"{tried.difference:.0e}" for column, tried in found.items()}, flush=True)
    missing = [name for name in PUBLISHED if not _row(name).exists()]
    if missing:
        print(f"no table yet: {len(missing)} models have no row, first {missing[0]}")
        return
    TABLE.write_text("\n".join(_table()) + "\n", encoding="utf-8")


def _row(name: str) -> Path:
    return DONE / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.json"


def _table() -> list[str]:
    rows = {name: {column: Tried(**tried) for column, tried in json.loads(_row(name).read_text()).items()} for name in PUBLISHED}
    lines = ["# Published models", "", *ABOUT, "", f"| model | type | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, tried in rows.items():
        cells = ["no" if tried[column].refused else f"{tried[column].difference:.0e}" for column in COLUMNS]
        lines.append(f"| {name} | {PUBLISHED[name].model_type} | {' | '.join(cells)} |")
    reasons = [f"- **{name}**, {column}: {tried.refused}" for name, row in rows.items() for column, tried in row.items() if tried.refused]
    return [*lines, "", "## Refused", "", *reasons, "", "## Made by", "", facts(torch.get_num_threads())]


if __name__ == "__main__":
    main()
