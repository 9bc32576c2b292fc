"""Edited parameters against the same edits written out on whole tensors; readers of rows, experts and pieces see the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebit.formats.opening import open_checkpoint
from moebit.model.experts import layout_of
from moebit.model.proof.sites import scale_down
from moebit.model.structure import find_structure
from moebit.storage.edits import Constant, Edit, EditedWeights, Rotate, RotateHeads, Scale, apply_edits, untied_config
from moebit.storage.hub import HubWeights
from moebit.tensor.rotation import Rotation, randomised_hadamard
from tests.support.models import ARCHITECTURES, Checkpoints


def hub(path: Path) -> HubWeights:
    weights = open_checkpoint(path).weights
    assert isinstance(weights, HubWeights)
    return weights


def rotation(size: int) -> Rotation:
    return randomised_hadamard(size, torch.Generator().manual_seed(1))


def factors(*shape: int) -> Tensor:
    return 0.5 + torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def pieces(weights: HubWeights, name: str) -> Tensor:
    """The parameter as a writer puts it together from pieces."""
    spec = weights.spec(name)
    data = torch.zeros(spec.nbytes, dtype=torch.uint8)
    for begin, piece in weights.pieces(name):
        data[begin : begin + piece.nbytes] = piece.contiguous().flatten().view(torch.uint8)
    return data.view(spec.dtype).view(spec.shape)


# --- edits of whole tensors


def test_edits_are_what_they_say() -> None:
    w = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    experts = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gain = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s, per_expert, r = factors(8), factors(3, 4), rotation(8).matrix()
    rows = randomised_hadamard(6, torch.Generator().manual_seed(1))
    cases: list[tuple[Edit, Tensor, Tensor]] = [
        (Scale(s), w, w @ torch.diag(s)),
        (Scale(s[:6], 0), w, torch.diag(s[:6]) @ w),
        (Scale(per_expert, -2), experts, torch.stack([torch.diag(per_expert[e]) @ experts[e] for e in range(3)])),
        (Scale(s, offset=1.0), gain, (1 + gain) * s - 1),
        (Constant(0.25), gain, torch.full_like(gain, 0.25)),
        (Rotate(rotation(8)), w, w @ r),
        (Rotate(rows, 0), w, rows.matrix().T @ w),
        (Rotate(rotation(4), -2), experts, torch.stack([rotation(4).matrix().T @ e for e in experts])),
    ]
    for edit, before, after in cases:
        assert torch.allclose(edit.apply(before), after, atol=1e-12), edit
        assert torch.allclose(apply_edits([edit], before), after, atol=1e-12), edit


def test_heads_are_rotated_one_by_one() -> None:
    w = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    channels, signs = torch.tensor([[1, 2, 3, 4], [6, 7, 8, 9]]), torch.tensor([[1.0, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    result, r = RotateHeads(rotation(4), channels, signs, 0).apply(w), rotation(4).matrix()
    assert torch.equal(result[[0, 5]], w[[0, 5]])
    for head in range(2):
        assert torch.allclose(result[channels[head]], (torch.diag(signs[head]) @ r).T @ w[channels[head]], atol=1e-12)


def test_rounded_once() -> None:
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    s = factors(8)
    assert torch.equal(apply_edits([Scale(s), Scale(1 / s)], w), w)
    assert torch.equal(apply_edits([Scale(s)], w), (w.float() * s.float()).bfloat16())
    wide = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_edits([Scale(s)], wide), (wide.double() * s).float())


def test_rows_count_from_where_they_begin() -> None:
    experts = torch.randn(5, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edits = [Scale(factors(5, 4), -2), Rotate(rotation(8))]
    assert torch.allclose(apply_edits(edits, experts[2:4], 2), apply_edits(edits, experts)[2:4], atol=1e-12)


def test_untied_everywhere() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "hidden_size": 4}}
    assert untied_config(config) == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False, "hidden_size": 4}}
    assert config["tie_word_embeddings"] is True


# --- a checkpoint behind edits


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_way_of_reading_sees_the_same(name: str, checkpoints: Checkpoints) -> None:
    plain = hub(checkpoints.path(ARCHITECTURES[name]))
    experts = next(n for n in sorted(plain.available()) if n.endswith("down_proj") and len(plain.spec(n).shape) == 3)
    linear = next(n for n in sorted(plain.available()) if n.endswith("o_proj.weight"))
    table = next(n for n in plain.available() if "embed_tokens" in n)
    edits: dict[str, tuple[Edit, ...]] = {
        experts: (Scale(factors(*plain.spec(experts).shape[:2]), -2), Rotate(rotation(plain.spec(experts).shape[2]))),
        linear: (Rotate(rotation(plain.spec(linear).shape[0]), 0),),
        table: (Rotate(rotation(plain.spec(table).shape[1])),),
    }
    edited = EditedWeights(plain, edits)
    for changed in edits:
        whole, expected = edited.parameter(changed), apply_edits(edits[changed], plain.parameter(changed))
        assert edited.edited(changed)
        assert whole.dtype == plain.spec(changed).dtype
        assert torch.equal(whole, expected)
        assert not torch.equal(whole, plain.parameter(changed))
        assert torch.equal(pieces(edited, changed), whole)
        assert torch.allclose(edited.rows(changed, 1, 3).double(), whole[1:3].double(), atol=1e-6)
    assert torch.allclose(edited.expert_rows(experts, 2, 5).double(), edited.parameter(experts)[2:5].double(), atol=1e-6)
    untouched = next(n for n in sorted(plain.available()) if n not in edits)
    assert torch.equal(edited.parameter(untouched), plain.parameter(untouched))


def test_a_tied_head_of_its_own(checkpoints: Checkpoints) -> None:
    plain = hub(checkpoints.path(ARCHITECTURES["qwen2_moe"]))
    assert "lm_head.weight" not in plain.available()
    edited = EditedWeights(plain, {"lm_head.weight": (Constant(2.0),)}, ["lm_head.weight"])
    assert "lm_head.weight" in edited.available()
    assert edited.stored_names("lm_head.weight") == ["lm_head.weight"]
    assert bool((edited.parameter("lm_head.weight") == 2).all())
    assert torch.equal(edited.parameter("model.embed_tokens.weight"), plain.parameter("model.embed_tokens.weight"))
    assert "lm_head.weight" not in plain.available()


def test_names_that_are_not_there(checkpoints: Checkpoints) -> None:
    with pytest.raises(KeyError):
        EditedWeights(hub(checkpoints.path(ARCHITECTURES["mixtral"])), {"model.layers.9.weight": (Constant(1.0),)})


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "qwen2_moe"])
def test_down_against_up(name: str, checkpoints: Checkpoints) -> None:
    """An expert computes the same after its down was scaled against its up, by a loop over the experts."""
    checkpoint = open_checkpoint(checkpoints.path(ARCHITECTURES[name]))
    weights, sites = checkpoint.weights, find_structure(checkpoint.model).moe_layers[0]
    assert isinstance(weights, HubWeights)
    assert sites.moe is not None
    experts = f"{sites.name}.{sites.moe.experts}"
    module = checkpoint.model.get_submodule(experts)
    layout = layout_of(module, experts)
    s = factors(layout.experts, layout.intermediate)
    edits = scale_down(experts, layout, s)
    x = torch.randn(layout.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first, down = (weights.parameter(f"{experts}.{leaf}").double() for leaf in (layout.first, "down_proj"))
    first_after, down_after = (apply_edits(edits[f"{experts}.{leaf}"], t) for leaf, t in ((layout.first, first), ("down_proj", down)))
    size = layout.intermediate
    for e in range(layout.experts):
        before = down[e] @ (torch.nn.functional.silu(first[e, :size] @ x) * (first[e, size:] @ x))
        after = down_after[e] @ (torch.nn.functional.silu(first_after[e, :size] @ x) * (first_after[e, size:] @ x))
        assert torch.allclose(before, after, rtol=1e-9)
        assert torch.allclose(down_after[e], down[e] * s[e], rtol=1e-9)
