"""What Hessians of experts are drawn towards with soft coverage, against loops over tokens of what transformers itself computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moebit
from moebit.methods import soft_coverage as module
from moebit.methods.router import NO_SCORE
from moebit.methods.soft_coverage import soft_coverage
from moebit.model.experts import RoutedTokens
from moebit.quantize.steps import routing
from tests.support import reference
from tests.support.models import ARCHITECTURES, EXPERTS, Checkpoints, windows
from tests.support.observer import observed
from tests.support.outputs import file_bytes, small_recipe, token_file

SOFT = {"calibration": {"samples": 6, "seq_len": 24, "coverage": "soft"}}


def probabilities(z_E: np.ndarray, score: str) -> np.ndarray:
    value = np.exp(z_E - z_E.max()) if score == "softmax" else 1 / (1 + np.exp(-z_E))
    return value / value.sum()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_hessians_of_the_first_experts(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    """Only the experts of the first layer that has some are quantized: what arrives at them is transformers' own."""
    architecture = ARCHITECTURES[name]
    path, found = checkpoints.path(architecture), checkpoints.reference(architecture)
    index = architecture.first_moe
    text = tmp_path / "t.jsonl"
    text.write_text("".join(f'{{"input_ids": {row}}}\n' for row in windows().tolist()))
    experts = [f"{found.layers_name}.{n}.{architecture.block}.experts" for n, moe in enumerate(architecture.moe) if moe and n != index]
    recipe = small_recipe(weights={"scope": "experts", "ignore": experts}, samples=len(windows()))
    recipe["calibration"]["coverage"] = "soft"
    with observed("moebit.solve", lambda w, h, bits: h.clone()) as solved:
        result = moebit.quantize(path, tmp_path / "out", recipe=recipe, text={"t": text}, accept_unquantized=True)
    x = found.routed[index].router_x.double().numpy()
    router = found.layers[index].get_submodule(architecture.router_name)
    z = x @ router.weight.detach().double().numpy().T
    z = z + router.bias.detach().double().numpy() if getattr(router, "bias", None) is not None else z
    p = np.stack([probabilities(row, "sigmoid" if name == "deepseek_v3" else "softmax") for row in z])
    routed, hessians = found.routed[index], solved[0].double().numpy()
    assert result.layers[index].coverage == {"soft": len(x)}  # type: ignore[union-attr]
    for e in range(EXPERTS):
        target = sum(p[t, e] * np.outer(x[t], x[t]) for t in range(len(x))) / sum(p[t, e] for t in range(len(x)))
        own = np.array([t for t in range(len(x)) if e in routed.ids[t].tolist()], dtype=int)
        expected = reference.shrink(*reference.weighted_hessian(x[own], np.ones(len(own))), target)
        np.testing.assert_allclose(hessians[e], expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def test_down_is_drawn_towards_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token counts for an expert by its share; shares of one expert add up to one, whatever chunk it is in."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(40, 6, generator=generator), torch.randn(5, 6, generator=generator)
    p = (x @ w.T).softmax(1)
    affinity, ids = p.topk(2, 1)
    monkeypatch.setattr(module, "PIECE", 7)
    soft = soft_coverage(x, w, None, RoutedTokens(x, ids, affinity / affinity.sum(1, keepdim=True)), torch.arange(40))
    assert soft is not None
    torch.testing.assert_close(soft.shares, p / p.sum(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(soft.through.sum(0), torch.ones(5))
    whole = soft.moments(x, 0, 5)
    assert torch.equal(whole[2:4], soft.moments(x, 2, 4))
    expected = sum(float(p[t, 3]) * torch.outer(x[t], x[t]) for t in range(40)) / float(p[:, 3].sum())
    torch.testing.assert_close(whole[3], expected)
    scrambled = RoutedTokens(x, ids, torch.rand(40, 2, generator=generator))
    assert soft_coverage(x, w, None, scrambled, torch.arange(40)) is None


def test_a_router_that_says_more_than_its_logits_gets_the_layers(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of `layer`, and the result says why."""
    path, text = checkpoints.path(ARCHITECTURES["mixtral"]), token_file(tmp_path / "t.jsonl", 6 * 24)
    moebit.quantize(path, tmp_path / "plain", recipe=small_recipe(), text={"t": text})
    monkeypatch.setattr(routing, "soft_coverage", lambda *args: None)
    result = moebit.quantize(path, tmp_path / "out", recipe={**small_recipe(), **SOFT}, text={"t": text})
    assert result.skipped == {f"calibration.coverage: {NO_SCORE}": len(result.layers)}  # type: ignore[union-attr]
    weights = {name: data for name, data in file_bytes(tmp_path / "out").items() if name.endswith(".safetensors")}
    assert weights == {name: data for name, data in file_bytes(tmp_path / "plain").items() if name.endswith(".safetensors")}
