"""Smoothing in whole layers: transformers' logits stay the same, scales are those of a naive count, no tensor is added."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moebit
from moebit.formats.opening import open_checkpoint
from moebit.model.proof.sites import LayerScales, find_scales
from moebit.model.structure import Structure, find_structure
from moebit.quantize.report import Result
from moebit.quantize.steps.smooth import LayerSmoothing
from moebit.recipe import SmoothingSection
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.edits import EditedWeights
from moebit.storage.hub import HubWeights
from moebit.streaming.reference import captured_inputs
from moebit.streaming.stream import Stream
from tests.methods.test_smoothing import naive_factors
from tests.support.models import ARCHITECTURES, EXPERTS, Architecture, Checkpoints, load_reference, quiet, random_model, save, windows
from tests.support.outputs import file_bytes, small_recipe, stored_tensors, token_file

NAMED = [ARCHITECTURES[name] for name in ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")]
OTHERS = [pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES.values() if a not in NAMED]
MIXTRAL, QWEN2, QWEN3 = (ARCHITECTURES[name] for name in ("mixtral", "qwen2_moe", "qwen3_moe"))
SAMPLES, LENGTH = 6, 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("text") / "text.jsonl", 4 * SAMPLES * LENGTH)


def opened(path: Path) -> tuple[Checkpoint, Structure, tuple[LayerScales, ...]]:
    checkpoint = open_checkpoint(path, compute=torch.float32)
    assert isinstance(checkpoint.weights, HubWeights)
    structure = find_structure(checkpoint.model)
    scales = find_scales(checkpoint, structure)
    return replace(checkpoint, weights=EditedWeights(checkpoint.weights)), structure, scales


def smooth(path: Path, section: SmoothingSection) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint with every layer smoothed and nothing rounded; by layer what was done."""
    checkpoint, structure, scales = opened(path)
    assert isinstance(checkpoint.weights, EditedWeights)
    stream = Stream(checkpoint, structure, windows())
    quantized = {f"{s.name}.{name}" for s in structure.layers for group in s.groups for name in group.names}
    quantized |= {f"{s.name}.{s.moe.experts}" for s in structure.layers if s.moe}
    done, edits = {}, {}
    for sites in structure.layers:
        with stream.loaded(sites.index):
            job = LayerSmoothing(stream, sites, scales[sites.index], section, checkpoint.weights, frozenset(quantized), 3)
            smoothed = job.run()
        stream.step(sites.index, EXPERTS)
        done[sites.name], edits = smoothed.describe(), {**edits, **smoothed.edits}
    checkpoint.weights.add(edits)
    return checkpoint, done


