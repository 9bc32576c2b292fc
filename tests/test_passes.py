"""How often the parts of a layer run while it is calibrated: attention three times, experts once, none of them on all tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moebit
from moebit import layer
from moebit.calibration import statistics
from moebit.model import experts
from tests.models import ARCHITECTURES, TOP_K, Architecture, Checkpoints
from tests.outputs import small_recipe, token_file

SAMPLES, LENGTH = 60, 24
ATTENTION_LAYERS = {"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 3, "deepseek_v3": 2, "jamba": 1, "glm4_moe": 2}


@pytest.mark.parametrize("architecture", [ARCHITECTURES[name] for name in ATTENTION_LAYERS], ids=str)
def test_passes(architecture: Architecture, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = token_file(tmp_path / "t.jsonl", SAMPLES * LENGTH)
    attended: list[int] = []
    slots: Counter[str] = Counter()

    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":  # where the structure is looked at, nothing is computed
            attended.append(query.shape[0] * query.shape[2])
        return attend(query, *rest, **options)

    def counted(name: str, function: Any) -> Any:
        def run(module: nn.Module, rows: Tensor, *rest: Any) -> Tensor:
            slots[name] += len(rows)
            return function(module, rows, *rest)

        return run

    monkeypatch.setattr(layer, "intermediate", counted("first", experts.intermediate))
    monkeypatch.setattr(layer, "finish", counted("down", experts.finish))
    monkeypatch.setattr(statistics, "intermediate", counted("sample", experts.intermediate))
    monkeypatch.setattr(layer, "ROWS", 100)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    moebit.quantize(
        checkpoints.path(architecture), tmp_path / "out", recipe=small_recipe(samples=SAMPLES, seq_len=LENGTH), text=[str(text)]
    )
    routed = SAMPLES * LENGTH * TOP_K * sum(architecture.moe)
    assert sum(attended) == 3 * SAMPLES * LENGTH * ATTENTION_LAYERS[architecture.name]
    assert slots["first"] == slots["down"] == routed
    assert slots["sample"] == sum(architecture.moe) * 8 * statistics.LAYER_SAMPLE < 8 * SAMPLES * LENGTH * sum(architecture.moe)
