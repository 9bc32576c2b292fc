"""MLX outputs: names and bytes against the format's description, and, where mlx-lm is installed, its logits and its dequantized weights.

`MOEBIT_MLX_PYTHON` names the Python of an environment with mlx and mlx-lm; without it, this one's is asked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moebit
from moebit.errors import BadInputError
from moebit.plan.plan import Plan
from moebit.tensor import solve_gptq, solve_rtn
from moebit.tensor.grids.offset import OffsetGrid
from tests.support.models import ARCHITECTURES, Checkpoints, windows
from tests.support.outputs import read_config, stored_tensors

MLX = os.environ.get("MOEBIT_MLX_PYTHON") or (sys.executable if importlib.util.find_spec("mlx_lm") else "")
needs_mlx = pytest.mark.skipif(not MLX, reason="no mlx-lm: set MOEBIT_MLX_PYTHON")
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "symmetric": ("olmoe", {"weights": {"bits": 4, "group_size": 32}}),
    "asymmetric": ("olmoe", {"weights": {"bits": 3, "group_size": 32, "symmetric": False}}),
    "overrides": ("mixtral", {"weights": {"bits": 5, "group_size": 32, "overrides": [{"match": "*.layers.1.*.experts", "bits": 2}]}}),
    "mxfp4": ("olmoe", {"weights": {"type": "mxfp4"}}),
    "nvfp4": ("mixtral", {"weights": {"type": "nvfp4"}}),
}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return {"solver": {"method": "rtn", "clip_search": False}, "format": "mlx", **recipe}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> dict[str, tuple[Path, Path]]:
    """name -> (checkpoint, output)."""
    directory = tmp_path_factory.mktemp("mlx")
    made = {}
    for name, (architecture, recipe) in RECIPES.items():
        path = checkpoints.path(ARCHITECTURES[architecture])
        made[name] = (path, moebit.quantize(path, directory / name, recipe=full(recipe)).path)  # type: ignore[union-attr]
    return made


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """[rows, count] codes of rows of 32-bit words, the least significant bit first."""
    number = words.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    every = (number.unsqueeze(-1) >> torch.arange(32) & 1).flatten(-2)
    return (every[:, : bits * count].unflatten(1, (count, bits)) << torch.arange(bits)).sum(-1)


def matrix(tensors: dict[str, Tensor], name: str, grid: dict[str, Any], expert: int | None) -> Tensor:
    """[out, in] float64, by the format's description."""
    parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("weight", "scales", "biases", "global_scale") if f"{name}.{leaf}" in tensors}
    if expert is not None:
        parts = {leaf: value[expert] for leaf, value in parts.items()}
    width = grid["group_size"]
    codes = stream(parts["weight"], grid["bits"], parts["scales"].shape[1] * width).unflatten(1, (-1, width))
    if grid.get("mode") == "mxfp4":
        value = LEVELS.double()[codes] * torch.exp2(parts["scales"].double() - 127).unsqueeze(-1)
    elif grid.get("mode") == "nvfp4":
        scale = parts["scales"].view(torch.float8_e4m3fn).double() * parts["global_scale"].double() / (448 * 6)
        value = LEVELS.double()[codes] * scale.unsqueeze(-1)
    else:
        value = codes * parts["scales"].double().unsqueeze(-1) + parts["biases"].double().unsqueeze(-1)
    return value.flatten(1)


def everything(output: Path) -> dict[str, Tensor]:
    """Every quantized module of an output by MLX's name; experts stacked."""
    tensors, grids = stored_tensors(output), read_config(output)["quantization"]
    result = {}
    for name in (key.removesuffix(".scales") for key in tensors if key.endswith(".scales")):
        count = len(tensors[f"{name}.scales"]) if tensors[f"{name}.scales"].ndim == 3 else None
        result[name] = (
            matrix(tensors, name, grids[name], None)
            if count is None
            else torch.stack([matrix(tensors, name, grids[name], e) for e in range(count)])
        )
    return result


