"""`inspect` says how large the parts of a model are on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import moebit
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import Outputs

FORMATS = ("native", "compressed-tensors", "dense")
LENGTH = 24


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor of a directory, as the safetensors library reads them."""
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return found


def file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def check_sum(path: Path) -> dict[str, dict[str, int]]:
    """The parts' bytes are those of the files, and `inspect` gives their sum as the size."""
    result = moebit.inspect(path)
    assert sum(part["bytes"] for part in result["parts"].values()) == file_bytes(path) == result["size_bytes"]
    assert result["parameters"] == sum(part["parameters"] for part in result["parts"].values())
    parts: dict[str, dict[str, int]] = result["parts"]
    return parts


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_parts_of_checkpoints(checkpoints: Checkpoints, name: str) -> None:
    """Stacked and single experts, a tensor that holds several parameters, tied embeddings."""
    path = checkpoints.path(ARCHITECTURES[name])
    parts = check_sum(path)
    routed = {stored: count for stored, count in tensor_bytes(path).items() if ".experts." in stored}
    assert parts["routed experts"]["bytes"] == sum(routed.values())


@pytest.mark.parametrize("format", FORMATS)
def test_parts_of_outputs(outputs: Outputs, format: str) -> None:
    """The bytes of packed experts are those of their codes, scales and shapes."""
    path = outputs.rtn(ARCHITECTURES["mixtral"], format=format)
    parts = check_sum(path)
    routed = {stored: count for stored, count in tensor_bytes(path).items() if ".experts." in stored}
    assert parts["routed experts"]["bytes"] == sum(routed.values())
    assert (parts["routed experts"]["bytes"] < parts["routed experts"]["parameters"]) == (format != "dense")


def test_parts_with_a_side_file_and_an_overlay(checkpoints: Checkpoints, tmp_path: Path) -> None:
    texts = {}
    for name, low in (("low", 0), ("high", 64), ("few", 5)):
        ids = torch.randint(low, low + (4 if name == "few" else 64), (16 * LENGTH,), generator=torch.Generator().manual_seed(low)).tolist()
        texts[name] = tmp_path / f"{name}.jsonl"
        texts[name].write_text(json.dumps({"input_ids": ids}) + "\n")
    recipe = {
        "weights": {"bits": 3, "group_size": 32},
        "calibration": {"samples": 8, "seq_len": LENGTH},
        "allocation": {"kind": "fuzzy", "target_bits": 4.2},
        "switching": {"share": 0.1},
    }
    out = tmp_path / "out"
    known = {name: texts[name] for name in ("low", "high")}
    moebit.quantize(checkpoints.path(ARCHITECTURES["mixtral"]), out, recipe=recipe, text=known)
    plain = check_sum(out)
    assert plain["switch.safetensors"]["bytes"] == (out / "switch.safetensors").stat().st_size
    moebit.adapt(out, text={"few": texts["few"]}, to=tmp_path / "adapted", samples=8, length=LENGTH)
    adapted = check_sum(tmp_path / "adapted")
    assert (tmp_path / "adapted" / "overlay.safetensors").is_file()
    assert adapted["routed experts"]["bytes"] > plain["routed experts"]["bytes"]
