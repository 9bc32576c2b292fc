"""Model types from end to end (tests/support/in_full.py says what is compared), and parts that moebit does not understand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moebit
from benchmarks.architectures import modules
from moebit.cli import app
from moebit.errors import BadInputError
from moebit.plan.plan import Plan
from tests.support.architectures import ALWAYS, PARTLY, REFUSED, TINY, UNTRIED
from tests.support.in_full import build, difference, load, logits_of, run
from tests.support.models import quiet
from tests.support.outputs import file_bytes, small_recipe, stored_tensors, token_file

REST = [name for name in TINY if name not in {*ALWAYS, *PARTLY, *REFUSED}]


@pytest.mark.parametrize("name", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_works_in_full(name: str, tmp_path: Path) -> None:
    with quiet():
        outcome = run(TINY[name], tmp_path / "work")
    assert outcome.works, outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTLY)
def test_experts_that_stay_need_consent(name: str, tmp_path: Path) -> None:
    with quiet(), pytest.raises(BadInputError, match=PARTLY[name]) as refused:
        run(TINY[name], tmp_path / "work")
    assert "--accept-unquantized" in str(refused.value)
    with quiet():
        outcome = run(TINY[name], tmp_path / "work", accept_unquantized=True)
    assert outcome.exact, outcome
    assert 0.5 < outcome.share < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name: str, tmp_path: Path) -> None:
    source = build(TINY[name], tmp_path / "source")
    with quiet(), pytest.raises(BadInputError) as refused:
        moebit.quantize(source, tmp_path / "out", recipe=small_recipe("rtn"))
    assert REFUSED[name] in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("name", ["zaya", "mistral_large4"])
def test_resume_keeps_what_layers_hand_on(name: str, tmp_path: Path) -> None:
    """Stopped before the last layer, which wants what a layer before it returned or wrote down: the same bytes as in one go."""
    source, text = build(TINY[name], tmp_path / "source"), {"text": token_file(tmp_path / "text.jsonl", 200, vocabulary=100)}

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("layers", total - 1):
            raise Stopped

    moebit.quantize(source, tmp_path / "straight", recipe=small_recipe(), text=text)
    with pytest.raises(Stopped):
        moebit.quantize(source, tmp_path / "out", recipe=small_recipe(), text=text, progress=stop)
    moebit.quantize(source, tmp_path / "out", recipe=small_recipe(), text=text, resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")


@pytest.mark.parametrize("name", ["llama4", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_language_model_of_a_wrapper_by_itself(name: str, tmp_path: Path) -> None:
    """AutoModelForCausalLM takes the language model out of a wrapper's checkpoint; out of a quantized one, too."""
    source, out = build(TINY[name], tmp_path / "source"), tmp_path / "out"
    moebit.quantize(source, out, recipe=small_recipe("rtn"))
    whole = load(TINY[name], out)
    with quiet():
        alone = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(alone) is not type(whole)
    assert torch.equal(logits_of(alone), logits_of(whole))


class Stopped(Exception):
    """The power went."""


def test_every_type_of_this_transformers_is_tried_or_said_why_not() -> None:
    found = {name for module in modules() for name in module.types}
    assert len(found) > 70
    assert found == {*TINY, *UNTRIED}


def test_the_comparison_notices_one_wrong_scale(tmp_path: Path) -> None:
    """What `run` compares would see a single output channel of a single expert twice as large."""
    source, out = build(TINY["qwen3_moe"], tmp_path / "source"), tmp_path / "out"
    moebit.quantize(source, out, recipe=small_recipe("rtn"))
    before = logits_of(load(TINY["qwen3_moe"], out))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.0.mlp.experts.down_proj.scale"):
                tensors[name][3, 5] *= 2
                save_file(tensors, file, metadata={"format": "pt"})
    assert difference(logits_of(load(TINY["qwen3_moe"], out)), before) > 1e-3


def with_prediction_layer(source: Path, experts: int) -> dict[str, torch.Tensor]:
    """Add a layer that the model class does not have, as checkpoints of DeepSeek-V3 do; returns what was added."""
    generator = torch.Generator().manual_seed(0)
    extra = {f"model.layers.2.mlp.experts.{e}.up_proj.weight": torch.randn(32, 64, generator=generator).bfloat16() for e in range(experts)}
    extra |= {"model.layers.2.eh_proj.weight": torch.randn(64, 128, generator=generator).bfloat16()}
    save_file({**load_file(source / "model.safetensors"), **extra}, source / "model.safetensors", metadata={"format": "pt"})
    return extra


def test_prediction_layers_are_reported_and_kept(tmp_path: Path) -> None:
    source, out = build(TINY["deepseek_v3"], tmp_path / "source"), tmp_path / "out"
    extra = with_prediction_layer(source, 1)  # 1 matrix beside 8 x 3
    facts = moebit.inspect(source, small_recipe("rtn"))
    assert facts["not_in_model"] == sorted(extra)
    assert facts["not_in_model_bytes"] == sum(2 * value.numel() for value in extra.values())
    assert math.isclose(facts["plan"]["unquantized_expert_share"], 1 / 25)
    assert "no such layer" in facts["plan"]["kept"]["model.layers.2.mlp.experts"]
    moebit.quantize(source, out, recipe=small_recipe("rtn"))
    stored = stored_tensors(out)
    assert all(stored[name].dtype == value.dtype and torch.equal(stored[name], value) for name, value in extra.items())


def test_a_plan_that_leaves_much_is_refused(tmp_path: Path) -> None:
    source, out = build(TINY["deepseek_v3"], tmp_path / "source"), tmp_path / "out"
    with_prediction_layer(source, 2)  # 2 of 26
    said = ["7.7% of the expert parameters", "model.layers.2.mlp.experts", "4,096 parameters", "--accept-unquantized"]
    for dry_run in (True, False):
        with pytest.raises(BadInputError) as refused:
            moebit.quantize(source, out, recipe=small_recipe("rtn"), dry_run=dry_run)
        assert all(part in str(refused.value) for part in said), refused.value
    command = ["quantize", str(source), "-o", str(out), "--recipe", "rtn-w4", "--set", "weights.group_size=-1"]
    assert isinstance(CliRunner().invoke(app, command).exception, BadInputError)
    assert not out.exists()
    assert CliRunner().invoke(app, [*command, "--accept-unquantized"]).exit_code == 0
    assert out.exists()


def test_experts_ignored_by_name_need_no_flag(tmp_path: Path) -> None:
    source = build(TINY["qwen3_moe"], tmp_path / "source")
    plan = moebit.quantize(
        source, tmp_path / "out", recipe=small_recipe("rtn", weights={"ignore": ["model.layers.0.mlp.experts"]}), dry_run=True
    )
    assert isinstance(plan, Plan)
    assert plan.coverage.share == 0
    assert "ignored" in plan.kept["model.layers.0.mlp.experts"]


def test_llama4_with_several_experts_per_token_is_refused(tmp_path: Path) -> None:
    tiny = TINY["llama4_text"]
    several = type(tiny)(tiny.model_type, tiny.quirks, {**tiny.config, "num_experts_per_tok": 2})
    source = build(several, tmp_path / "source")
    with pytest.raises(BadInputError, match="num_experts_per_tok 2"):
        moebit.inspect(source)
