"""Learned rounding behind the solver: what it compares, checked with transformers, and that it is a step like any other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moebit
from moebit.calibration.text import TokenText, calibration_windows
from moebit.errors import BadInputError
from moebit.methods.learned_rounding import Objective
from moebit.plan.plan import Plan
from moebit.quantize.report import LayerReport, Result
from moebit.recipe import Recipe
from moebit.tensor import QTensor
from tests.support.models import ARCHITECTURES, Checkpoints, load_reference
from tests.support.observer import listening
from tests.support.outputs import file_bytes, mixed_plan, small_recipe, stored_tensors, token_file, with_weights

SAMPLES, LENGTH, TIGHT = 20, 24, 2**17
REFINE = {"kind": "straight_through", "steps": 30, "rate": 0.005}
MIXTRAL, EXPERTS = ARCHITECTURES["mixtral"], "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("text") / "text.jsonl", SAMPLES * LENGTH)


def recipe(method: str = "gptq", refine: dict[str, Any] | None = None, **solver: Any) -> dict[str, Any]:
    basis = small_recipe(method, weights={"bits": 2}, solver=solver, samples=SAMPLES, seq_len=LENGTH)
    return {**basis, "refine": {**REFINE, **(refine or {})}}


def quantize(model: Path, out: Path, text: Path, chosen: dict[str, Any], **options: Any) -> Result:
    result = moebit.quantize(model, out, recipe=chosen, text={"t": text}, **options)
    assert isinstance(result, Result)
    return result


def rows(report: LayerReport) -> dict[str, list[Any]]:
    """Of the routed experts."""
    return dict(next(row for row in report.refine.values() if "first_expert" in row))


def linears(report: LayerReport) -> dict[str, list[Any]]:
    """Of the linears in front of the experts."""
    return dict(next(row for row in report.refine.values() if "linears" in row))


@torch.no_grad()
def behind_layer(model: Any, index: int, windows: Tensor, silent: bool = False) -> Tensor:
    """[N, L, H] what a layer of a transformers model puts out; silent: while the experts of this layer put out nothing."""
    layer, seen = model.model.layers[index], list[Tensor]()
    hooks = [layer.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))]
    if silent:
        hooks.append(layer.mlp.experts.register_forward_hook(lambda m, args, out: torch.zeros_like(out)))
    try:
        model(input_ids=windows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_the_loss_is_of_the_layers_output(name: str, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """Second layer, all experts at once, with both models in transformers: the layer's output, and the same without routed experts."""
    arch = ARCHITECTURES[name]
    path = checkpoints.path(arch)
    refined = quantize(path, tmp_path / "refined", text, recipe())
    exact, drifted = load_reference(arch, path).model, with_weights(arch, path, tmp_path / "refined")
    ids = torch.tensor(json.loads(text.read_text())["input_ids"])
    windows = calibration_windows([TokenText("t", ids, None)], SAMPLES, LENGTH, 0)
    held = torch.arange(SAMPLES) % 10 == 9
    found = [row for row in refined.layers[1].refine.values() if "linears" in row]
    for row, silent in ((rows(refined.layers[1]), False), (found[-1], True)):
        should, does = (behind_layer(model, 1, windows, silent)[held].double() for model in (exact, drifted))
        left = ((does - should).square().sum(-1) / should.square().sum(-1)).mean()
        assert row["after"] == pytest.approx([float(left)], rel=1e-3)
        assert row["after"][0] <= row["before"][0]
    assert rows(refined.layers[1])["after"][0] < rows(refined.layers[1])["before"][0]
    assert rows(refined.layers[1])["first_expert"] == [0]