def original(checkpoint: Path, name: str) -> Tensor:
    """The checkpoint's weights of a module that MLX calls so."""
    tensors = stored_tensors(checkpoint)
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].double()
    block, _, projection = name.partition(".switch_mlp.")
    leaf = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[projection] if "block_sparse_moe" in block else projection
    count = sum(key.startswith(f"{block}.experts.") and key.endswith(f".{leaf}.weight") for key in tensors)
    return torch.stack([tensors[f"{block}.experts.{e}.{leaf}.weight"].double() for e in range(count)])


@pytest.mark.parametrize("name", RECIPES)
def test_names_and_weights(name: str, outputs: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, output = outputs[name]
    read, grids = everything(output), read_config(output)["quantization"]
    assert sum(".switch_mlp." in key for key in read) == 6
    assert not [key for key in stored_tensors(output) if ".experts." in key]
    for key, value in read.items():
        wanted = original(checkpoint, key)
        away = float((value - wanted).norm() / wanted.norm())
        assert away < {2: 0.8, 3: 0.25, 4: 0.2, 5: 0.1}[grids[key]["bits"]], (key, away)
        for one, other in zip(value, value.roll(1, 0), strict=True) if value.ndim == 3 else ():
            assert float((one - other).norm() / one.norm()) > 1  # experts are told apart
    plan = moebit.quantize(checkpoint, "nowhere", recipe=full(RECIPES[name][1]), dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.size_bytes == sum(tensor.nbytes for tensor in stored_tensors(output).values())
    assert plan.engines["mlx"].runs
    assert moebit.verify(output)["state"] == "fine"


@needs_mlx
@pytest.mark.timeout(600)
def test_mlx_reads_it(outputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """MLX's own weights are those of the description, exactly up to the type that it computes in, and its model runs with them."""
    models = {name: str(path) for name, (_, path) in outputs.items()}
    # MLX multiplies NVFP4 with global scales on GPUs only.
    job = {"tokens": windows().tolist(), "models": models, "weights_only": ["nvfp4"]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [MLX, str(Path(__file__).parent / "mlx_reader.py"), str(tmp_path / "job.json"), str(tmp_path / "found.npz")]
    run = subprocess.run(command, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert run.returncode == 0, run.stderr
    assert not run.stdout
    found = np.load(tmp_path / "found.npz")
    for name, (_, output) in outputs.items():
        read = everything(output)
        theirs = {key.partition("|")[2] for key in found.files if key.startswith(f"{name}|")} - {"logits"}
        assert theirs == read.keys(), name
        for key, value in read.items():
            torch.testing.assert_close(torch.from_numpy(found[f"{name}|{key}"]).double(), value, rtol=0.01, atol=1e-6, msg=f"{name} {key}")
        assert name == "nvfp4" or np.isfinite(found[f"{name}|logits"]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_offsets_are_rounded_before_the_solve(bits: int) -> None:
    """What is solved for is what is stored: scale * code + offset in the type of the scales."""
    w = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    grid = OffsetGrid(32, torch.bfloat16)
    for q in (solve_rtn(w, bits, grid), solve_gptq(w, torch.eye(64).expand(2, 64, 64), bits, grid)[0]):
        scale, offset = (t.double().repeat_interleave(32, 2) for t in (q.params.scale, q.params.offset))
        assert torch.equal(q.dequantize(torch.float64), scale * q.codes.double() + offset)
        below = scale * (q.codes.double() - 1) + offset
        assert bool(((q.dequantize(torch.float64) - w).abs() <= (below - w).abs() + 1e-6)[q.codes > 0].all())
        assert int(q.codes.max()) <= 2**bits - 1


@pytest.mark.parametrize(
    ("architecture", "recipe", "says"),
    [
        ("olmoe", {"weights": {"bits": 4, "group_size": -1}}, "one scale a row"),
        ("gpt_oss", {"weights": {"bits": 4, "group_size": 32}}, "format mlx: .*stored stacked"),
    ],
)
def test_refused(architecture: str, recipe: dict[str, Any], says: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(BadInputError, match=says):
        moebit.quantize(checkpoints.path(ARCHITECTURES[architecture]), "nowhere", recipe=full(recipe), dry_run=True)
