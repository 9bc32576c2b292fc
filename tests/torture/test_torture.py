"""A little of `make torture`: every part finds nothing in half a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_torture(part: str) -> None:
    words = [sys.executable, "-m", "tests.torture", "--seconds", "30", "--part", part]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 findings" in run.stdout
