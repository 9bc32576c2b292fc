"""Every command of the README is run, in order, as a newcomer would from the clone; every Python block is executed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.S)
# What cannot be run inside a test run: getting the clone, set-up itself (this run is its result), and the tests (this is them). The demo,
# the benchmarks and the retraining have tests of their own or take too long; that their make targets exist is checked.
NOT_HERE = ("git clone", "make ", "cd ")


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for line in commands() for word in re.findall(r"make ([a-z-]+)", line)]
    assert {"setup", "demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"README names `make {target}`"


def test_every_file_exists() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), f"README links {link}"


@pytest.mark.timeout(600)
def test_every_command_and_python_block_runs(tmp_path: Path) -> None:
    workplace = tmp_path / "moebit"
    workplace.mkdir()
    (workplace / "reference").symlink_to(ROOT / "reference")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "140"}
    ran = 0
    for kind, block in BLOCKS:
        if kind == "python":
            steps = [[sys.executable, "-c", block]]
        else:
            lines = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
            steps = [["bash", "-c", line] for line in lines if line and not line.startswith(("#", *NOT_HERE))]
        for step in steps:
            run = subprocess.run(step, cwd=workplace, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{step[-1]}\n{run.stdout}\n{run.stderr}"
            ran += 1
    assert ran >= 6
    shutil.rmtree(workplace)


def test_the_tables_numbers_are_the_benchmarks() -> None:
    """Every decimal number in the README's result tables stands in a committed benchmark result."""
    results = "\n".join(file.read_text() for file in sorted((ROOT / "benchmarks" / "results").glob("*.md")))
    section = README.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    numbers = {number for line in rows for number in re.findall(r"(?<![\w.])\d+\.\d+", line)}
    assert len(numbers) >= 8
    missing = sorted(number for number in numbers if number not in results)
    assert not missing, f"not in any committed table: {missing}"
