"""Where channels can be scaled, beside what a reader of transformers' modelling code finds; and that what is wrong does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moebit.formats.opening import open_checkpoint
from moebit.model.proof.flow import find_flow
from moebit.model.proof.rehearsal import Rehearsal, difference
from moebit.model.proof.sites import TOLERANCE, find_scales
from moebit.model.structure import find_structure
from moebit.storage.edits import Scale
from tests.support.architectures import TINY
from tests.support.in_full import build
from tests.support.models import ARCHITECTURES, Checkpoints

# architecture -> (layer, norms with (readers, experts read it, offset, bias), pairs, down against up)
EXPECTED = {
    "qwen3_next": (
        1,
        {"input_layernorm": (3, False, 1.0, False), "post_attention_layernorm": (4, True, 1.0, False)},
        {("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")},
        True,
    ),
    "phimoe": (
        0,
        {"input_layernorm": (3, False, 0.0, True), "post_attention_layernorm": (1, True, 0.0, True)},
        {("self_attn.v_proj", "self_attn.o_proj")},
        True,
    ),
    "gpt_oss": (
        0,
        {"input_layernorm": (3, False, 0.0, False), "post_attention_layernorm": (1, True, 0.0, False)},
        {("self_attn.v_proj", "self_attn.o_proj")},
        False,
    ),
    "deepseek_v3": (
        1,
        {
            "input_layernorm": (2, False, 0.0, False),
            "self_attn.q_a_layernorm": (1, False, 0.0, False),
            "self_attn.kv_a_layernorm": (1, False, 0.0, False),
            "post_attention_layernorm": (3, True, 0.0, False),
        },
        {("mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"), ("self_attn.kv_b_proj", "self_attn.o_proj")},
        True,
    ),
    "minimax": (1, {}, {("self_attn.v_proj", "self_attn.o_proj")}, True),
    "olmoe": (
        0,
        {"input_layernorm": (3, False, 0.0, False), "post_attention_layernorm": (1, True, 0.0, False)},
        set(),
        True,
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_places_for_scales(name: str, checkpoints: Checkpoints) -> None:
    index, norms, pairs, experts = EXPECTED[name]
    checkpoint = open_checkpoint(checkpoints.path(ARCHITECTURES[name]))
    structure = find_structure(checkpoint.model)
    scales, prefix = find_scales(checkpoint, structure)[index], structure.layers[index].name + "."
    found = {s.norm.removeprefix(prefix): (len(s.readers), s.experts is not None, s.offset, s.bias) for s in scales.norms}
    assert found == norms
    assert {(p.first.removeprefix(prefix), p.second.removeprefix(prefix)) for p in scales.pairs} == pairs
    assert scales.experts is experts


INDEXED = ("deepseek_v32", "glm_moe_dsa")


@pytest.mark.parametrize("name", [INDEXED[0], pytest.param(INDEXED[1], marks=pytest.mark.slow)])
def test_indexers_read_norms_without_gradients(name: str, tmp_path: Path) -> None:
    """What selects tokens runs under no_grad; it reads the norm in front of attention and the latent queries like any other linear."""
    checkpoint = open_checkpoint(build(TINY[name], tmp_path / "source"))
    scales = find_scales(checkpoint, find_structure(checkpoint.model))[0]
    readers = {site.norm.rpartition(".")[2]: {r.rpartition("self_attn.")[2] for r in site.readers} for site in scales.norms}
    assert {"q_a_proj", "kv_a_proj_with_mqa", "indexer.wk", "indexer.weights_proj"} <= readers["input_layernorm"]
    assert {"q_b_proj", "indexer.wq_b"} <= readers["q_a_layernorm"]
    assert not any("k_norm" in site.norm for site in scales.norms)


def test_values_behind_a_norm_are_not_scaled(tmp_path: Path) -> None:
    """Gemma 4 norms the values of every head, and heads of two sizes alternate: what can be scaled elsewhere is."""
    checkpoint = open_checkpoint(build(TINY["gemma4_text"], tmp_path / "source"))
    layers = find_scales(checkpoint, find_structure(checkpoint.model))
    for layer in layers:
        assert layer.norms
        assert not any(pair.attention for pair in layer.pairs)
        assert any("mlp.down_proj" in pair.second for pair in layer.pairs)


def test_values_are_shared_by_the_heads_of_a_group(checkpoints: Checkpoints) -> None:
    """Mixtral: 4 heads of 16, 2 kv heads: input channels 0-15 and 16-31 of o both come from rows 0-15 of v."""
    checkpoint = open_checkpoint(checkpoints.path(ARCHITECTURES["mixtral"]))
    (pair,) = find_scales(checkpoint, find_structure(checkpoint.model))[0].pairs
    rows = list(range(16))
    assert pair.channels.tolist() == [*rows, *rows, *(16 + r for r in rows), *(16 + r for r in rows)]


def test_a_reader_that_is_left_out_shows(checkpoints: Checkpoints) -> None:
    checkpoint = open_checkpoint(checkpoints.path(ARCHITECTURES["qwen2_moe"]))
    rehearsal = Rehearsal(checkpoint, find_structure(checkpoint.model))
    stream = rehearsal.passage()
    site = next(site for site in find_flow(rehearsal, stream, 0).norms if site.experts is None)
    s = 0.5 + torch.rand(site.size, dtype=torch.float64)
    edits = {f"{site.norm}.weight": (Scale(1 / s),), **{f"{reader}.weight": (Scale(s),) for reader in site.readers}}
    plain = rehearsal.output(stream, 0)
    assert difference(plain, rehearsal.output(stream, 0, edits)) <= TOLERANCE
    for left_out in edits:
        some = {name: edit for name, edit in edits.items() if name != left_out}
        assert difference(plain, rehearsal.output(stream, 0, some)) > 1e-6


def test_difference_is_infinite_for_no_numbers() -> None:
    assert difference(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
