"""QLoRA on a native output: PEFT's own training loop beside that of the dense twin, whose weights are the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moebit
from moebit.errors import BadInputError
from tests.support.models import ARCHITECTURES, Checkpoints, quiet
from tests.support.outputs import small_recipe

peft = pytest.importorskip("peft")

STEPS = 50
ARGUMENTS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}


def adapted(directory: Path, config: Any) -> Any:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    torch.manual_seed(0)  # of the adapters
    return peft.get_peft_model(model, config)


def losses(model: Any, steps: int) -> list[float]:
    """Of a few sentences that repeat, which a model of random weights learns only through its adapters."""
    ids = torch.arange(4 * 24).reshape(4, 24) * 7 % 100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    result = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        result.append(float(loss))
    return result


@pytest.fixture(scope="module")
def outputs_of_both(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same numbers packed and dense."""
    source, folder = checkpoints.path(ARCHITECTURES["qwen2_moe"]), tmp_path_factory.mktemp("lora")
    for format in ("native", "dense"):
        moebit.quantize(source, folder / format, recipe=small_recipe("rtn"), format=format)
    return folder / "native", folder / "dense"


@pytest.mark.slow
def test_loss_is_that_of_the_dense_twin(outputs_of_both: tuple[Path, Path]) -> None:
    from moebit.runtime.lora import lora_config

    packed, dense = outputs_of_both
    ours, twins = losses(adapted(packed, lora_config(**ARGUMENTS)), STEPS), losses(adapted(dense, peft.LoraConfig(**ARGUMENTS)), STEPS)
    assert twins[-1] < 0.9 * twins[0]  # something is learned
    assert all(abs(a - b) <= 0.02 * b for a, b in zip(ours, twins, strict=True))


@pytest.mark.slow
def test_adapters_stay_apart(outputs_of_both: tuple[Path, Path], tmp_path: Path) -> None:
    """They are saved and loaded by PEFT; merging would change packed weights and is refused."""
    from moebit.runtime.lora import lora_config

    model = adapted(outputs_of_both[0], lora_config(**ARGUMENTS))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with pytest.raises(BadInputError, match="cannot be merged into packed weights"):
        model.merge_and_unload()
    losses(model, 1)
    with quiet():
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
