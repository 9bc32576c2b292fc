"""Affinity in the Hessians of shared experts behind a gate, against loops over tokens of what transformers itself computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moebit
from tests.support.models import ARCHITECTURES, Checkpoints, windows
from tests.support.observer import observed
from tests.support.outputs import small_recipe


def copied(w: Tensor, h: Tensor | None, bits: Tensor) -> tuple[Tensor, Tensor | None]:
    """(weights [E, out, in], Hessians [E, in, in]) of matrices that are solved together."""
    return w.float().clone(), None if h is None else h.clone()


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_shared_experts_count_by_their_gate(checkpoints: Checkpoints, tmp_path: Path, name: str, power: float) -> None:
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
        with observed("moebit.solve", copied) as solved:
            weights = {"ignore": [*kept, "*.experts"]}
            recipe = small_recipe("gptq", weights=weights, solver={"affinity_power": power}, samples=len(windows()))
            moebit.quantize(path, tmp_path / leaves[0], recipe=recipe, text={"t": text}, accept_unquantized=True)
        found = [(w[0], h[0]) for w, h in solved if h is not None and len(w) == 1]
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
