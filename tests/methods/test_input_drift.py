"""Weights corrected for the drift of their inputs: the ridge regression in numpy, from tokens, and from transformers' own hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moebit
from moebit.calibration.text import TokenText, calibration_windows
from moebit.methods.held_out import held_out_rows
from moebit.methods.input_drift import MUS, InputDriftMoments, correct_input_drift
from moebit.quantize.report import Result
from tests.support.models import ARCHITECTURES, EXPERTS, Checkpoints, load_reference
from tests.support.observer import observed
from tests.support.outputs import file_bytes, mixed_plan, replace_weights, small_recipe, stored_tensors, token_file, with_weights

SAMPLES, LENGTH, TIGHT = 60, 24, 2**17
ROWS, N, T = 5, 6, 64


def ridge(w: np.ndarray, x: np.ndarray, exact: np.ndarray, weight: np.ndarray, mu: float) -> np.ndarray:
    """The minimiser of `sum_t w_t |W' x^q_t - W x_t|^2 + mu |W' - W|^2`, as the regression of targets on inputs."""
    h = (x * weight[:, None]).T @ x
    target = (exact - x) @ w.T
    return w + np.linalg.solve(h + mu * np.diag(h).mean() * np.eye(len(h)), (x * weight[:, None]).T @ target).T


def problem(noise: float) -> tuple[np.ndarray, ...]:
    """(w [ROWS, N], x^q [T, N], x [T, N], weights [T]): a drift that is linear in what arrives, and noise."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(ROWS, N)), rng.normal(size=(T, N)) @ rng.normal(size=(N, N))
    exact = x + 0.3 * x @ rng.normal(size=(N, N)) / N + noise * rng.normal(size=(T, N))
    return w, x, exact, rng.random(T) + 0.1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_against_the_regression(noise: float, weighted: bool) -> None:
    """mu is the best on the held-out tokens, none among them; the fit is then of all tokens."""
    w, x, exact, weight = problem(noise)
    weight = weight if weighted else np.ones(T)
    held = held_out_rows(T, 8).numpy()
    moments = InputDriftMoments.zeros(1, N, T, 8)
    as_tensors = [torch.from_numpy(value).float() for value in (x, exact, weight)]
    for rows in (slice(0, 30), slice(30, T)):
        x_SN, exact_SN, weight_S = (value[rows] for value in as_tensors)
        moments.add(x_SN, exact_SN, weight_S if weighted else None, torch.arange(T)[rows], [0, len(x_SN)])
    result = correct_input_drift(torch.from_numpy(w).unsqueeze(0), moments)

    def left(candidate: np.ndarray) -> float:
        missed = exact[held] @ w.T - x[held] @ candidate.T
        return float((missed**2 * weight[held, None]).sum())

    errors = {mu: left(w if mu is None else ridge(w, x[~held], exact[~held], weight[~held], mu)) for mu in (None, *MUS)}
    best = min(errors, key=lambda mu: errors[mu])
    assert result.mu == [best]
    expected = w if best is None else ridge(w, x, exact, weight, best)
    np.testing.assert_allclose(result.weight[0].double().numpy(), expected, rtol=1e-3, atol=1e-4)
    square = ((x[held] @ w.T) ** 2 * weight[held, None]).sum()
    assert result.gain[0] == pytest.approx((errors[None] - errors[best]) / square, rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(moments.hessian[0].double().numpy(), (x * weight[:, None]).T @ x, rtol=1e-4, atol=1e-3)
    assert (best is None, noise) in ((False, 0.0), (True, 30.0), (best is None, 1.0))


def test_without_drift_or_without_tokens_nothing_changes() -> None:
    w, x, _, _ = problem(0)
    rows, w_CON = torch.from_numpy(x).float(), torch.from_numpy(w).float().expand(2, -1, -1)
    moments = InputDriftMoments.zeros(2, N, T, 8)
    moments.add(rows, rows, None, torch.arange(T), [0, T, T])
    result = correct_input_drift(w_CON, moments)
    assert torch.equal(result.weight, w_CON)
    assert result.mu == [None, None]
    assert result.gain == [0.0, 0.0]


@torch.no_grad()
def inputs(model: Any, name: str, windows: Tensor) -> tuple[np.ndarray, ...]:
    """Arguments that a module of a transformers model is called with, tokens along the first axis."""
    seen: list[tuple[Tensor, ...]] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args))
    try:
        model(input_ids=windows, use_cache=False)
    finally:
        hook.remove()
    return tuple(value.reshape(-1, value.shape[-1]).numpy() for value in seen[0])