@torch.no_grad()
def test_the_last_of_several_chunks_sees_the_finished_layer(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """One expert in memory at a time: what the last one is judged by is the whole layer's error, over the held-back tokens it gets."""
    path = checkpoints.path(MIXTRAL)
    refined = quantize(path, tmp_path / "refined", text, recipe(), memory=TIGHT)
    exact, drifted = load_reference(MIXTRAL, path).model, with_weights(MIXTRAL, path, tmp_path / "refined")
    ids = torch.tensor(json.loads(text.read_text())["input_ids"])
    windows = calibration_windows([TokenText("t", ids, None)], SAMPLES, LENGTH, 0)
    chosen: list[Tensor] = []
    hook = drifted.get_submodule(EXPERTS).register_forward_pre_hook(lambda m, args: chosen.append(args[1]))
    should, does = (behind_layer(model, 1, windows).double().flatten(0, 1) for model in (exact, drifted))
    hook.remove()
    held = (torch.arange(SAMPLES) % 10 == 9).repeat_interleave(LENGTH) & (chosen[0] == MIXTRAL_EXPERTS - 1).any(1)
    row = rows(refined.layers[1])
    assert row["first_expert"] == list(range(MIXTRAL_EXPERTS))
    if row.get("after", [None] * MIXTRAL_EXPERTS)[-1] is None:
        pytest.skip("no token that is held back reaches the last expert")
    left = ((does - should).square().sum(1) / should.square().sum(1))[held].mean()
    assert row["after"][-1] == pytest.approx(float(left), rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_gradient_is_that_of_the_loss(name: str, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """Along itself, in every projection, by finite differences; gpt_oss has biases and alternating gate and up rows."""
    path, checked = checkpoints.path(ARCHITECTURES[name]), []

    def check(quantized: dict[str, QTensor], weights: dict[str, Tensor], objective: Objective) -> None:
        values = {p: q.dequantize() for p, q in quantized.items()}
        loss, found = objective.gradients(values, 3)
        assert objective.gradients(values, 3)[0] == loss
        for projection, gradient in found.items():
            h, length = 0.01, float(gradient.norm())
            moved = [{**values, projection: values[projection] + sign * h * gradient / length} for sign in (1, -1)]
            up, down = (objective.gradients(each, 3)[0] for each in moved)
            assert (up - down) / (2 * h) == pytest.approx(length, rel=0.02)
            checked.append(projection)

    with listening("moebit.learn", check):
        quantize(path, tmp_path / "out", text, recipe("rtn", {"steps": 1}))
    attention = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    assert checked == [*attention, "gate_proj", "up_proj", "down_proj"] * sum(ARCHITECTURES[name].moe)


@pytest.mark.parametrize("name", ["olmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt_oss", "qwen2_moe", "deepseek_v3"))])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_it_never_ends_worse(name: str, method: str, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES[name])
    result = quantize(path, tmp_path / "out", text, recipe(method))
    refined = [report for report in result.layers if report.refine]
    assert len(refined) == len(ARCHITECTURES[name].moe)
    for row in [row for report in refined for row in report.refine.values()]:
        assert row["after"][0] <= row["before"][0]
        (tries,) = row["tries"]
        assert [t["rate"] for t in tries] == [0.005]
        assert tries[0]["steps"][0] == 0
        assert all(a < b for a, b in pairwise(tries[0]["steps"]))
        assert len(tries[0]["train"]) == len(tries[0]["steps"]) - 1


def test_at_rate_zero_the_bytes_are_the_solvers(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path = checkpoints.path(MIXTRAL)
    plain = quantize(path, tmp_path / "plain", text, {**recipe(), "refine": {"kind": "none"}})
    still = quantize(path, tmp_path / "still", text, recipe(refine={"rate": 0.0}))
    for name, tensor in stored_tensors(plain.path).items():
        assert torch.equal(tensor, stored_tensors(still.path)[name]), name
    assert all(not report.refine for report in plain.layers)


def test_drift_is_corrected_only_where_the_recipe_says_so(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path = checkpoints.path(MIXTRAL)
    without = quantize(path, tmp_path / "without", text, recipe(refine={"rate": 0.0}))
    corrected = quantize(path, tmp_path / "corrected", text, recipe(drift="ridge"))
    assert all(not report.drift for report in without.layers)
    assert all(report.drift for report in corrected.layers)


@pytest.mark.slow
def test_widths_of_their_own_and_chunks(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """Every expert and projection with another width; all experts at once, and one after the other."""
    path = checkpoints.path(MIXTRAL)
    plan = mixed_plan(MIXTRAL, path, load_reference(MIXTRAL, path))
    for memory, chunks in ((2**32, 1), (TIGHT, MIXTRAL_EXPERTS)):
        result = quantize(path, tmp_path / f"out{memory}", text, recipe(), plan=plan, memory=memory)
        row = rows(result.layers[1])
        assert len(row["first_expert"]) == chunks
        assert all(after <= before for before, after in zip(row["before"], row["after"], strict=True) if before is not None)


MIXTRAL_EXPERTS = 8


class Stopped(Exception):
    pass


@pytest.mark.parametrize("memory", [2**32, pytest.param(TIGHT, marks=pytest.mark.slow)])
def test_the_same_bytes_twice_and_when_resumed(memory: int, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path, short = checkpoints.path(MIXTRAL), recipe(refine={"steps": 8})

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("learning", 6):
            seen.append(done)
            if len(seen) == (4 if memory > TIGHT else 12):
                raise Stopped

    seen: list[int] = []
    plain = quantize(path, tmp_path / "a" / "out", text, short, memory=memory)
    again = quantize(path, tmp_path / "b" / "out", text, short, memory=memory)
    with pytest.raises(Stopped):
        quantize(path, tmp_path / "c" / "out", text, short, memory=memory, progress=stop)
    resumed = quantize(path, tmp_path / "c" / "out", text, short, memory=memory, resume=True)
    assert file_bytes(plain.path) == file_bytes(again.path) == file_bytes(resumed.path)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"rotation": {"online": "hadamard"}}, "rotation.online: none"),
        ({"refine": {"kind": "sign", "tune": []}}, "codes, scales"),
        ({"refine": {"kind": "sign", "rate": 2.0}}, "between 0 and 1"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    changes: dict[str, Any], remedy: str, checkpoints: Checkpoints, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=remedy):
        quantize(checkpoints.path(MIXTRAL), tmp_path / "out", text, {**recipe(), **changes})


COMBINED = [
    ("mixtral", "gptq", {"activations": {"bits": 4}}),
    ("qwen2_moe", "awq", {}),
    ("olmoe", "gptq", {"smoothing": {"kind": "smoothquant"}, "rotation": {"absorbed": "r1"}}),
    ("qwen2_moe", "gptq", {"weights": {"bits": 2, "group_size": -1, "symmetric": False}}),
]


@pytest.mark.parametrize(("name", "method", "changes"), COMBINED)
def test_it_goes_with_scaled_channels_rotations_and_rounded_inputs(
    name: str, method: str, changes: dict[str, Any], checkpoints: Checkpoints, text: Path, tmp_path: Path
) -> None:
    path = checkpoints.path(ARCHITECTURES[name])
    result = quantize(path, tmp_path / "out", text, {**recipe(method), **changes})
    rows = [row for report in result.layers for row in report.refine.values()]
    assert not [row["skipped"] for row in rows if "skipped" in row]
    assert all(row["after"][0] <= row["before"][0] for row in rows)
    assert any(row["after"][0] < row["before"][0] for row in rows)


def test_a_recipe_without_it_keeps_its_text_and_digest() -> None:
    assert "refine" not in Recipe().to_yaml()
    assert Recipe.model_validate({"refine": {"kind": "none"}}).digest() == Recipe().digest()
    assert "refine" in Recipe.model_validate({"refine": {"kind": "sign"}}).to_yaml()


def test_the_plan_knows_that_it_takes_time_and_memory(checkpoints: Checkpoints, text: Path) -> None:
    path = checkpoints.path(MIXTRAL)
    plans = [
        moebit.quantize(path, "unused", recipe=recipe(refine=refine), text={"t": text}, dry_run=True)
        for refine in ({"kind": "none"}, {"steps": 100}, {"steps": 1000})
    ]
    none, few, many = (plan for plan in plans if isinstance(plan, Plan))
    assert none.seconds < few.seconds < many.seconds
    assert none.peak_bytes < few.peak_bytes == many.peak_bytes
