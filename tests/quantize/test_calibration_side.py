"""Routers and balance in the whole pipeline, on tiny models: what is written against transformers and numpy, and interrupted runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moebit
from moebit.calibration.text import TokenText, calibration_windows
from moebit.methods.balance import further_windows
from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, dispatch
from moebit.model.proof.router import not_linear
from moebit.model.skeleton import skeleton
from moebit.model.structure import find_structure
from moebit.quantize.chunk import ExpertChunk, ExpertInputs, PoolInputs, ShrinkTarget, Weighing
from moebit.quantize.report import Result
from moebit.ranks import Sums
from moebit.streaming.store import ActivationStore
from tests.support.models import ARCHITECTURES, EXPERTS, TOP_K, Architecture, Checkpoints, load_reference
from tests.support.outputs import file_bytes, small_recipe, stored_tensors, token_file, with_weights

SAMPLES, LENGTH, MANY = 8, 24, 80
MIXTRAL, QWEN2, DEEPSEEK, GPT_OSS = (ARCHITECTURES[name] for name in ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"))
TIGHT = 2**17
REALIGN = {"router": {"realign": "ridge"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("text") / "text.jsonl", 4 * SAMPLES * LENGTH)


def recipe(method: str = "gptq", *, bits: int = 3, **sections: Any) -> dict[str, Any]:
    base = small_recipe(method, weights={"bits": bits, "symmetric": False}, samples=SAMPLES, seq_len=LENGTH)
    return {**base, **sections, "calibration": {**base["calibration"], **sections.get("calibration", {})}}


def quantize(model: Path, out: Path, text: Path | None, wanted: dict[str, Any], **options: Any) -> Result:
    result = moebit.quantize(model, out, recipe=wanted, text={"t": text} if text else (), **options)
    assert isinstance(result, Result)
    return result


def base_windows(text: Path, samples: int = SAMPLES) -> Tensor:
    ids = torch.tensor(json.loads(text.read_text())["input_ids"])
    return calibration_windows([TokenText("t", ids, None)], samples, LENGTH, 0)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough tokens for a regression on 64 channels to be worth while."""
    return token_file(tmp_path_factory.mktemp("text") / "text.jsonl", MANY * LENGTH)


@torch.no_grad()
def router_inputs(model: PreTrainedModel, name: str, windows: Tensor) -> Tensor:
    """[T, H] what a module of a transformers model is called with."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        model(input_ids=windows, use_cache=False)
    finally:
        hook.remove()
    return torch.cat(seen)


def router_names(architecture: Architecture, layers: str) -> list[str]:
    return [f"{layers}.{index}.{architecture.router_name}" for index, moe in enumerate(architecture.moe) if moe]


@pytest.mark.parametrize("architecture", [MIXTRAL, GPT_OSS], ids=str)
def test_realigned_routers_are_the_ridge_regression(
    architecture: Architecture, checkpoints: Checkpoints, long_text: Path, tmp_path: Path
) -> None:
    """Layer after layer, from transformers' own hidden states: of the original, and of what was written with the routers before it."""
    path = checkpoints.path(architecture)
    result = quantize(path, tmp_path / "out", long_text, recipe(bits=2, calibration={"samples": MANY}, **REALIGN))
    reference, windows, stored = load_reference(architecture, path), base_windows(long_text, MANY), stored_tensors(tmp_path / "out")
    model, parameters = with_weights(architecture, path, tmp_path / "out"), dict(reference.model.named_parameters())
    reports = [layer.router for layer in result.layers]
    for name, report in zip(router_names(architecture, reference.layers_name), reports, strict=True):
        weight = parameters[f"{name}.weight"].detach()
        target = router_inputs(reference.model, name, windows) @ weight.T
        x = router_inputs(model, name, windows).double().numpy()
        mu = report["mu"] * (x**2).sum(0).mean()
        missed = target.double().numpy() - x @ weight.double().numpy().T
        expected = weight.double().numpy() + np.linalg.solve(x.T @ x + mu * np.eye(x.shape[1]), x.T @ missed).T
        written = stored[f"{name}.weight"]
        tolerance = 2e-2 if written.dtype == torch.bfloat16 else 2e-3
        np.testing.assert_allclose(written.double().numpy(), expected, rtol=tolerance, atol=tolerance)
        assert report["held_out_error"][1] < report["held_out_error"][0]
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(written.float())