@pytest.mark.parametrize("architecture", [*NAMED, *OTHERS], ids=str)
def test_transformers_computes_the_same_with_smoothed_weights(architecture: Architecture, tmp_path: Path) -> None:
    """Stored in float32, computed in float64: what is left are the roundings of the stored weights."""
    path = save(random_model(replace(architecture, dtype=torch.float32)), tmp_path / "model")
    checkpoint, done = smooth(path, SmoothingSection(kind="expert_aware"))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager").eval()
        before = model(input_ids=windows(), use_cache=False).logits
        changed = 0
        with torch.no_grad():
            for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
                if name in checkpoint.weights.available():
                    value = checkpoint.weights.parameter(name).to(parameter.dtype)
                    changed += not torch.equal(value, parameter)
                    parameter.copy_(value)
        after = model(input_ids=windows(), use_cache=False).logits
    assert float((after - before).detach().abs().max() / before.detach().abs().max()) < 2e-5
    scales = [s for layer in done.values() for s in layer["scales"].values()]
    assert len(scales) + sum(len(layer["skipped"]) for layer in done.values()) > 0
    assert (changed > 0) == bool(scales)
    if architecture in NAMED:
        assert len(scales) >= 4
        behind_up = [name.endswith("down_proj") for layer in done.values() for name in layer["scales"]]  # outliers alone
        assert all(low == 1 if up else low < 0.9 and high > 1.1 for (low, high), up in zip(scales, behind_up, strict=True))


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_inputs_are_divided_by_what_is_said(name: str, tmp_path: Path) -> None:
    """What transformers delivers to every linear and to the experts, before and after: drift is compared in the new scale."""
    architecture = replace(ARCHITECTURES[name], dtype=torch.float32)
    path = save(random_model(architecture), tmp_path / "model")
    checkpoint, structure, scales = opened(path)
    assert isinstance(checkpoint.weights, EditedWeights)
    stream, sites = Stream(checkpoint, structure, windows()), structure.layers[0]
    names = [f"{sites.name}.{n}" for group in sites.groups for n in group.names] + (
        [f"{sites.name}.{sites.moe.experts}"] if sites.moe else []
    )
    section = SmoothingSection(kind="expert_aware")
    with stream.loaded(0):
        smoothed = LayerSmoothing(stream, sites, scales[0], section, checkpoint.weights, frozenset(names), 3).run()
    seen = {full: [] for full in names}
    for edits in ({}, smoothed.edits):
        checkpoint.weights.add(edits)
        again = Stream(checkpoint, structure, windows())
        with again.loaded(0) as layer, captured_inputs(again, [n.removeprefix(f"{sites.name}.") for n in names]) as found:
            again.step(0, EXPERTS)
            assert layer is not None
        for full in names:
            seen[full].append(found[full.removeprefix(f"{sites.name}.")])
    assert {f"{sites.name}.self_attn.o_proj"} < set(smoothed.divisors)
    for full, (before, after) in seen.items():
        torch.testing.assert_close(before / smoothed.divisors.get(full, torch.ones(1)).float(), after, rtol=1e-3, atol=1e-5)


