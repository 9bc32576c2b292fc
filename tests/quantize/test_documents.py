"""What an output says of itself and of where it came from, and what is said about a run that was made already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moebit
from moebit.errors import BadInputError
from moebit.formats.differences import SETTINGS, difference
from moebit.quantize.documents import base_model, licence, without_folders
from moebit.quantize.report import Result
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import file_bytes, small_recipe, token_file

MIXTRAL = ARCHITECTURES["mixtral"]


# --- the card and the report


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("moebit quantize /data/models/olmoe -o /home/me/out", "moebit quantize olmoe -o out"),
        ("moebit quantize org/name --text w=/a/b.txt:title", "moebit quantize org/name --text w=b.txt:title"),
        ("moebit.quantize('/a/model', 'out', text=['/q/r s.txt'])", "moebit.quantize('model', 'out', text=['r s.txt'])"),
        ("moebit quantize ../model -o ./out --text a/b.txt", "moebit quantize ../model -o ./out --text a/b.txt"),
    ],
)
def test_reports_name_no_folder_of_the_machine(command: str, kept: str) -> None:
    assert without_folders(command) == kept


def test_the_base_model_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    assert base_model(snapshot) == "Qwen/Qwen3-30B-A3B"
    assert base_model(tmp_path / "my-model") == "my-model"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: 'kimi'\n---\n", {"license": "other", "license_name": "kimi"}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
    ],
)
def test_the_licence_of_the_checkpoint(card: str, found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == found
    assert licence(tmp_path / "nothing") == {}


def test_what_an_output_takes_over(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints.path(MIXTRAL), tmp_path / "source")
    (source / "LICENSE").write_text("Do what you like.")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    for stale in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        (source / stale).write_text("{}")
    out = tmp_path / "out"
    moebit.quantize(source, out, recipe=small_recipe("rtn"))
    assert (out / "LICENSE").read_text() == "Do what you like."
    assert not list(out.glob("*quant*"))
    assert "license: mit" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "report.json").read_text()
    assert str(tmp_path) not in (out / "report.html").read_text()
    assert moebit.verify(out)["findings"] == []


# --- runs that are there already


@pytest.fixture
def made(checkpoints: Checkpoints, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The arguments of a run, and its output."""
    text = token_file(tmp_path / "text.jsonl", 400)
    arguments = {"model": checkpoints.path(MIXTRAL), "recipe": small_recipe(), "text": [text]}
    moebit.quantize(out=tmp_path / "out", **arguments)
    return arguments, tmp_path / "out"


def test_a_finished_output_is_done_already(made: tuple[dict[str, Any], Path]) -> None:
    arguments, out = made
    before = file_bytes(out, but=set())
    again = moebit.quantize(out=out, resume=True, **arguments)
    assert isinstance(again, Result)
    assert again.already
    assert again.size_after == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert file_bytes(out, but=set()) == before


def test_a_finished_output_of_another_run(made: tuple[dict[str, Any], Path]) -> None:
    """What differs is said value by value, and the output stays."""
    arguments, out = made
    before = file_bytes(out, but=set())
    with pytest.raises(BadInputError, match=r"finished and .* another recipe \(weights\.bits 4, now 3\); .*--overwrite"):
        moebit.quantize(out=out, resume=True, overrides={"weights.bits": 3}, **arguments)
    with pytest.raises(BadInputError, match=r"another seed \(0, now 1\)|another calibration"):
        moebit.quantize(out=out, resume=True, seed=1, **arguments)
    with pytest.raises(BadInputError, match="exists; choose another -o"):
        moebit.quantize(out=out, **arguments)
    assert file_bytes(out, but=set()) == before


def test_how_each_text_was_read_is_reported(made: tuple[dict[str, Any], Path]) -> None:
    assert json.loads((made[1] / "report.json").read_text())["texts"] == {"text.jsonl": "input_ids (1 documents)"}


def test_differences_of_runs() -> None:
    old = {"seed": 0, "recipe": "a", SETTINGS: {"weights": {"bits": 4, "group_size": 128}, "format": "native"}}
    new = {"seed": 1, "recipe": "b", SETTINGS: {"weights": {"bits": 3, "group_size": 128}, "format": "native", "refine": {"steps": 5}}}
    assert difference(old, new) == "recipe (weights.bits 4, now 3, refine default, now {'steps': 5}), seed (0, now 1)"
    assert difference({"seed": 0}, {"seed": 1}) == "seed (0, now 1)"
