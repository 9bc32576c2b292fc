"""Do two revisions write the same bytes? `make golden BASE=REV`, or: .venv/bin/python -m tests.golden REV [CASE ...]

REV is checked out into a temporary worktree; the other side is the working tree as it is. Exit code 1 if an output differs, is missing or
could not be made by one of the two. What REV wrote is kept in runs/golden, under its commit, these cases, their inputs and the versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tests.golden.cases import CASES
from tests.golden.inputs import built_inputs, shipped_models
from tests.golden.records import differences

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "golden"
SHOWN = 8  # differences of one output
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def sources_of(commit: str) -> Iterator[Path]:
    """The `src` of a commit, in a worktree that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="moebit-golden-") as directory:
        tree = Path(directory) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree / "src"
        finally:
            git("worktree", "remove", "--force", str(tree))


def kept_name(commit: str, inputs: Path) -> str:
    """The name under which the records of a commit are kept: everything that its bytes depend on."""
    own = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")) if file.name != Path(__file__).name]
    models = [file.read_bytes() for path in shipped_models(ROOT).values() for file in sorted(path.glob("*.safetensors"))]
    versions = sorted(f"{found.name} {found.version}" for found in distributions() if found.name != "moebit")
    depends = hashlib.sha256(repr([inputs.name, versions, sys.version, platform.processor(), platform.node()]).encode())
    for content in (*own, *models):
        depends.update(hashlib.sha256(content).digest())
    return f"{commit[:12]}-{depends.hexdigest()[:16]}.json"


def started(src: Path, inputs: Path, records: Path, cases: Iterable[str]) -> subprocess.Popen[bytes]:
    """The process that makes the outputs with the moebit in `src`."""
    settings = {**dict.fromkeys(THREADS, "1"), "PYTHONPATH": f"{src}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    settings |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    records.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.golden.making", src, inputs, WORK / records.stem, records, *cases]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env={**os.environ, **settings})


def both_records(base: str, cases: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of the base revision, kept ones where there are, and those of the working tree; made side by side."""
    commit, inputs = git("rev-parse", "--verify", f"{base}^{{commit}}"), built_inputs(WORK, ROOT)
    kept, now = WORK / kept_name(commit, inputs), WORK / "this-tree.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    wanted = [name for name in cases if "files" not in known.get(name, {})]
    print(f"{base} is {commit[:12]}; {len(cases) - len(wanted)} of its {len(cases)} outputs are known", flush=True)
    with sources_of(commit) as src:
        made = WORK / "base.json"
        processes = [started(ROOT / "src", inputs, now, cases)]
        if wanted:
            processes.append(started(src, inputs, made, wanted))
        try:
            codes = [process.wait() for process in processes]
        except BaseException:
            for process in processes:
                process.kill()
                process.wait()
            raise
    if any(codes):
        raise SystemExit("a revision did not get to its end: see above")
    if wanted:
        known |= json.loads(made.read_text())
        kept.write_text(json.dumps(known))
    return known, json.loads(now.read_text())


def compared(base: Mapping[str, Any], now: Mapping[str, Any], cases: Iterable[str]) -> dict[str, list[str]]:
    """{case: what is wrong with it}, an empty list where both revisions made the same output."""
    return {name: _compared(base.get(name, {}), now.get(name, {})) for name in cases}


def _compared(base: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    sides = {"the base": base, "this tree": now}
    failed = [f"{where} did not make it: {one.get('error', 'no output')}" for where, one in sides.items() if "files" not in one]
    return failed or differences(base["files"], now["files"])


def told(found: Mapping[str, list[str]]) -> Iterator[str]:
    """The lines of the outcome."""
    for name, wrong in found.items():
        yield f"{name:24} {'NOT EQUAL' if wrong else 'equal'}"
        yield from (f"    {line}" for line in wrong[:SHOWN])
        if len(wrong) > SHOWN:
            yield f"    and {len(wrong) - SHOWN} more"
    different = sum(map(bool, found.values()))
    yield f"{len(found) - different} of {len(found)} outputs are equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="the revision to compare the working tree with")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all of them unless named")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    began, cases = time.perf_counter(), arguments.cases or list(CASES)
    found = compared(*both_records(arguments.base, cases), cases)
    print(*told(found), f"{time.perf_counter() - began:.0f} s", sep="\n")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