def naive_scales(path: Path, kind: str, aggregate: str, alpha: float) -> np.ndarray:
    """Mixtral's first MoE norm: s by loops over tokens and experts, from transformers' own hidden states."""
    reference = load_reference(MIXTRAL, path)
    routed = reference.routed[0]
    experts: Any = reference.experts(0)
    x, ids = routed.x.double().numpy(), routed.ids.tolist()
    first = experts.gate_up_proj.detach().double().numpy()
    router = reference.layers[0].get_submodule(MIXTRAL.router_name).weight.detach().double().numpy()

    def scale(activation: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.maximum(activation, 1e-5) ** alpha / np.maximum(weight, 1e-5) ** (1 - alpha)

    everything = np.abs(x).max(0)
    if kind == "smoothquant" or aggregate == "none":
        s = scale(everything, np.abs(first).max((0, 1)))
    else:
        candidates, say, probability = [], [], np.exp(x @ router.T)
        probability /= probability.sum(1, keepdims=True)
        for e in range(EXPERTS):
            mine = [t for t in range(len(x)) if e in ids[t]]
            if mine:
                candidates.append(scale(np.abs(x[mine]).max(0), np.abs(first[e]).max(0)))
                say.append(len(mine) if aggregate == "frequency" else sum(probability[t, e] for t in range(len(x))))
        mean = np.average(candidates, axis=0, weights=say)
        s = np.maximum(np.max(candidates, axis=0) if aggregate == "max" else mean, scale(everything, np.abs(router).max(0)))
    return s / np.exp(np.log(s).mean())


@pytest.mark.parametrize(
    ("kind", "aggregate"),
    [("expert_aware", "max"), ("expert_aware", "frequency"), ("expert_aware", "router"), ("expert_aware", "none"), ("smoothquant", "max")],
)
def test_scales_are_those_of_a_naive_count(kind: Any, aggregate: Any, checkpoints: Checkpoints) -> None:
    path = checkpoints.path(MIXTRAL)
    checkpoint, _ = smooth(path, SmoothingSection(kind=kind, aggregate=aggregate, alpha=0.7))
    norm, experts = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.experts.gate_up_proj"
    plain = dict(load_reference(MIXTRAL, path).model.named_parameters())
    s = (plain[norm].detach().double() / checkpoint.weights.parameter(norm).double()).numpy()
    np.testing.assert_allclose(s, naive_scales(path, kind, aggregate, 0.7), rtol=1e-3)
    columns = checkpoint.weights.parameter(experts).double() / plain[experts].detach().double()
    np.testing.assert_allclose(columns.numpy(), np.broadcast_to(s, columns.shape), rtol=1e-4)


def test_behind_up_of_a_shared_expert_only_outliers_are_scaled(tmp_path: Path) -> None:
    model = random_model(replace(QWEN2, dtype=torch.float32))
    up, down = (model.get_parameter(f"model.layers.0.mlp.shared_expert.{name}_proj.weight") for name in ("up", "down"))
    with torch.no_grad():
        up[[1, 5]] *= 40.0
        down[:, [1, 5]] /= 40.0
    path = save(model, tmp_path / "model")
    h = load_reference(QWEN2, path).linear_inputs(0, len(windows()))["mlp.shared_expert.down_proj"].double().numpy()
    expected = np.maximum(naive_factors(h.max(0).tolist()), naive_factors((-h.min(0)).tolist()))
    assert {1, 5} <= set(np.flatnonzero(expected > 1).tolist())
    checkpoint, _ = smooth(path, SmoothingSection(kind="expert_aware"))
    smoothed = checkpoint.weights.parameter("model.layers.0.mlp.shared_expert.down_proj.weight")
    np.testing.assert_allclose((smoothed.double() / down.detach().double()).numpy(), np.broadcast_to(expected, down.shape), rtol=1e-4)


def recipe(**sections: Any) -> dict[str, Any]:
    base = small_recipe("rtn", weights={"bits": 4, "symmetric": False}, samples=SAMPLES, seq_len=LENGTH)
    return {
        **base,
        "smoothing": {"kind": "expert_aware"},
        **sections,
        "calibration": {**base["calibration"], **sections.get("calibration", {})},
    }


def quantize(model: Path, out: Path, text: Path | None, wanted: dict[str, Any], **options: Any) -> Result:
    result = moebit.quantize(model, out, recipe=wanted, text={"t": text} if text else (), **options)
    assert isinstance(result, Result)
    return result


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "compressed-tensors")]


@pytest.mark.parametrize("output", ["native", *SLOWER])
def test_a_smoothed_checkpoint_has_the_tensors_of_an_unsmoothed_one(
    output: str, checkpoints: Checkpoints, text: Path, tmp_path: Path
) -> None:
    path, grid = checkpoints.path(QWEN2), {"weights": {"bits": 4, "group_size": -1, "symmetric": True}}
    quantize(path, tmp_path / "plain", text, {**recipe(smoothing={}), **grid}, format=output)
    quantize(path, tmp_path / "smooth", text, {**recipe(), **grid}, format=output)
    plain, smoothed = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "smooth")
    assert {n: (t.dtype, t.shape) for n, t in plain.items()} == {n: (t.dtype, t.shape) for n, t in smoothed.items()}
    assert any("norm" in name and not torch.equal(t, smoothed[name]) for name, t in plain.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "smooth")]
    assert configs[0] == configs[1]


