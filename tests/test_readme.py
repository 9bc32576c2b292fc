"""Every command of README, quick start and recipes page is run, and every Python block executed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support import pages
from tests.support.pages import FOLLOWED, ROOT, commands, run_as_typed, run_here, steps

README = pages.README.read_text(encoding="utf-8")


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for page in FOLLOWED for line in commands(page) for word in re.findall(r"make ([a-z-]+)", line)]
    assert {"setup", "demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"a page names `make {target}`"


def test_every_file_exists() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), f"README links {link}"


@pytest.mark.timeout(600)
def test_every_command_and_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages run in one directory and one process; what a page has in common with one before runs once."""
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    distinct = list(dict.fromkeys(step for page in FOLLOWED for step in steps(page)))
    assert len(distinct) >= 18
    for step in distinct:
        run_here(step)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)
def test_every_page_can_be_followed(page: Path, tmp_path: Path) -> None:
    """By itself, as typed into a shell, in a directory that has nothing but the reference models."""
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    for step in steps(page):
        run_as_typed(step, tmp_path)
    shutil.rmtree(tmp_path)
