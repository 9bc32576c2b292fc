"""GPTQ and AWQ outputs against readers written from the formats' descriptions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moebit
from moebit.errors import BadInputError
from moebit.plan.plan import Plan
from moebit.tensor import UniformGrid, solve_gptq
from tests.formats.older import as_checkpoint
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import read_config, stored_tensors

RECIPES: dict[str, dict[str, Any]] = {
    "gptq 4": {"format": "gptq", "weights": {"bits": 4, "group_size": 32}},
    "gptq 3 asymmetric": {"format": "gptq", "weights": {"bits": 3, "group_size": -1, "symmetric": False}},
    "awq": {"format": "awq", "weights": {"bits": 4, "group_size": 32, "symmetric": False}},
}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return {"solver": {"method": "rtn", "clip_search": False}, **recipe}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> dict[str, Path]:
    directory, path = tmp_path_factory.mktemp("older"), checkpoints.path(ARCHITECTURES["mixtral"])
    return {
        name: moebit.quantize(path, directory / name.replace(" ", "-"), recipe=full(recipe)).path  # type: ignore[union-attr]
        for name, recipe in RECIPES.items()
    }


@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_are_the_originals_within_a_step(name: str, outputs: dict[str, Path], checkpoints: Checkpoints) -> None:
    """All experts and linears, each under its own name: less than a step of its grid from the original; everything else is untouched."""
    original, stored = stored_tensors(checkpoints.path(ARCHITECTURES["mixtral"])), stored_tensors(outputs[name])
    read = as_checkpoint(stored, read_config(outputs[name]))
    assert {key for key in original if ".experts." in key} <= read.keys()
    assert not [key for key in read if "gate.weight" in key or "norm" in key or "embed" in key or "lm_head" in key]
    for key, value in original.items():
        if key not in read:
            assert torch.equal(stored[key], value), key
            continue
        scales = stored[key.replace(".weight", ".scales")].double().numpy().T
        step = np.repeat(np.abs(scales), value.shape[1] // scales.shape[1], 1)
        most = 0.502 if RECIPES[name]["weights"].get("symmetric", True) else 1.02  # a rounded zero point moves the ends of the range
        assert (np.abs(read[key] - value.double().numpy()) <= most * step).all(), key


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_knows_the_size(name: str, outputs: dict[str, Path], checkpoints: Checkpoints) -> None:
    plan = moebit.quantize(checkpoints.path(ARCHITECTURES["mixtral"]), "nowhere", recipe=full(RECIPES[name]), dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.size_bytes == sum(tensor.nbytes for tensor in stored_tensors(outputs[name]).values())
    assert moebit.verify(outputs[name])["state"] == "fine"


def test_planted_errors_are_noticed(outputs: dict[str, Path], checkpoints: Checkpoints) -> None:
    """Exchanged experts and a zero point that is off by one are further from the original than a step."""
    original, config = stored_tensors(checkpoints.path(ARCHITECTURES["mixtral"])), read_config(outputs["awq"])
    first, second = (f"model.layers.0.block_sparse_moe.experts.{e}.w1" for e in (0, 1))

    def away(tensors: dict[str, torch.Tensor]) -> float:
        some = {key: value for key, value in tensors.items() if key.startswith(first)}
        wanted = original[f"{first}.weight"].double().numpy()
        return float(np.linalg.norm(as_checkpoint(some, config)[f"{first}.weight"] - wanted) / np.linalg.norm(wanted))

    stored = stored_tensors(outputs["awq"])
    assert away(stored) < 0.12
    assert away({**stored, f"{first}.qzeros": stored[f"{first}.qzeros"] + 0x11111111}) > 0.2
    assert away({**stored, f"{first}.qweight": stored[f"{second}.qweight"]}) > 1


def test_config(outputs: dict[str, Path]) -> None:
    gptq = read_config(outputs["gptq 4"])["quantization_config"]
    assert {key: gptq[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    left = [pattern[2:] for pattern in gptq["dynamic"] if pattern.startswith("-:")]
    for name, matched in {"lm_head": True, "model.layers.0.block_sparse_moe.gate": True, "model.layers.0.self_attn.q_proj": False}.items():
        assert any(re.match(pattern, name) for pattern in left) == matched, name
    awq = read_config(outputs["awq"])["quantization_config"]
    assert (awq["bits"], awq["group_size"], awq["zero_point"], awq["version"]) == (4, 32, True, "gemm")
    assert "model.layers.0.block_sparse_moe.gate" in awq["modules_to_not_convert"]


def test_zero_points_from_one(checkpoints: Checkpoints) -> None:
    """A grid without zero point 0 covers groups that are positive throughout, with GPTQ's feedback too."""
    w = torch.rand(2, 8, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    h = torch.eye(64).expand(2, 64, 64)
    q, _ = solve_gptq(w, h, 4, UniformGrid(32, False, least_zero=1), clip_search=False)
    assert int(q.params.zero_point.min()) == 1
    assert float((q.dequantize() - w).abs().max()) <= 0.51 * 1.5 / 14
    plain, _ = solve_gptq(w, h, 4, UniformGrid(32, False), clip_search=False)
    assert int(plain.params.zero_point.max()) == 0


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"format": "awq", "weights": {"bits": 8, "group_size": 32}}, "the format has 4 only"),
        ({"format": "gptq", "weights": {"bits": 5, "group_size": 32}}, "choose of 2, 3, 4, 8"),
        ({"format": "awq", "weights": {"bits": 4, "group_size": 64}}, "one group size"),
        ({"format": "gptq", "weights": {"bits": 4, "group_size": 32, "symmetric": False}, "engine": "vllm"}, "symmetric grids only"),
        ({"format": "gptq", "weights": {"bits": 3, "group_size": 32}, "engine": "sglang"}, "not of 3"),
        ({"format": "awq", "weights": {"bits": 4, "group_size": 32}, "engine": "transformers"}, "stacks experts"),
    ],
)
def test_refused(recipe: dict[str, Any], says: str, checkpoints: Checkpoints) -> None:
    engine = recipe.get("engine", "any")
    wanted = {key: value for key, value in recipe.items() if key != "engine"}
    with pytest.raises(BadInputError, match=says):
        moebit.quantize(checkpoints.path(ARCHITECTURES["mixtral"]), "nowhere", recipe=full(wanted), engine=engine, dry_run=True)
