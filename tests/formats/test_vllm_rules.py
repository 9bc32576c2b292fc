"""What vLLM's own classes leave whole, told before the work; told apart from look-alikes that they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

import moebit
from tests.support.architectures import TINY
from tests.support.in_full import build
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import small_recipe


def reasons(source: Path, ignore: list[str]) -> list[str]:
    recipe = small_recipe("rtn", weights={"ignore": ignore, "group_size": -1, "bits": 8})
    plan = moebit.inspect(source, recipe=recipe, format="compressed-tensors")["plan"]
    return [reason for reason in plan["engines"]["vllm"]["reasons"] if "builds them whole" in reason]


def test_mamba_of_jamba(checkpoints: Checkpoints) -> None:
    source = checkpoints.path(ARCHITECTURES["jamba"])
    (reason,) = reasons(source, [])
    assert "linears of Mamba layers" in reason
    assert "'*.mamba.in_proj'" in reason
    assert not reasons(source, ["*.mamba.*"])


@pytest.mark.slow
def test_the_indexer(tmp_path: Path) -> None:
    source = build(TINY["deepseek_v32"], tmp_path / "source")
    (reason,) = reasons(source, [])
    assert "'*.indexer.weights_proj', '*.indexer.wk'" in reason
    assert not reasons(source, ["*.indexer.wk", "*.indexer.weights_proj"])


def test_mamba_2_takes_a_quantization(checkpoints: Checkpoints) -> None:
    assert not reasons(checkpoints.path(ARCHITECTURES["nemotron_h"]), [])
