"""AWQ against its formula in naive loops, and on whole models: the function is kept, errors fall, a resumed run gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moebit
from moebit.formats.opening import open_checkpoint
from moebit.methods.awq import RATIOS, SAMPLE, best, candidates, losses, magnitudes, representable, sampled_slots
from moebit.model.proof.sites import find_scales
from moebit.model.structure import find_structure
from moebit.quantize.steps.scale import LayerAWQ, Rounding
from moebit.storage.edits import apply_edits
from moebit.streaming.stream import Stream
from moebit.tensor import UniformGrid
from tests.support.models import ARCHITECTURES, Checkpoints, quiet, windows
from tests.support.outputs import file_bytes, small_recipe, token_file
from tests.support.reference import Grid, decode, encode, group_slices, matrix_grid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_loss(w: np.ndarray, s: np.ndarray, x: np.ndarray, weight: np.ndarray, grid: Grid, clip: bool) -> float:
    """sum_t weight_t || Q(W diag(s)) diag(s)^-1 x_t - W x_t ||^2 of one matrix."""
    scaled = w * s
    importance = sum(weight[t] * (x[t] / s) ** 2 for t in range(len(x)))
    scale, zero = matrix_grid(scaled, grid, importance, clip_search=clip)
    total = 0.0
    for t, x_t in enumerate(x):
        for row in range(len(w)):
            missed = 0.0
            for group, part in enumerate(group_slices(w.shape[1], grid.group_size)):
                for j in range(*part.indices(w.shape[1])):
                    z, sc = int(zero[row, group]), float(scale[row, group])
                    rounded = decode(encode(float(scaled[row, j]), sc, z, grid.bits), sc, z)
                    missed += (rounded / s[j] - w[row, j]) * x_t[j]
            total += weight[t] * missed**2
    return total


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("symmetric", "bits"), [(True, (3, 4)), (False, (2, 3))])
def test_losses_are_the_formula_on_the_grid_that_rounds(symmetric: bool, bits: tuple[int, int], clip: bool) -> None:
    w, x, weight = random(2, 3, 32), random(2, 5, 32, seed=1), random(2, 5, seed=2).abs()
    weight[1, 3:] = 0  # an expert with fewer tokens
    s = candidates(magnitudes(x, weight))
    scheme = UniformGrid(32, symmetric)
    found = losses(w, s, x, weight, torch.tensor(bits), scheme, clip)
    for ratio in (0, 7, 19):
        for e in range(2):
            grid = Grid(bits[e], 32, symmetric, scale_dtype="float32")
            expected = naive_loss(*(t.double().numpy() for t in (w[e], s[ratio, e], x[e], weight[e])), grid, clip)
            assert float(found[ratio, e]) == pytest.approx(expected, rel=1e-3)
    shared = losses(w, s[:, :1], x, weight, torch.tensor(bits), scheme, clip)
    assert torch.allclose(shared[:, 0], found[:, 0])


def test_scales_by_hand() -> None:
    x = torch.tensor([[[3.0, 0.0, 1.0], [4.0, 0.0, 1.0]], [[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]]])
    weight = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    m = magnitudes(x, weight)
    assert torch.allclose(m, torch.tensor([[12.5**0.5, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert torch.equal(magnitudes(x, torch.zeros(2, 2)), torch.ones(2, 3))
    s = candidates(torch.tensor([[4.0, 1.0, 0.25]]))
    assert torch.equal(s[0], torch.ones(1, 3))
    assert torch.allclose(s[RATIOS.index(0.5)], torch.tensor([[2.0, 1.0, 0.5]]))
    chosen = best(torch.stack([torch.ones(2, 3), 2 * torch.ones(2, 3)]), torch.tensor([[1.0, 3.0], [2.0, 1.0]]))
    assert torch.equal(chosen, torch.tensor([[1.0] * 3, [2.0] * 3]))


def test_sampled_slots_stand_for_all() -> None:
    many = SAMPLE * 3
    tokens, affinity = torch.arange(many + 3), torch.rand(many + 3, generator=torch.Generator().manual_seed(0))
    bounds = [0, 3, 3, many + 3]
    chosen, weight = sampled_slots(tokens, affinity, bounds, 1.0)
    assert chosen[0, :3].tolist() == [0, 1, 2]
    assert torch.equal(weight[0, :3], affinity[:3])
    assert not bool(weight[0, 3:].any())
    assert not bool(weight[1].any())
    assert chosen[2].tolist() == list(range(3, many + 3, 3))
    assert torch.allclose(weight[2], 3 * affinity[chosen[2]])
    assert torch.equal(sampled_slots(tokens, affinity, bounds, 0.0)[1].sum(1), torch.tensor([3.0, 0.0, float(many)]))
    assert not bool(sampled_slots(tokens[:0], affinity[:0], [0, 0], 1.0)[1].any())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_stored_gain_and_columns_cancel(offset: float) -> None:
    gain, s = (1 + 0.1 * random(64)).bfloat16() if not offset else (0.1 * random(64)).bfloat16(), 0.5 + random(64, seed=1).abs().double()
    exact = representable(gain, s, offset)
    stored = ((gain.double() + offset) / exact - offset).bfloat16().double() + offset
    assert torch.allclose(stored * exact, gain.double() + offset, rtol=1e-12)
    assert torch.allclose(exact, s, rtol=0.02 if offset == 0 else 0.05)
    assert torch.equal(representable(torch.zeros(3), torch.full((3,), 2.0), 0.0), torch.full((3,), 2.0, dtype=torch.float64))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=windows(), use_cache=False).logits
    return result


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v2", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_scales_found_on_a_layer_keep_the_function(name: str, checkpoints: Checkpoints) -> None:
    """The edits of every layer, put into the model as transformers has it."""
    path = checkpoints.path(ARCHITECTURES[name])
    checkpoint = open_checkpoint(path)
    structure = find_structure(checkpoint.model)
    scales = find_scales(checkpoint, structure)
    stream = Stream(checkpoint, structure, windows())
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    before, parameters, changed = logits(model), dict(model.named_parameters()), set()
    scheme = UniformGrid(-1, True)
    for sites, places in zip(structure.layers, scales, strict=True):
        linears = {f"{sites.name}.{n}": Rounding((3,), scheme) for group in sites.groups for n in group.names}
        layout = sites.moe.layout if sites.moe else None
        experts = {p: Rounding((3,) * layout.experts, scheme) for p in layout.projections} if layout else {}
        with stream.loaded(sites.index):
            found = LayerAWQ(stream, sites, places, checkpoint.weights, linears, experts, 3, 1.0).run()
        stream.step(sites.index, 8)
        assert all(0 <= ratio < 1 for value in found.report.values() for ratio in (value if isinstance(value, list) else [value]))
        with torch.no_grad():
            for full, edits in found.edits.items():
                new = apply_edits(edits, parameters[full])
                changed |= {full} if float((new - parameters[full]).abs().max()) > 1e-3 * float(new.abs().max()) else set()
                parameters[full].copy_(new)
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 2e-5
    assert any(full.endswith("norm.weight") for full in changed)
    if name != "gpt_oss":  # no scale behind v or up makes its random weights better
        assert any("o_proj" in full or "down_proj" in full for full in changed)


def outliers(path: Path, directory: Path) -> Path:
    """The checkpoint with a few large channels behind every norm."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("layernorm.weight"):
                    parameter[::16] *= 30
        model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_large_channels_are_spared(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = outliers(checkpoints.path(ARCHITECTURES[name]), tmp_path / "model")
    text = token_file(tmp_path / "text.jsonl", 400)
    kl = {}
    for method in ("rtn", "awq"):
        recipe = small_recipe(method, weights={"bits": 3}, solver={"clip_search": True, "affinity_power": 1.0})
        moebit.quantize(source, tmp_path / method, recipe=recipe, text={"text": text}, format="dense")
        (row,) = moebit.evaluate(tmp_path / method, against=source, text={"text": text}, window=24)["texts"].values()
        kl[method] = row["kl"]
    assert kl["awq"] < 0.85 * kl["rtn"]
    gain = "model.layers.0.input_layernorm.weight"
    before, rtn, awq = (open_checkpoint(path).weights.parameter(gain) for path in (source, tmp_path / "rtn", tmp_path / "awq"))
    assert torch.equal(before, rtn)
    assert not torch.equal(before, awq)
    report = json.loads((tmp_path / "awq" / "report.json").read_text())
    assert report["layers"][0]["scales"]
    assert json.loads((tmp_path / "awq" / "moebit.json").read_text())["plan"]["transforms"]["scales"]["norms"] == 4


class Stop(Exception):
    pass


@pytest.mark.parametrize("format", ["native", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_resumed_run_gives_the_same_bytes(format: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, text = checkpoints.path(ARCHITECTURES["qwen2_moe"]), token_file(tmp_path / "text.jsonl", 400)
    given: dict[str, Any] = {"recipe": {**small_recipe("awq"), "rotation": {"absorbed": "r1"}}, "text": {"text": text}, "format": format}
    moebit.quantize(source, tmp_path / "whole", **given)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("layers", 1):
            raise Stop

    with pytest.raises(Stop):
        moebit.quantize(source, tmp_path / "resumed", progress=stop, **given)
    moebit.quantize(source, tmp_path / "resumed", resume=True, **given)
    assert file_bytes(tmp_path / "resumed") == file_bytes(tmp_path / "whole")
