"""Absorbed rotation: other numbers and the same logits, as transformers computes them, or a refusal with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebit
from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint
from moebit.model.structure import find_structure
from moebit.plan.rotation import RotationPlan, plan_rotation
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints, quiet, random_model, save, windows
from tests.support.outputs import read_config, small_recipe, stored_tensors

# What each model allows, as a reader of its modelling code knows it.
REFUSED_R1 = {"phimoe": "input_layernorm subtracts the mean", "minimax": "stands behind its block"}
REFUSED_R2 = {"olmoe": "values do not reach", "qwen3_next": "an elementwise gate", "kimi_linear": "kv_b_proj"}
QUICK = ("mixtral", "deepseek_v2", "gpt_oss")
ALLOWED = [
    pytest.param(a, id=a.name, marks=() if a.name in QUICK else pytest.mark.slow)
    for a in ARCHITECTURES.values()
    if a.name not in REFUSED_R1
]


def find(path: Path, kind: str) -> RotationPlan:
    checkpoint = open_checkpoint(path)
    return plan_rotation(checkpoint, find_structure(checkpoint.model), kind)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=windows()[:2], use_cache=False).logits
    return result


def in_double(directory: Path) -> PreTrainedModel:
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    return model.double().eval()


def rotated(checkpoint: Path, kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the checkpoint in transformers, the same with every parameter as the edited weights read it)."""
    original, turned = in_double(checkpoint), in_double(checkpoint)
    opened = open_checkpoint(checkpoint)
    edited = plan_rotation(opened, find_structure(opened.model), kind).applied(opened.weights, seed=3)
    head, table = turned.get_output_embeddings(), turned.get_input_embeddings()
    assert head is not None
    if head.weight is table.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in turned.named_parameters():
            parameter.copy_(edited.parameter(name))
    return original, turned


def moved(before: PreTrainedModel, after: PreTrainedModel, part: str) -> float:
    """How far the parameters whose names end in `part` have moved, at least."""
    found = dict(before.named_parameters(remove_duplicate=False))  # a tied head has become a parameter of its own
    pairs = [(found[name], b) for name, b in after.named_parameters() if name.endswith(part)]
    return min(float(((a - b).norm() / a.norm()).detach()) for a, b in pairs)


@pytest.mark.parametrize("architecture", ALLOWED)
def test_logits_do_not_change_and_the_weights_do(architecture: Architecture, tmp_path: Path) -> None:
    path = save(random_model(architecture).float(), tmp_path / "model")
    original, turned = rotated(path, "r1" if architecture.name in REFUSED_R2 else "r1r2")
    expected, actual = logits(original), logits(turned)
    # transformers computes norms and softmax in float32 whatever the model's type.
    assert float((expected - actual).abs().max() / expected.abs().max()) < 2e-5
    assert moved(original, turned, "embed_tokens.weight" if architecture.model_type != "nemotron_h" else "embeddings.weight") > 0.5
    assert moved(original, turned, "lm_head.weight") > 0.5
    assert moved(original, turned, f"{architecture.router_name}.weight") > 0.5
    if architecture.expert_hidden == 64:
        assert moved(original, turned, "experts.down_proj") > 0.5
    # Of the norms of hidden states; those inside of attention and of state-space mixers are left alone.
    norms = [(n, g) for n, g in turned.named_parameters() if "layers.0." in n and n.endswith("norm.weight")]
    gains = [g for n, g in norms if "attn" not in n and "mixer." not in n]
    assert gains
    assert {value for g in gains for value in g.tolist()} == {0.0 if architecture.name == "qwen3_next" else 1.0}


@pytest.mark.parametrize("name", REFUSED_R1)
def test_what_stands_in_the_way_of_r1_is_named(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=f"rotation.absorbed: r1: .*{REFUSED_R1[name]}.*set rotation.absorbed: none"):
        find(checkpoints.path(ARCHITECTURES[name]), "r1")
    with pytest.raises(BadInputError, match=REFUSED_R1[name]):
        moebit.quantize(
            checkpoints.path(ARCHITECTURES[name]), tmp_path / "out", recipe={**small_recipe("rtn"), "rotation": {"absorbed": "r1"}}
        )
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["olmoe", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_what_stands_in_the_way_of_r2_is_named(name: str, checkpoints: Checkpoints) -> None:
    path = checkpoints.path(ARCHITECTURES[name])
    find(path, "r1")
    with pytest.raises(BadInputError, match=f"rotation.absorbed: r1r2: {REFUSED_R2[name]}.*o_proj"):
        find(path, "r1r2")


def test_values_alone_are_rotated_in_latent_attention(checkpoints: Checkpoints) -> None:
    """kv_b makes keys (16 without position) and values (16) of 4 heads, one behind the other."""
    site = find(checkpoints.path(ARCHITECTURES["deepseek_v2"]), "r1r2").heads[0]
    assert site.values.endswith("kv_b_proj")
    assert site.value_channels.tolist() == [[32 * head + 16 + c for c in range(16)] for head in range(4)]
    assert site.output_channels.tolist() == [[16 * head + c for c in range(16)] for head in range(4)]


# --- what is written


@pytest.mark.parametrize("format", ["dense", "native", "compressed-tensors"])
def test_outputs_are_plain_checkpoints(format: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Tied embeddings are untied, and only there is anything new."""
    path, out = checkpoints.path(ARCHITECTURES["qwen2_moe"]), tmp_path / "out"
    recipe: dict[str, Any] = {**small_recipe("rtn", weights={"bits": 8}), "rotation": {"absorbed": "r1r2"}}
    moebit.quantize(path, out, recipe=recipe, format=format)
    assert read_config(out)["tie_word_embeddings"] is False
    if format == "dense":
        before, after = stored_tensors(path), stored_tensors(out)
        assert set(after) == {*before, "lm_head.weight"}
        assert {name: (t.dtype, t.shape) for name, t in before.items()}.items() <= {n: (t.dtype, t.shape) for n, t in after.items()}.items()
    with quiet():
        a, b = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (path, out))
    expected = logits(a)
    assert float((logits(b) - expected).norm() / expected.norm()) < 0.04
    described = json.loads((out / "moebit.json").read_text())["plan"]["transforms"]["rotation"]
    assert (described["size"], described["rotated_heads"], described["untied"]) == (64, 2, ["lm_head.weight"])


def test_the_seed_decides(checkpoints: Checkpoints) -> None:
    opened = open_checkpoint(checkpoints.path(ARCHITECTURES["mixtral"]))
    plan = plan_rotation(opened, find_structure(opened.model), "r1")
    first, again, other = (plan.applied(opened.weights, seed).parameter("model.embed_tokens.weight") for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_inspect_says_what_will_be_done(checkpoints: Checkpoints) -> None:
    plan = moebit.inspect(checkpoints.path(ARCHITECTURES["mixtral"]), {**small_recipe("gptq"), "rotation": {"absorbed": "r1"}})["plan"]
    assert plan["transforms"]["rotation"]["folded_norms"] == 5