@pytest.mark.parametrize("smoothing", ["none", "smoothquant"])
def test_every_linear_of_a_layer(smoothing: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Second layer of a Mixtral whose first is quantized: q, k, v together, o, then the experts on the tokens that they get now.

    Smoothing divides what arrives behind a norm by s, the ratio of the gains before and after: then full precision's inputs are divided
    by it, too, and the columns of what reads them multiplied.
    """
    architecture = ARCHITECTURES["mixtral"]
    path, text = checkpoints.path(architecture), token_file(tmp_path / "t.jsonl", SAMPLES * LENGTH)
    recipe = small_recipe(weights={"bits": 2}, solver={"drift": "ridge", "affinity_power": 1}, samples=SAMPLES, seq_len=LENGTH)
    recipe["smoothing"] = {"kind": smoothing}
    with observed("moebit.solve", lambda w, h, bits: w.float().clone()) as solved:
        result = moebit.quantize(path, tmp_path / "out", recipe=recipe, text={"t": text})
    assert isinstance(result, Result)
    exact, drifted = load_reference(architecture, path).model, with_weights(architecture, path, tmp_path / "out")
    plain = {name.replace("block_sparse_moe", "mlp"): value for name, value in stored_tensors(tmp_path / "out").items()}
    kept = {name for name in dict(drifted.named_parameters()) if name.endswith(("norm.weight", ".gate.weight"))}
    replace_weights(drifted, {name: plain[name] for name in kept})  # smoothing changes these, too
    ids = torch.tensor(json.loads(text.read_text())["input_ids"])
    windows = calibration_windows([TokenText("t", ids, None)], SAMPLES, LENGTH, 0)
    before = dict(exact.named_parameters())
    per_layer = len(solved) // len(result.layers)
    qkv, o, first, down = solved[per_layer : 2 * per_layer]
    report, layer = result.layers[1].drift, "model.layers.1"

    def weight(*names: str) -> np.ndarray:
        return np.concatenate([before[f"{layer}.{name}"].detach().double().numpy() for name in names])

    gains = [dict(model.named_parameters()) for model in (exact, drifted)]
    divisors = {
        name: (gains[0][f"{layer}.{name}.weight"] / gains[1][f"{layer}.{name}.weight"]).detach().double().numpy()
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    assert all((s != 1).any() == (smoothing != "none") for s in divisors.values())

    for found, names in ((qkv, ("q_proj", "k_proj", "v_proj")), (o, ("o_proj",))):
        full = [f"self_attn.{name}.weight" for name in names]
        x, y = (inputs(model, f"{layer}.self_attn.{names[0]}", windows)[0].astype(np.float64) for model in (drifted, exact))
        s = divisors["input_layernorm"] if names[0] == "q_proj" else 1.0
        mu = report[f"self_attn.{names[0]}"]["mu"]
        assert mu is not None
        expected = ridge(weight(*full) * s, x, y / s, np.ones(len(x)), mu)
        np.testing.assert_allclose(found[0].double().numpy(), expected, rtol=2e-3, atol=1e-4 if smoothing == "none" else 1e-3)

    (x, chosen, affinity), (y, *_) = (inputs(model, f"{layer}.mlp.experts", windows) for model in (drifted, exact))
    s = divisors["post_attention_layernorm"]
    x, y = x.astype(np.float64), y.astype(np.float64) / s
    gate_up, w_down = (before[f"{layer}.mlp.experts.{name}"].detach().double().numpy() for name in ("gate_up_proj", "down_proj"))
    gate_up = gate_up * s
    quantized = dict(drifted.named_parameters())[f"{layer}.mlp.experts.gate_up_proj"].detach().double().numpy()

    def through(w: np.ndarray, rows: np.ndarray) -> np.ndarray:
        a, u = np.split(rows @ w.T, 2, axis=1)
        return a / (1 + np.exp(-a)) * u

    corrected = 0
    for e in range(EXPERTS):
        tokens, slot = np.nonzero(chosen == e)
        g = affinity[tokens, slot].astype(np.float64)
        for found, what, w, pair in (
            (first, "gate_up_proj", gate_up, (x[tokens], y[tokens])),
            (down, "down_proj", w_down, (through(quantized[e], x[tokens]), through(gate_up[e], y[tokens]))),
        ):
            mu = report[what]["mu"][e]
            expected = w[e] if mu is None else ridge(w[e], *pair, g, mu)
            np.testing.assert_allclose(
                found[e].double().numpy(), expected, rtol=5e-3, atol=(1e-3 if smoothing == "none" else 5e-3) * np.abs(w[e]).max()
            )
            corrected += mu is not None
    assert corrected > 0


@pytest.mark.parametrize("memory", [2**32, pytest.param(TIGHT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["qwen2_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_interrupted_runs_with_every_option_resume_to_the_same_bytes(
    name: str, memory: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Refit, drift and soft coverage together, every expert and projection at a width of its own."""
    architecture = ARCHITECTURES[name]
    path, text = checkpoints.path(architecture), token_file(tmp_path / "t.jsonl", 6 * LENGTH)
    recipe = small_recipe(solver={"refit": True, "drift": "ridge"})
    recipe["calibration"]["coverage"] = "soft"
    plan = mixed_plan(architecture, path, checkpoints.reference(architecture))

    def quantize(out: str, **options: Any) -> Result:
        result = moebit.quantize(path, tmp_path / out, recipe=recipe, text={"t": text}, plan=plan, memory=memory, **options)
        assert isinstance(result, Result)
        return result

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 1:
            raise KeyboardInterrupt

    plain = quantize("plain")
    with pytest.raises(KeyboardInterrupt):
        quantize("out", progress=stop)
    quantize("out", resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "plain")
    assert not plain.skipped
    assert {"mu", "gain"} == set(plain.layers[-1].drift["down_proj"])