def test_the_report_says_what_transformers_says(checkpoints: Checkpoints, long_text: Path, tmp_path: Path) -> None:
    """First layer: sets of experts and divergence of the router on quantized attention, before and after, counted here."""
    path = checkpoints.path(MIXTRAL)
    result = quantize(path, tmp_path / "out", long_text, recipe(bits=2, calibration={"samples": MANY}, **REALIGN))
    reference, windows = load_reference(MIXTRAL, path), base_windows(long_text, MANY)
    model = with_weights(MIXTRAL, path, tmp_path / "out")
    name = router_names(MIXTRAL, reference.layers_name)[0]
    old, new = reference.model.get_parameter(f"{name}.weight").detach(), stored_tensors(tmp_path / "out")[f"{name}.weight"]
    theirs = (router_inputs(reference.model, name, windows) @ old.T).double()
    x = router_inputs(model, name, windows)
    for key, weight in (("before", old), ("after", new)):
        mine = (x @ weight.T).double()
        exact = overlap = kl = 0.0
        for a, b in zip(theirs, mine, strict=True):
            common = set(a.topk(TOP_K).indices.tolist()) & set(b.topk(TOP_K).indices.tolist())
            exact, overlap = exact + (len(common) == TOP_K), overlap + len(common) / TOP_K
            p, q = a.softmax(0), b.softmax(0)
            kl += float((p * (p / q).log()).sum())
        row = result.layers[0].router[key]
        assert row["routing_exact"] == pytest.approx(exact / len(theirs), abs=2 / len(theirs))
        assert row["routing_overlap"] == pytest.approx(overlap / len(theirs), abs=2 / len(theirs))
        assert row["kl"] == pytest.approx(kl / len(theirs), rel=1e-2)
    assert result.layers[0].router["after"]["kl"] < result.layers[0].router["before"]["kl"]