def test_fine_grids_show_that_nothing_else_changed(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """8 bits, with outliers between up and down: what is loaded computes what the original does, up to its rounding."""
    model = random_model(replace(QWEN3, dtype=torch.float32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                parameter[:, -2:] *= 30.0  # rows of up: two loud neurons per expert
            if name.endswith("experts.down_proj"):
                parameter[..., -2:] /= 30.0
    path = save(model, tmp_path / "model")
    wanted = {**recipe(), "weights": {"bits": 8, "group_size": -1, "symmetric": False}}
    result = quantize(path, tmp_path / "out", text, wanted)
    for layer in (result.layers[0], result.layers[2]):
        assert len(layer.smoothing["outliers"]) == EXPERTS
        assert sum(count >= 2 for count in layer.smoothing["outliers"]) >= EXPERTS - 1
    scores = moebit.evaluate(tmp_path / "out", against=path, text={"t": text}, window=24, max_tokens=240)["texts"]["t"]
    assert scores["kl"] < 2e-4
    assert scores["routing_exact"] > 0.97


@pytest.mark.slow
def test_interrupted_runs_resume_to_the_same_bytes(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    path = checkpoints.path(QWEN3)
    wanted = recipe(
        calibration={"balance": 8, "pool": 2}, router={"bits": 8, "align": "kl", "realign": "ridge"}, rotation={"absorbed": "r1"}
    )
    whole = quantize(path, tmp_path / "plain", text, wanted)
    assert whole.layers[0].balance["short_before"] > 0

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(path, tmp_path / "out", text, wanted, progress=stop)
    quantize(path, tmp_path / "out", text, wanted, resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "plain")


def test_what_cannot_be_smoothed_is_said(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    result = quantize(checkpoints.path(ARCHITECTURES["gpt_oss"]), tmp_path / "out", text, recipe())
    for layer in result.layers:
        assert "outliers" not in layer.smoothing  # h is not linear in up
        assert "not linear in up" in next(why for name, why in layer.smoothing["skipped"].items() if name.endswith("down_proj"))
    only = {**recipe(), "weights": {"bits": 4, "group_size": -1, "symmetric": False, "scope": "experts"}}
    layer = quantize(checkpoints.path(MIXTRAL), tmp_path / "experts", text, only).layers[0]
    assert layer.smoothing["skipped"]["model.layers.0.input_layernorm"] == "nothing behind it is quantized"
    assert list(layer.smoothing["scales"]) == ["model.layers.0.post_attention_layernorm"]


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h_latent", *(pytest.param(n, marks=pytest.mark.slow) for n in ("jamba", "minimax"))])
def test_every_matrix_is_scaled_or_it_is_said_why_not(name: str, checkpoints: Checkpoints) -> None:
    """Where no norm stands in front (a latent, a state space), for one; a norm that cannot be scaled speaks for all that read it."""
    _, structure, found = opened(checkpoints.path(ARCHITECTURES[name]))
    left = 0
    for sites, scales in zip(structure.layers, found, strict=True):
        names = {f"{sites.name}.{linear}" for group in sites.groups for linear in group.names}
        names |= {f"{sites.name}.{sites.moe.experts}"} if sites.moe else set()
        scaled = {reader for site in scales.norms for reader in (*site.readers, site.experts)} | {pair.second for pair in scales.pairs}
        silent = names - scaled - set(scales.skipped)
        assert not silent or any("reads this norm" in why for why in scales.skipped.values()), silent
        assert not scaled & set(scales.skipped)
        left += len(names - scaled)
    assert (left > 0) == (name != "mixtral")


@pytest.mark.slow
def test_eaquant_spares_a_model_with_outliers(text: Path, tmp_path: Path) -> None:
    """A few channels of every norm made loud, its readers quiet: the same function, which rounding to nearest at 4 bits ruins."""
    model = random_model(replace(MIXTRAL, dtype=torch.float32))
    loud = torch.tensor([3, 17, 40, 55])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[loud] *= 32.0
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_up_proj", "mlp.gate.weight")):
                parameter[..., loud] /= 32.0
    path, kl = save(model, tmp_path / "model"), {}
    for name in ("rtn-w4a4", "smoothquant-w4a4", "eaquant-w4a4"):
        changes = {"calibration.samples": SAMPLES, "calibration.seq_len": LENGTH}
        moebit.quantize(path, tmp_path / name, recipe=name, overrides=changes, text={"t": text})
        kl[name] = moebit.evaluate(tmp_path / name, against=path, text={"t": text}, window=24, max_tokens=240)["texts"]["t"]["kl"]
    assert kl["eaquant-w4a4"] < 0.5 * kl["rtn-w4a4"], kl
    assert kl["smoothquant-w4a4"] < kl["rtn-w4a4"], kl
