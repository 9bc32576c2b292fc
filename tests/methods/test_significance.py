"""Significance of experts: by hand and against naive loops."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch import Tensor

from moebit.methods.significance import (
    ExpertEvidence,
    baseline,
    coactivation,
    dynamics,
    expert_shares,
)
from moebit.methods.switching import switchable, usage_distance
from moebit.model.experts import ExpertsLayout, ExpertWeights, dispatch, intermediate


def gated(activation: torch.nn.Module) -> SimpleNamespace:
    """An experts module as far as its gating goes: gate rows first, then up rows."""
    return SimpleNamespace(has_gate=True, _apply_gate=lambda out: activation(out.chunk(2, -1)[0]) * out.chunk(2, -1)[1])


def evidence_of(module: SimpleNamespace, x: Tensor, ids: Tensor, affinity: Tensor, weights: ExpertWeights) -> ExpertEvidence:
    experts, hidden, inner = weights.down.shape
    layout = ExpertsLayout(experts, hidden, inner, gated=True, interleaved=False, transposed=False, bias=False)
    found = ExpertEvidence.zeros(layout, weights)
    for piece in dispatch(ids, affinity, experts).pieces(0, experts, 3):
        found.add(intermediate(module, x[piece.tokens], weights, piece.bounds), piece)
    return found


def test_a_layer_of_two_experts_by_hand() -> None:
    """Expert 0 sees (1, 2) with weight 1/2: gate 1 2, up 2 2, h = 2 4; down's columns are 5 and 1 long: 5 and 2.

    Expert 1 sees it, too: h = 1 4 and columns 1 and 2 long: 1/2 and 4; and (2, 0) with weight 1: h = 4 0, another 4 and 0.
    """
    first = torch.tensor([[[1.0, 0], [0, 1], [2, 0], [0, 1]], [[1, 0], [0, 1], [1, 0], [0, 1]]])
    down = torch.tensor([[[3.0, 0], [4, 1]], [[1, 0], [0, 2]]])
    x, ids = torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([[0, 1], [1, 1]])
    affinity = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    found = evidence_of(gated(torch.nn.ReLU()), x, ids, affinity, ExpertWeights(first, down))
    assert torch.equal(found.significance, torch.tensor([[5.0, 2.0], [4.5, 4.0]]))
    assert torch.allclose(expert_shares(found.significance), torch.tensor([7 / 15.5, 8.5 / 15.5], dtype=torch.float64))


def test_baseline_and_dynamics_by_hand() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
    assert torch.allclose(baseline(shares), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64))
    assert torch.allclose(baseline(shares, "max"), torch.tensor([0.5, 0.3, 0.6], dtype=torch.float64))
    assert torch.allclose(dynamics(shares), torch.tensor([0.04, 0.0, 0.04], dtype=torch.float64))
    assert torch.equal(dynamics(shares[:1]), torch.zeros(3, dtype=torch.float64))


def test_coactivation_by_hand() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    both = coactivation(ids, 4)
    assert both.tolist() == [[4, 3, 1, 0], [3, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_switchable_channels_by_hand() -> None:
    """Two sets; shares of the layer's sum (10 each): channel 1 of expert 0 moves most, then channel 0 of expert 1."""
    sets = torch.tensor([[[1.0, 4.0], [4.0, 1.0]], [[1.0, 1.0], [6.0, 2.0]]])
    assert [t.tolist() for t in switchable(sets, 0.5)] == [[0, 1], [1, 0]]
    assert [t.tolist() for t in switchable(sets, 0.01)] == [[0, 1], [1, 0]]  # at least one of every expert
    assert [t.tolist() for t in switchable(sets, 0.25, "layer")] == [[0], [1]]


def test_distance_of_usage() -> None:
    a, b = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    assert torch.allclose(usage_distance(a, b), torch.tensor([0.5, 0.0], dtype=torch.float64))


def random_layer(seed: int, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    draw = torch.Generator().manual_seed(seed)
    first, down = torch.randn(3, 8, 6, generator=draw), torch.randn(3, 6, 4, generator=draw)
    ids = torch.stack([torch.randperm(2, generator=draw) for _ in range(tokens)])  # expert 2 gets nothing
    return torch.randn(tokens, 6, generator=draw), ids, torch.rand(tokens, 2, generator=draw), ExpertWeights(first, down)


def test_significance_is_the_formula() -> None:
    """The paper's stage 2, in loops over tokens and channels."""
    x, ids, affinity, weights = random_layer(0)
    module = gated(torch.nn.SiLU())
    found = evidence_of(module, x, ids, affinity, weights)
    for e in range(3):
        significance = torch.zeros(4, dtype=torch.float64)
        first, down = weights.first[e].double(), weights.down[e].double()
        for t, k in itertools.product(range(len(x)), range(2)):
            if int(ids[t, k]) == e:
                h = module._apply_gate(first @ x[t].double())
                for c in range(4):
                    significance[c] += float(affinity[t, k]) * abs(float(h[c])) * float(down[:, c].norm())
        assert torch.allclose(found.significance[e].double(), significance, rtol=1e-4)
    assert not found.significance[2].any()  # an expert without tokens
