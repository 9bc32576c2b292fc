"""Absorbed rotation: a plain checkpoint with other numbers and the same logits of transformers, or a refusal with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebit
from moebit.formats.opening import open_checkpoint
from moebit.methods.rotation import plan_rotation
from moebit.model.structure import find_structure
from tests.models import ARCHITECTURES, Architecture, quiet, random_model, save, windows

# What each model allows, as a reader of its modelling code knows it.
REFUSED_R1 = {"phimoe": "LayerNorm", "minimax": "stands behind its block"}
REFUSED_R2 = {"olmoe": "a clip", "qwen3_next": "an elementwise gate", "kimi_linear": "elementwise"}
ALLOWED = [a for a in ARCHITECTURES.values() if a.name not in REFUSED_R1]
NOT_EXPERTS = ["*proj*", "*linear*", "*"]


def in_double(directory: Path) -> PreTrainedModel:
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    return model.double().eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=windows()[:2], use_cache=False).logits
    return result


def wide(architecture: Architecture, directory: Path) -> Path:
    """The checkpoint stored in float32: what an edit rounds away is then too small to see."""
    return save(random_model(architecture).float(), directory / architecture.name)


def rotated(checkpoint: Path, out: Path, absorbed: str, **more: Any) -> Path:
    """The checkpoint rotated and otherwise as it was: 8 bits for one module, dense, which is put back by the caller where it matters."""
    recipe = {"weights": {"bits": 8, "group_size": -1, "scope": "experts"}, "solver": {"method": "rtn"}, "rotation": {"absorbed": absorbed}}
    moebit.quantize(checkpoint, out, recipe={**recipe, **more}, format="dense")
    return out


def edited_model(checkpoint: Path, absorbed: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the checkpoint in transformers, the same module with every parameter as the edited weights read it)."""
    original, turned = in_double(checkpoint), in_double(checkpoint)
    opened = open_checkpoint(checkpoint)
    structure = find_structure(opened.model)
    edited = plan_rotation(opened, structure, absorbed).applied(opened, seed=3)
    head, table = turned.get_output_embeddings(), turned.get_input_embeddings()
    assert head is not None
    if head.weight is table.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in turned.named_parameters():
            value = edited.weights.parameter(name)
            assert value.shape == parameter.shape
            parameter.copy_(value)
    return original, turned


@pytest.mark.parametrize("architecture", ALLOWED, ids=str)
def test_logits_do_not_change_and_the_weights_do(architecture: Architecture, tmp_path: Path) -> None:
    kind = "r1" if architecture.name in REFUSED_R2 else "r1r2"
    original, turned = edited_model(wide(architecture, tmp_path), kind)
    expected, actual = logits(original), logits(turned)
    # transformers computes norms and softmax in float32 whatever the model's type.
    assert float((expected - actual).abs().max() / expected.abs().max()) < 2e-5
    before, after = dict(original.named_parameters()), dict(turned.named_parameters())
    experts = next(name for name in before if name.endswith("experts.down_proj"))
    assert float((before[experts] - after[experts]).norm() / before[experts].norm()) > 0.5 or architecture.expert_hidden != 64
    table = next(name for name in before if "embed" in name)
    assert float((before[table] - after[table]).norm() / before[table].norm()) > 0.5
