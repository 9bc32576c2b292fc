"""How often the parts of a layer run while it is calibrated: attention at most three times, experts once, none of them on all tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moebit
from moebit.calibration import statistics
from moebit.quantize import statistics as group_statistics
from moebit.streaming import budget
from tests.support.models import ARCHITECTURES, TOP_K, Architecture, Checkpoints
from tests.support.observer import observed
from tests.support.outputs import small_recipe, token_file

SAMPLES, LENGTH = 60, 24
FIRST = 1  # all windows are one batch here
# How often attention runs in the decoder layers that have any. Two passes and a first batch where the layer's output is its input plus
# the experts'; three where shared experts are quantized behind the router. A dense layer has three: the inputs of
# o_proj, those of its MLP, and the last.
ATTENTION = {
    "mixtral": (2 + FIRST) * 2,
    "qwen2_moe": 3 * 2,
    "qwen3_moe": (2 + FIRST) * 2 + 3,
    "deepseek_v3": 3 + 3,
    "jamba": 2 + FIRST,
    "glm4_moe": 3 + 3,
    "granitemoe": 3 * 2,
}


@pytest.mark.parametrize("architecture", [ARCHITECTURES[name] for name in ATTENTION], ids=str)
def test_passes(architecture: Architecture, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = token_file(tmp_path / "t.jsonl", SAMPLES * LENGTH)
    attended: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":  # where the structure is looked at, nothing is computed
            attended.append(query.shape[0] * query.shape[2])
        return attend(query, *rest, **options)

    monkeypatch.setattr(group_statistics, "ROWS", 100)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with observed("moebit.rows") as rows:
        moebit.quantize(
            checkpoints.path(architecture), tmp_path / "out", recipe=small_recipe(samples=SAMPLES, seq_len=LENGTH), text=[str(text)]
        )
    slots: Counter[str] = Counter()
    for projection, count in rows:
        slots[projection] += count
    routed = SAMPLES * LENGTH * TOP_K * sum(architecture.moe)
    assert sum(attended) == SAMPLES * LENGTH * ATTENTION[architecture.name]
    assert slots["first"] == slots["down"] == routed
    assert slots["sample"] == sum(architecture.moe) * 8 * statistics.LAYER_SAMPLE < 8 * SAMPLES * LENGTH * sum(architecture.moe)


def test_passes_over_several_batches(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of o_proj are kept where they may be: attention runs once over all windows, and the bytes are those of two passes."""
    text = token_file(tmp_path / "t.jsonl", SAMPLES * LENGTH)
    attended: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":
            attended.append(query.shape[0])
        return attend(query, *rest, **options)

    monkeypatch.setattr(budget, "BATCH_TOKENS", SAMPLES // 3 * LENGTH)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    weights = []
    for out in (tmp_path / "kept", tmp_path / "again"):
        moebit.quantize(
            checkpoints.path(ARCHITECTURES["mixtral"]), out, recipe=small_recipe(samples=SAMPLES, seq_len=LENGTH), text=[str(text)]
        )
        weights.append({file.name: file.read_bytes() for file in out.glob("*.safetensors")})
        monkeypatch.setattr(group_statistics, "last_before_experts", lambda *args: False)
    once = SAMPLES + 2 * (SAMPLES // 3)  # the first batch to look, and to see how the layer adds the experts' outputs
    twice = 2 * SAMPLES + SAMPLES // 3
    assert sum(attended) == 2 * (once + twice)
    assert weights[0] == weights[1]
