"""Make every table of benchmarks/results that needs no other hardware, one after the other: `make tables`.

A table is made anew when something that it depends on has changed since it was made last: moebit's numeric code, the benchmark's own
files, the reference models and their texts. What it was made of is kept in runs/tables/NAME.json. Benchmarks that take hours keep their
cells (runs/quality and others), so that whatever ends this goes on where it was. Each benchmark's output is in runs/tables/NAME.log.

    python -m benchmarks.tables              # all that are out of date, in order
    python -m benchmarks.tables --list       # which are, and how long the last making took
    python -m benchmarks.tables best moqa    # these alone

The exit code is 1 if a benchmark failed; the others are made nevertheless.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT, environment
from benchmarks.quality import digest, numeric_code
from moebit.words import duration

STATE = ROOT / "runs" / "tables"


@dataclass(frozen=True)
class Table:
    """A benchmark and what it is made of.

    Attributes:
        name: of the Markdown file in `benchmarks/results`, unless `result` names another file.
        module: what runs, below `benchmarks`. arguments: of its command line.
        files: of the benchmark, that its numbers depend on; its module is always one of them.
        models: whether the reference models and their texts are measured.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    models: bool = True
    result: str = ""

    @property
    def path(self) -> Path:
        return ROOT / (self.result or f"benchmarks/results/{self.name}.md")


TABLES = (
    Table("solver", "solver", models=False),
    Table("architectures", "architectures", models=False, result="docs/architectures.md"),
    Table("formats", "formats", models=False),
    Table("gguf", "gguf_architectures", models=False),
    Table("prices", "prices"),
    Table("quality", "quality", files=("protocol.yaml",)),
    Table("best", "best", files=("protocol-best.yaml", "quality.py")),
    Table("routers", "routers", files=("protocol-routers.yaml", "quality.py", "outliers.py")),
    Table("moqa", "moqa", files=("protocol-moqa.yaml", "quality.py")),
    Table("moequant", "moequant", files=("protocol-moequant.yaml", "quality.py", "balanced.py")),
    Table("ebss", "ebss", files=("protocol-moequant.yaml", "quality.py")),
    Table("eaquant", "eaquant", files=("protocol-eaquant.yaml", "quality.py", "outliers.py")),
    Table("memory", "memory", models=False),
    Table("runtime", "runtime", ("--layers", "16"), models=False),
    Table("speed", "speed", models=False),
)


def key_of(table: Table) -> str:
    """What a table is made of, as a hash."""
    here = ROOT / "benchmarks"
    parts: list[Path] = [here / f"{table.module}.py", *(here / file for file in table.files)]
    models = sorted(path for path in (ROOT / "reference").iterdir() if path.is_dir()) if table.models else []
    recipes = ROOT / "src" / "moebit" / "recipe" / "presets"
    return digest(list(table.arguments), *parts, *models, recipes, *numeric_code())


def record_of(table: Table, state: Path) -> dict[str, object]:
    """What is known of the last making: its key and its seconds; empty where there was none, or where it was cut off."""
    try:
        found = json.loads((state / f"{table.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_current(table: Table, state: Path) -> bool:
    return table.path.exists() and record_of(table, state).get("key") == key_of(table)


def make(table: Table, state: Path, threads: int) -> bool:
    """Run a benchmark to its end.

    Returns:
        Whether it ended well and left its table.
    """
    key, begin = key_of(table), time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{table.module}", *table.arguments]
    with open(state / f"{table.name}.log", "w", encoding="utf-8") as log:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])  # some benchmarks are scripts and import their neighbours as such
        env = environment(threads, {"PYTHONPATH": paths})
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code or not table.path.exists():
        return False
    record = json.dumps({"key": key, "seconds": round(time.monotonic() - begin)})
    temporary = state / f"{table.name}.json.writing"
    temporary.write_text(record, encoding="utf-8")
    os.replace(temporary, state / f"{table.name}.json")
    return True


def line(table: Table, state: Path) -> str:
    seconds = record_of(table, state).get("seconds")
    took = f"the last making took {duration(float(str(seconds)))}" if seconds is not None else "not made here before"
    return f"{table.name}: {'up to date' if is_current(table, state) else 'to be made'}; {took}"


def make_all(tables: Sequence[Table], state: Path, threads: int) -> list[str]:
    """Make what is out of date, and say what is left after each.

    Returns:
        The names of those that failed.
    """
    state.mkdir(parents=True, exist_ok=True)
    left, failed = [table for table in tables if not is_current(table, state)], []
    for number, table in enumerate(left):
        print(f"{number + 1} of {len(left)}: {line(table, state)}", flush=True)
        if not make(table, state, threads):
            failed.append(table.name)
            print(f"{table.name} failed; see {state / f'{table.name}.log'}", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="TABLE", help="these alone")
    parser.add_argument("--list", action="store_true", help="say what is out of date, and make nothing")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    asked = parser.parse_args(arguments)
    unknown = sorted({*asked.only} - {table.name for table in TABLES})
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(table.name for table in TABLES)}")
    chosen = [table for table in TABLES if not asked.only or table.name in asked.only]
    if asked.list:
        print("\n".join(line(table, STATE) for table in chosen))
        return 0
    failed = make_all(chosen, STATE, asked.threads)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
