"""Does the comparison of two revisions notice a change? Made-up outputs, written here and changed in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moebit
from tests.golden.__main__ import compared, told
from tests.golden.cases import CASES
from tests.golden.records import differences, record

FIRST = "model-00001-of-00001.safetensors"
# What the cases set by themselves so that outputs are small, and widths, which the packing's own tests cover.
SIZES = {("weights", "bits"), ("weights", "group_size"), ("allocation", "target_bits"), ("switching", "share")}
SIZES |= {("calibration", "samples"), ("calibration", "seq_len")}


def write_output(directory: Path) -> Path:
    """Files as an output has them."""
    directory.mkdir()
    save_file({"a.codes": torch.arange(8, dtype=torch.uint8), "a.scale": torch.ones(2)}, directory / FIRST)
    (directory / "config.json").write_text(json.dumps({"hidden_size": 64, "quantization_config": {"bits": [4, 3], "format_version": 1}}))
    (directory / "recipe.yaml").write_text("version: 1\n")
    (directory / "report.json").write_text('{"seconds": 1.0}')
    (directory / "README.md").write_text("made in 1 s")
    seal(directory)
    return directory


def seal(directory: Path, **changes: Any) -> None:
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir() if file.name != "moebit.json"}
    manifest = {"moebit": "0.1.0", "torch": "2", "transformers": "5", "seed": 0, "plan": {"notes": ["one note"], "average_bits": 4.0}}
    (directory / "moebit.json").write_text(json.dumps({**manifest, "files": files, "sha256": "0" * 64, **changes}))


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[Path], object]], list[str]]:
    """What is said about two outputs, one of them after a change."""

    def found(change: Callable[[Path], object]) -> list[str]:
        base, now = write_output(tmp_path / "base"), write_output(tmp_path / "now")
        change(now)
        return differences(record(base), record(now))

    return found


def rewrite(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_text(json.dumps(document))
        if name != "moebit.json":
            seal(directory)

    return apply


def rewrite_bytes(name: str, content: bytes) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        (directory / name).write_bytes(content)
        seal(directory)

    return apply


def test_one_byte_of_one_tensor(changed: Callable[..., list[str]]) -> None:
    def flip(directory: Path) -> None:
        content = bytearray((directory / FIRST).read_bytes())
        content[content.index(bytes(range(8))) + 3] ^= 1
        rewrite_bytes(FIRST, bytes(content))(directory)

    assert changed(flip) == [f"{FIRST}: a.codes: differs"]


def test_a_file_without_parts(changed: Callable[..., list[str]]) -> None:
    assert changed(rewrite_bytes("recipe.yaml", b"version: 1\n\n")) == ["recipe.yaml: other bytes"]


def test_only_the_order_of_a_json_file(changed: Callable[..., list[str]]) -> None:
    content = json.dumps({"quantization_config": {"bits": [4, 3], "format_version": 1}, "hidden_size": 64}).encode()
    assert changed(rewrite_bytes("config.json", content)) == ["config.json: other bytes"]


def test_a_missing_file_and_a_further_one(changed: Callable[..., list[str]]) -> None:
    def swap(directory: Path) -> None:
        (directory / "recipe.yaml").rename(directory / "recipe.yml")
        seal(directory)

    assert changed(swap) == [
        "recipe.yaml: only in the base",
        "recipe.yml: only in this tree",
        "moebit.json: files.recipe.yaml: only in the base",
        "moebit.json: files.recipe.yml: only in this tree",
    ]


def test_a_field_of_a_json_file(changed: Callable[..., list[str]]) -> None:
    assert changed(rewrite("config.json", lambda config: config["quantization_config"]["bits"].__setitem__(1, 8))) == [
        "config.json: quantization_config.bits.1: 3 -> 8"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest.update(seed=1), "seed: 0 -> 1"),
        (lambda manifest: manifest.update(seed=0.0), "seed: 0 -> 0.0"),
        (lambda manifest: manifest.pop("seed"), "seed: only in the base"),
        (lambda manifest: manifest.update(kernel="numba"), "kernel: only in this tree"),
        (lambda manifest: manifest["plan"]["notes"].append("another note"), "plan.notes.1: only in this tree"),
        (lambda manifest: manifest["files"].update({"config.json": "0" * 64}), "files.config.json: 'right' -> 'wrong'"),
    ],
)
def test_a_field_of_the_manifest(changed: Callable[..., list[str]], change: Callable[[Any], Any], said: str) -> None:
    assert changed(rewrite("moebit.json", change)) == [f"moebit.json: {said}"]


@pytest.mark.parametrize(
    "change",
    [
        {"moebit": "0.2.0", "torch": "3", "transformers": "6"},
        {"sha256": "1" * 64},
        {"plan": {"notes": ["the same note in other words"], "average_bits": 4.0}},
    ],
)
def test_versions_checksums_and_wording_may_differ(changed: Callable[..., list[str]], change: dict[str, Any]) -> None:
    assert changed(lambda directory: seal(directory, **change)) == []


@pytest.mark.parametrize("name", ["report.json", "README.md"])
def test_reports_and_cards_may_differ(changed: Callable[..., list[str]], name: str) -> None:
    assert changed(rewrite_bytes(name, b"{}")) == []


def test_an_output_that_was_not_made_is_a_difference() -> None:
    made, failed = {"files": {}}, {"error": "BadInputError: no"}
    found = compared({"a": made, "b": made, "c": failed, "d": made}, {"a": made, "b": failed, "c": failed}, "abcd")
    assert found == {
        "a": [],
        "b": ["this tree did not make it: BadInputError: no"],
        "c": ["the base did not make it: BadInputError: no", "this tree did not make it: BadInputError: no"],
        "d": ["this tree did not make it: no output"],
    }
    assert list(told(found))[-1] == "1 of 4 outputs are equal"


def settings(recipe: moebit.Recipe) -> Iterator[tuple[str, str, str]]:
    for section, values in recipe.model_dump().items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            if (section, key) not in SIZES:
                yield section, key, repr(value)


def test_every_setting_of_every_preset_is_in_a_case() -> None:
    covered = {setting for case in CASES.values() for setting in settings(moebit.load_recipe(case.recipe, dict(case.options)))}
    recipes = {name: recipe for name in moebit.presets() if (recipe := moebit.load_recipe(name)).format != "gguf"}  # that wants an extra
    missing = {name: wanted for name, recipe in recipes.items() if (wanted := set(settings(recipe)) - covered)}
    assert missing == {}
