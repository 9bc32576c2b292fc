"""The documentation: links lead somewhere, every verb has its place, pictures are those of their program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its code cells, in order, in one interpreter, from the directory that it lies in."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"), "kept without outputs"
    (tmp_path / "cells.py").write_text("\n\n".join(cells), encoding="utf-8")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "cells.py")], cwd=ROOT / "examples", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (next(tmp_path.glob("moebit-*")) / "compared.html").is_file()
    shutil.rmtree(next(tmp_path.glob("moebit-*")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).resolve().exists(), f"{page.name} links {link}"


def test_every_page_is_in_the_navigation() -> None:
    def leaves(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for item in (part.values() if isinstance(part, dict) else part) for leaf in leaves(item)]  # type: ignore[attr-defined]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted({*named} - {"results/index.md"}) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    """A copy, with one more table than is committed: its page, its place in the navigation, the link to it from its method's page."""
    pytest.importorskip("material", reason="the docs extra is not installed")
    for name in ("docs", "src", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    more = tmp_path / "benchmarks" / "results" / "moequant.md"
    more.write_text("# A table like no other\n\n[What it is about](../../docs/methods/moequant.md#affinity-guided-quantization)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet"]
    run = subprocess.run(command, cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    site = tmp_path / "runs" / "site"
    assert 'href="../results/moequant/"' in (site / "quickstart" / "index.html").read_text()
    assert '<a href="../../results/moequant/">A table like no other</a>' in (site / "methods" / "moequant" / "index.html").read_text()
    assert "../../methods/moequant/#affinity-guided-quantization" in (site / "results" / "moequant" / "index.html").read_text()
    documented = (site / "api" / "index.html").read_text()
    assert all(
        f'id="moebit.{name}"' in documented for name in ("quantize.main.quantize", "evaluate.streaming.evaluate", "errors.BadInputError")
    )


def test_every_verb_is_documented() -> None:
    from moebit.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    everything = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {verb for verb in verbs if f"moebit {verb}" not in everything} == set()


def test_pictures_are_those_of_their_program(tmp_path: Path) -> None:
    shutil.copy(DOCS / "pictures" / "draw.py", tmp_path / "draw.py")
    subprocess.run([sys.executable, str(tmp_path / "draw.py")], check=True)
    drawn = {file.name: file.read_text() for file in tmp_path.glob("*.svg")}
    assert drawn == {file.name: file.read_text() for file in (DOCS / "pictures").glob("*.svg")}
    for name, picture in drawn.items():
        root = ET.fromstring(picture)
        width, height = (float(root.attrib[key]) for key in ("width", "height"))
        for element in root.iter():
            if "x" in element.attrib and "y" in element.attrib:
                assert 0 <= float(element.attrib["x"]) <= width, name
                assert 0 <= float(element.attrib["y"]) <= height, name
