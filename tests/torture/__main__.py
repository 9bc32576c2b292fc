"""`python -m tests.torture --seconds 600`: kills, damages and mutated documents by turns until the time is over; counts at the end.

The exit code is 1 if anything was found. Each finding is printed with the number that makes it again: `--seed`, part and trial.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.torture.parts import PARTS, Part


def turns(directory: Path, seed: int, chosen: list[str]) -> Iterator[tuple[str, Part, random.Random]]:
    parts = {name: PARTS[name](directory / name) for name in chosen}
    number = 0
    while True:
        for name, part in parts.items():
            for _ in range(part.each_turn):
                yield name, part, random.Random(f"{seed} {name} {number}")
                number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", action="append", choices=list(PARTS))
    options = parser.parse_args()
    end, counts, findings = time.monotonic() + options.seconds, Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="moebit-torture-") as name:
        for number, (what, part, chance) in enumerate(turns(Path(name).resolve(), options.seed, options.part or list(PARTS))):
            if time.monotonic() > end:
                break
            outcome, finding = part.trial(chance)
            counts[f"{what}: {outcome}"] += 1
            if finding:
                findings.append(f"trial {number}, {what}: {finding}")
                print(findings[-1], flush=True)
    for outcome, count in sorted(counts.items()):
        print(f"{count:6,} {outcome}")
    print(f"{len(findings)} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
