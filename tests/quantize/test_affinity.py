"""Affinity in the Hessians of shared experts behind a gate, against loops over tokens of what transformers itself computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moebit
from moebit.quantize import solve as solving
from tests.support.models import ARCHITECTURES, Checkpoints, windows
from tests.support.outputs import small_recipe


def solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(weights [out, in], Hessian [in, in]) of every linear that is solved from now on."""
    found: list[tuple[Tensor, Tensor]] = []
    solve = solving.solve

    def noted(recipe: Any, w: Tensor, h: Tensor | None, *args: Any) -> Any:
        if h is not None and len(w) == 1:
            found.append((w[0].float().clone(), h[0].clone()))
        return solve(recipe, w, h, *args)

    monkeypatch.setattr(solving, "solve", noted)
    return found


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_shared_experts_count_by_their_gate(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, power: float
) -> None:
    """Only shared experts of the first layer with experts are quantized, gate and up in one run and down in another: what comes before
    is exact, and so are their inputs. DeepSeek's have no gate and count alike."""
    architecture = ARCHITECTURES[name]
    path, reference = checkpoints.path(architecture), checkpoints.reference(architecture)
    index = architecture.first_moe
    text = tmp_path / "t.jsonl"
    text.write_text("".join(f'{{"input_ids": {row}}}\n' for row in windows().tolist()))
    x = reference.routed[index].router_x
    block = reference.layers[index].get_submodule(architecture.block)
    shared: Any = block.get_submodule(architecture.shared)
    prefix = f"{architecture.block}.{architecture.shared}"
    plan = moebit.quantize(path, tmp_path / "plan", recipe=small_recipe("rtn"), dry_run=True)
    linears = list(plan.linears)  # type: ignore[union-attr]
    for leaves in (["gate_proj", "up_proj"], ["down_proj"]):
        wanted = [f"{reference.layers_name}.{index}.{prefix}.{leaf}" for leaf in leaves]
        kept = [other for other in linears if other not in wanted]
        with monkeypatch.context() as patch:
            found = solved(patch)
            weights = {"ignore": [*kept, "*.experts"]}
            recipe = small_recipe("gptq", weights=weights, solver={"affinity_power": power}, samples=len(windows()))
            moebit.quantize(path, tmp_path / leaves[0], recipe=recipe, text={"t": text}, accept_unquantized=True)
        assert len(found) == 1
        with torch.no_grad():
            inputs = x if leaves != ["down_proj"] else shared.act_fn(shared.gate_proj(x)) * shared.up_proj(x)
            total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
            for token, vector in enumerate(inputs.double()):
                gate = getattr(block, "shared_expert_gate", None)
                logit = float((gate.weight.double() @ x[token].double()).item()) if gate is not None else math.inf
                total += (1 / (1 + math.exp(-logit))) ** power * torch.outer(vector, vector)
        torch.testing.assert_close(found[0][1].double(), total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))
        matrices = torch.cat([shared.get_submodule(leaf).weight.detach().float() for leaf in leaves])
        torch.testing.assert_close(found[0][0], matrices)
