"""Significance and errors of experts: by hand, against naive loops, and against what really arrives in the output."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moebit.methods.significance import (
    ExpertEvidence,
    baseline,
    coactivation,
    dynamics,
    expert_shares,
    output_error,
)
from moebit.methods.switching import switchable, usage_distance
from moebit.model.experts import ExpertsLayout, ExpertWeights, dispatch, gating_slopes, grouped_linear


def gated(activation: torch.nn.Module) -> SimpleNamespace:
    """An experts module as far as its gating goes: gate rows first, then up rows."""
    return SimpleNamespace(has_gate=True, _apply_gate=lambda out: activation(out.chunk(2, -1)[0]) * out.chunk(2, -1)[1])


def evidence_of(module: SimpleNamespace, x: Tensor, ids: Tensor, affinity: Tensor, weights: ExpertWeights) -> ExpertEvidence:
    experts, hidden, inner = weights.down.shape
    layout = ExpertsLayout(experts, hidden, inner, gated=True, interleaved=False, transposed=False, bias=False)
    found = ExpertEvidence.zeros(layout, weights, errors=True)
    for piece in dispatch(ids, affinity, experts).pieces(0, experts, 3):
        rows = x[piece.tokens]
        h, slope = gating_slopes(module, grouped_linear(rows, weights.first, None, piece.bounds))
        found.add(rows, h, slope, piece)
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


def test_moments_and_rows_are_the_formulas() -> None:
    """Slopes by finite differences, everything else in loops over tokens and channels."""
    x, ids, affinity, weights = random_layer(0)
    module = gated(torch.nn.SiLU())
    found = evidence_of(module, x, ids, affinity, weights)
    moments = {p: found.moment(p) for p in ("gate_proj", "up_proj", "down_proj")}
    for e in range(3):
        wanted = {p: torch.zeros(n, n, dtype=torch.float64) for p, n in (("gate_proj", 6), ("up_proj", 6), ("down_proj", 4))}
        rows = {p: torch.zeros(4, dtype=torch.float64) for p in ("gate_proj", "up_proj")}
        significance = torch.zeros(4, dtype=torch.float64)
        first, down = weights.first[e].double(), weights.down[e].double()
        for t, k in itertools.product(range(len(x)), range(2)):
            if int(ids[t, k]) != e:
                continue
            g, xt = float(affinity[t, k]), x[t].double()
            out = first @ xt
            h = module._apply_gate(out)
            for c in range(4):
                length = float(down[:, c].norm())
                significance[c] += g * abs(float(h[c])) * length
                for p, at in (("gate_proj", c), ("up_proj", 4 + c)):
                    step = torch.zeros(8, dtype=torch.float64)
                    step[at] = 1e-6
                    slope = float((module._apply_gate(out + step) - module._apply_gate(out - step))[c]) / 2e-6
                    w = (g * length * slope) ** 2
                    rows[p][c] += w
                    wanted[p] += w * torch.outer(xt, xt)
            wanted["down_proj"] += g**2 * torch.outer(h, h)
        assert torch.allclose(found.significance[e].double(), significance, rtol=1e-4)
        for p, moment in wanted.items():
            assert torch.allclose(moments[p][e].double(), moment, rtol=1e-3, atol=1e-5), p
        for p, sums in rows.items():
            assert torch.allclose(found.rows[p][e].double(), sums, rtol=1e-3, atol=1e-6), p


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_the_error_is_what_arrives_in_the_output(projection: str) -> None:
    """One token and orthogonal columns of down, where nothing is approximated but the first order: |g Wd (h' - h)|^2 of a small change."""
    draw = torch.Generator().manual_seed(3)
    first = torch.randn(1, 8, 6, generator=draw)
    down = torch.linalg.qr(torch.randn(6, 4, generator=draw)).Q.unsqueeze(0) * torch.tensor([1.0, 2.0, 0.5, 3.0])
    x, ids, affinity = torch.randn(1, 6, generator=draw), torch.tensor([[0]]), torch.tensor([[0.7]])
    module = gated(torch.nn.SiLU())
    found = evidence_of(module, x, ids, affinity, ExpertWeights(first, down))
    rows = {"gate_proj": slice(0, 4), "up_proj": slice(4, 8)}.get(projection)
    shape = (1, 6, 4) if rows is None else (1, 4, 6)
    change = 1e-3 * torch.randn(shape, generator=draw)
    said = float(output_error(change, found.moment(projection), found.rows.get(projection)))

    def output(first: Tensor, down: Tensor) -> Tensor:
        return 0.7 * (down @ module._apply_gate(first @ x[0].double()))

    changed_first, changed_down = first[0].double(), down[0].double()
    if rows is None:
        changed_down = changed_down + change[0]
    else:
        changed_first = changed_first.clone()
        changed_first[rows] += change[0]
    true = float((output(changed_first, changed_down) - output(first[0].double(), down[0].double())).square().sum())
    assert math.isclose(said, true, rel_tol=0.01)


def test_an_expert_without_tokens_costs_nothing() -> None:
    x, ids, affinity, weights = random_layer(1)
    found = evidence_of(gated(torch.nn.SiLU()), x, ids, affinity, weights)
    assert not found.significance[2].any()
    for p in ("gate_proj", "up_proj", "down_proj"):
        change = torch.ones(3, *((4, 6) if p != "down_proj" else (6, 4)))
        error = output_error(change, found.moment(p), found.rows.get(p))
        assert float(error[2]) == 0
        assert float(error[0]) > 0
