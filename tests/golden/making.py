"""The process of one revision: makes the outputs with the moebit that it finds, and writes down what they are made of.

    python -m tests.golden.making SRC INPUTS WORK RECORDS.json [CASE ...]

SRC is the directory that moebit has to come from; an output is deleted as soon as it is recorded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moebit
from tests.golden.cases import CASES, Case
from tests.golden.inputs import shipped_models
from tests.golden.records import record

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Maker:
    """Makes the output of a case in a directory."""

    inputs: Path

    def make(self, case: Case, out: Path) -> Path:
        """The directory that is to be recorded."""
        made: dict[str, Callable[[Case, Path], Path]] = {
            "quantized": self.quantized,
            "command": self.commanded,
            "resumed": self.resumed,
            "adapted": self.adapted,
            "profiled": self.profiled,
        }
        return made[case.how](case, out)

    def model(self, case: Case) -> Path:
        kind, _, model_type = case.model.rpartition("/")
        return shipped_models(ROOT)[model_type] if kind else self.inputs / case.model

    def texts(self, names: tuple[str, ...]) -> dict[str, Path]:
        return {name: self.inputs / f"{name}.txt" for name in names}

    def quantized(self, case: Case, out: Path, **more: Any) -> Path:
        plan = None
        if case.plan is not None:
            plan = out.with_name("plan.json")
            plan.write_text(json.dumps(case.plan))
        moebit.quantize(self.model(case), out, recipe=case.recipe, overrides=case.options, text=self.texts(case.texts), plan=plan, **more)
        return out

    def commanded(self, case: Case, out: Path) -> Path:
        options = [word for key, value in case.options.items() for word in ("--set", f"{key}={value}")]
        texts = [word for name, file in self.texts(case.texts).items() for word in ("--text", f"{name}={file}")]
        command = [sys.executable, "-m", "moebit", "quantize", str(self.model(case)), "-o", str(out), "--recipe", case.recipe]
        done = subprocess.run([*command, *options, *texts], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return out

    def resumed(self, case: Case, out: Path) -> Path:
        """Ctrl-C when the second layer begins, and on from there."""

        def stop(what: str, done: int, total: int) -> None:
            if what == "layers" and done == 1:
                raise KeyboardInterrupt

        try:
            self.quantized(case, out, progress=stop)
        except KeyboardInterrupt:
            return self.quantized(case, out, resume=True)
        raise RuntimeError("the run was not interrupted: no progress ('layers', 1, total) was reported")

    def adapted(self, case: Case, out: Path) -> Path:
        to = out.with_name("adapted")
        moebit.adapt(self.quantized(case, out), text=self.texts(("german",)), to=to, samples=4, length=48)
        return to

    def profiled(self, case: Case, out: Path) -> Path:
        moebit.profile(self.model(case), out, text=self.texts(case.texts), recipe=case.recipe, overrides=case.options, samples=4, length=48)
        for method in ("fuzzy", "knapsack", "frequency"):
            moebit.allocate(out, out / f"{method}.json", target_bits=4.0, method=method)
        return out


def recorded(case: Case, maker: Maker, work: Path) -> dict[str, Any]:
    """{"files": record} of a case's output, or {"error": what stopped it}."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        return {"files": record(maker.make(case, work / "out"))}
    except Exception as error:  # the other outputs are still to be compared
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("src", "inputs", "work", "records"):
        parser.add_argument(name, type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    found = Path(moebit.__file__).resolve()
    if arguments.src.resolve() not in found.parents:
        raise SystemExit(f"moebit comes from {found}, not from {arguments.src}")
    records = {}
    for name in arguments.cases:
        began = time.perf_counter()
        records[name] = recorded(CASES[name], Maker(arguments.inputs), arguments.work)
        state = "could not be made" if "error" in records[name] else "made"
        print(f"  {arguments.work.name}: {name} {state} in {time.perf_counter() - began:.1f} s", flush=True)
    arguments.records.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