@pytest.mark.parametrize("architecture", [MIXTRAL, QWEN2, DEEPSEEK, GPT_OSS], ids=str)
def test_aligned_routers_lie_on_their_grid(architecture: Architecture, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path = checkpoints.path(architecture)
    wanted = recipe("rtn", router={"bits": 3, "align": "kl", "top_share": 0.5})
    result = quantize(path, tmp_path / "out", text, wanted)
    stored, reference = stored_tensors(tmp_path / "out"), load_reference(architecture, path)
    parameters = dict(reference.model.named_parameters())
    reports = [layer.router for layer in result.layers if layer.router]
    names = router_names(architecture, reference.layers_name)
    assert len(reports) == len(names)
    for name, report in zip(names, reports, strict=True):
        weight = stored[f"{name}.weight"]
        assert weight.dtype == architecture.dtype
        assert max(len(set(row)) for row in weight.tolist()) <= 8
        assert not torch.equal(weight.float(), parameters[f"{name}.weight"])
        assert report["skipped"] == {}
        assert report["score"] == ("sigmoid" if architecture is DEEPSEEK else "softmax")
        assert report["loss"] <= report["loss_unclipped"]
        assert report["against"] == "the router as it was"
        assert report["before"] == {"routing_exact": 1.0, "routing_overlap": 1.0, "kl": pytest.approx(0.0, abs=1e-9)}
        assert 0 < report["after"]["kl"] < 1
        assert 0 < report["after"]["routing_exact"] <= 1
    model = moebit.evaluate(tmp_path / "out", text={"t": text}, window=24, max_tokens=96)
    assert model["texts"]["t"]["perplexity"] > 0


def test_routers_can_be_rounded_without_data(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints.path(MIXTRAL)
    quantize(path, tmp_path / "out", None, recipe("rtn", router={"bits": 4}))
    stored, reference = stored_tensors(tmp_path / "out"), load_reference(MIXTRAL, path)
    for name in router_names(MIXTRAL, reference.layers_name):
        weight, original = stored[f"{name}.weight"], reference.model.get_parameter(f"{name}.weight").detach()
        assert max(len(set(row)) for row in weight.tolist()) <= 16
        assert float((weight - original).norm() / original.norm()) < 0.12


@pytest.mark.parametrize("output", ["dense", pytest.param("compressed-tensors", marks=pytest.mark.slow)])
def test_other_formats_hold_the_changed_router(output: str, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path = checkpoints.path(QWEN2)
    wanted = {**recipe(**REALIGN), "weights": {"bits": 4, "group_size": -1}}
    quantize(path, tmp_path / "native", text, wanted)
    quantize(path, tmp_path / "other", text, wanted, format=output)
    native, other = stored_tensors(tmp_path / "native"), stored_tensors(tmp_path / "other")
    original = load_reference(QWEN2, path).model
    name = router_names(QWEN2, "model.layers")[0]  # formats differ in how they round what stands in front of it
    mine, theirs = native[f"{name}.weight"].float(), other[f"{name}.weight"].float()
    moved = float((theirs - original.get_parameter(f"{name}.weight").detach()).norm())
    assert moved > 0
    assert float((mine - theirs).norm()) < 0.3 * moved


@pytest.mark.parametrize("memory", [2**32, pytest.param(TIGHT, marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_to_the_same_bytes(memory: int, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """Three streams side by side: all of them are taken up again."""
    path = checkpoints.path(ARCHITECTURES["qwen3_moe"])
    wanted = recipe(
        router={"bits": 8, "align": "kl", "realign": "ridge", "realign_weight": "margin"}, calibration={"balance": 6, "pool": 2}
    )
    quantize(path, tmp_path / "plain", text, wanted, memory=memory)

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(path, tmp_path / "out", text, wanted, memory=memory, progress=stop)
    quantize(path, tmp_path / "out", text, wanted, memory=memory, resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "plain")


def test_balance_gives_rare_experts_tokens_of_their_own(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path, ratio = checkpoints.path(MIXTRAL), 8.0
    plain = quantize(path, tmp_path / "plain", text, recipe())
    balanced = quantize(path, tmp_path / "balanced", text, recipe(calibration={"balance": ratio, "pool": 2}))
    before, report = plain.layers[0].tokens_per_expert, balanced.layers[0].balance
    assert balanced.layers[0].tokens_per_expert == before
    wanted = ratio * TOP_K * LENGTH / EXPERTS
    assert report["wanted"] == wanted
    assert report["short_before"] == sum(count < wanted for count in before)
    assert 0 < report["short_before"] < EXPERTS
    assert report["short_after"] < report["short_before"]
    assert [count > 0 for count in report["drawn"]] == [count < wanted for count in before]
    a, b = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "balanced")
    for projection in ("gate_proj", "down_proj"):
        codes = [t[f"model.layers.0.mlp.experts.{projection}.codes"].view(EXPERTS, -1) for t in (a, b)]
        changed = [not torch.equal(x, y) for x, y in zip(*codes, strict=True)]
        assert changed == [count < wanted for count in before]  # the extra tokens count for the rare experts alone


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_drawn_tokens_count_for_the_expert_that_drew_them(power: float) -> None:
    """Hessians against a loop over tokens: those of the set for everyone, those of the pool for who took them."""
    g = torch.Generator().manual_seed(0)
    experts, size, stream = 4, 6, SimpleNamespace(slots=7, store=ActivationStore())

    def tokens(count: int) -> RoutedTokens:
        ids = torch.rand(count, experts, generator=g).topk(2, 1).indices
        return RoutedTokens(torch.randn(count, size, generator=g), ids, torch.rand(count, 2, generator=g))

    base, pool = tokens(20), tokens(30)
    taken = pool.ids.masked_fill(torch.rand(pool.ids.shape, generator=g) < 0.5, experts)
    slots, extra, every = (dispatch(ids, of.weights, experts) for ids, of in ((base.ids, base), (taken, pool), (pool.ids, pool)))
    h_layer = base.x.T @ base.x / len(base.x)
    pooled = PoolInputs(stream, pool.x, every, extra, Sums(torch.zeros_like(pool.x)))  # type: ignore[arg-type]
    layout = ExpertsLayout(experts, size, 3, True, False, False, False)
    target, outputs = ShrinkTarget(base.x, h_layer), Sums(torch.zeros_like(base.x))
    inputs = ExpertInputs(stream, base.x, slots, outputs, target, Weighing(power), pooled)  # type: ignore[arg-type]
    weights = ExpertWeights(torch.zeros(3, 6, size), torch.zeros(3, size, 3))
    result = inputs.hessians(ExpertChunk(None, layout, 1, 4, weights))
    for e in range(1, 4):
        total, weight, squares = np.zeros((size, size)), 0.0, 0.0
        for of, ids in ((base, base.ids), (pool, taken)):
            for t in range(len(ids)):
                for slot in range(2):
                    if int(ids[t, slot]) == e:
                        w, x = float(of.weights[t, slot]) ** power, of.x[t].double().numpy()
                        total, weight, squares = total + w * np.outer(x, x), weight + w, squares + w * w
        c = size / (size + weight**2 / squares)
        expected = (1 - c) * total / weight + c * h_layer.double().numpy()
        np.testing.assert_allclose(result[e - 1].double().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_text_without_further_windows_says_so(checkpoints: Checkpoints, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", SAMPLES * LENGTH)
    result = quantize(checkpoints.path(MIXTRAL), tmp_path / "out", text, recipe(calibration={"balance": 6}))
    for layer in result.layers:
        assert layer.balance["drawn"] == [0] * EXPERTS
        assert layer.balance["short_after"] == layer.balance["short_before"]


def test_what_the_pool_is_made_of(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """moebit.json names the pool's tokens by their digest."""
    quantize(checkpoints.path(MIXTRAL), tmp_path / "out", text, recipe(calibration={"balance": 6, "pool": 2}))
    ids = torch.tensor(json.loads(text.read_text())["input_ids"])
    pool = further_windows([ids], SAMPLES, LENGTH, 0, 2)
    assert len(pool) == 2 * SAMPLES
    assert json.loads((tmp_path / "out" / "moebit.json").read_text())["pool"] == moebit.calibration.text.digest(pool)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_routers_that_follow_from_their_logits_are_found_out(name: str) -> None:
    """Every router of these architectures is a product with its weight and something behind it."""
    model = skeleton(ARCHITECTURES[name].make_config())
    for sites in find_structure(model).moe_layers:
        assert not_linear(model.get_submodule(sites.name), sites) is None


def test_routers_that_do_more_are_found_out() -> None:
    model = skeleton(MIXTRAL.make_config())
    sites = find_structure(model).layers[0]
    layer = model.get_submodule(sites.name)
    assert sites.moe is not None
    assert sites.moe.router is not None
    router = layer.get_submodule(sites.moe.router)
    plain = type(router).forward

    class Normed(type(router)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return plain(self, x / x.norm(dim=-1, keepdim=True))

    class Cosine(type(router)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return torch.nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))

    class Hashed(type(router)):  # type: ignore[misc]
        def forward(self, x: Tensor, tokens: Tensor) -> Any:
            return plain(self, x)

    for kind, says in ((Normed, "more than a product"), (Cosine, "more than a product"), (Hashed, "does not run on its input alone")):
        router.__class__ = kind
        assert says in str(not_linear(layer, sites))
