"""Routers on a grid: the loss against naive float64 loops, the descent against exhaustive search, score functions from real routers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.methods.router import AlignedRouter, Divergence, align_router, kl_top, rounded, score_function, top_experts

E, K, H, T = 6, 2, 12, 40
RATIOS = [1.0 - 0.0065 * step for step in range(101)]  # the paper's: 101 from 1 to 0.35


def naive_probabilities(z: np.ndarray, score: str) -> np.ndarray:
    if score == "softmax":
        s = [math.exp(v - max(z)) for v in z]
    elif score == "sigmoid":
        s = [1 / (1 + math.exp(-v)) for v in z]
    else:
        s = [math.sqrt(math.log1p(math.exp(v))) for v in z]
    return np.array([v / sum(s) for v in s])


def naive_kl_top(p: np.ndarray, q: np.ndarray, top: list[int]) -> float:
    inside = sum(p[e] * math.log(p[e] / q[e]) for e in top)
    rest, rest_q = sum(p[e] for e in range(len(p)) if e not in top), sum(q[e] for e in range(len(p)) if e not in top)
    return inside + (rest * math.log(rest / rest_q) if len(top) < len(p) else 0.0)


def naive_rounded(row: list[float], ratio: float, bits: int) -> list[float]:
    """Asymmetric, one scale per row, as every asymmetric weight grid has it; scale and products in float32 like the product code."""
    low, high, levels = min(min(row), 0.0), max(max(row), 0.0), 2**bits - 1
    scale = np.float32(np.float32(ratio * (high - low)) / np.float32(levels))
    if scale == 0:
        return [0.0] * len(row)
    zero = min(levels, round(float(np.float32(-ratio * low) / scale)))
    return [float(scale) * (min(max(round(v / float(scale)) + zero, 0), levels) - zero) for v in row]


def naive_loss(w: Tensor, wq: Tensor, x: Tensor, ids: Tensor, score: str, bias: Tensor | None, m: int, weight: float) -> float:
    error = energy = divergence = 0.0
    for t in range(len(x)):
        z = np.array([sum(float(w[e, j]) * float(x[t, j]) for j in range(w.shape[1])) for e in range(len(w))])
        zq = np.array([sum(float(wq[e, j]) * float(x[t, j]) for j in range(w.shape[1])) for e in range(len(w))])
        error, energy = error + float(((zq - z) ** 2).sum()), energy + float((z**2).sum())
        if bias is not None:
            z, zq = z + bias.double().numpy(), zq + bias.double().numpy()
        p = naive_probabilities(z, score)
        chosen = ids[t].tolist()
        others = sorted((e for e in range(len(w)) if e not in chosen), key=lambda e: -p[e])
        divergence += naive_kl_top(p, naive_probabilities(zq, score), chosen + others[: m - len(chosen)])
    return error / energy + weight * divergence / len(x)


def problem(seed: int, score: str = "softmax", bias: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    w, x = torch.randn(E, H, generator=g), torch.randn(T, H, generator=g)
    w[0, 0] = 6.0  # an outlier, so that clipping matters
    b = torch.randn(E, generator=g) if bias else None
    z = x @ w.T if b is None else x @ w.T + b
    return w, x, z.topk(K, 1).indices, b


def aligned(w: Tensor, x: Tensor, ids: Tensor, b: Tensor | None, bits: int, score: str = "softmax", share: float = 0.0) -> AlignedRouter:
    return align_router(w, x, ids, bits, score=score, bias_E=b, counted=Divergence(share), stored=torch.float32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt-softplus"])
@pytest.mark.parametrize(("share", "m"), [(0.0, 2), (0.25, 3), (0.5, 4), (0.75, 5), (1.0, 6)])
def test_the_loss_is_the_papers_with_a_rest_bucket(score: str, share: float, m: int) -> None:
    w, x, ids, b = problem(1, score, bias=score == "softmax")
    result = aligned(w, x, ids, b, 4, score, share)
    assert result.loss == pytest.approx(naive_loss(w, result.weight, x, ids, score, b, m, 1.0), rel=1e-4)
    unclipped = rounded(w, 1.0, 4, torch.float32)
    assert result.loss_before == pytest.approx(naive_loss(w, unclipped, x, ids, score, b, m, 1.0), rel=1e-4)


def test_rounding_is_asymmetric_and_by_row() -> None:
    w = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    w[2], w[3] = 0.0, w[3].abs()
    for bits, ratio in itertools.product((3, 4, 8), (1.0, 0.7, 0.35)):
        expected = torch.tensor([naive_rounded(row, ratio, bits) for row in w.tolist()])
        torch.testing.assert_close(rounded(w, ratio, bits, torch.float32), expected, rtol=1e-5, atol=1e-6)


def test_no_single_channel_can_do_better_and_common_ratios_cannot_either() -> None:
    w, x, ids, b = problem(5)
    result = aligned(w, x, ids, b, 3, share=0.5)
    for ratio in RATIOS[::5]:
        assert result.loss <= naive_loss(w, rounded(w, ratio, 3, torch.float32), x, ids, "softmax", b, 4, 1.0) * (1 + 1e-6)
    candidates = [rounded(w, ratio, 3, torch.float32) for ratio in RATIOS]
    for e, candidate in itertools.product(range(E), candidates[::9]):
        other = result.weight.clone()
        other[e] = candidate[e]
        assert result.loss <= naive_loss(w, other, x, ids, "softmax", b, 4, 1.0) * (1 + 1e-6)


def test_two_channels_find_the_best_of_all_pairs() -> None:
    """All 101 x 101 pairs of ratios, in float64: L of a router with two experts, one of which is chosen."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 8, generator=g), torch.randn(20, 8, generator=g)
    ids = (x @ w.T).topk(1, 1).indices
    result = align_router(w, x, ids, 3, score="softmax", bias_E=None, counted=Divergence(), stored=torch.float32)
    z = (x.double() @ w.double().T).numpy()
    zq = np.stack([(x.double() @ rounded(w, ratio, 3, torch.float32).double().T).numpy() for ratio in RATIOS])  # [R, T, 2]
    best = np.inf
    for a, b in itertools.product(range(len(RATIOS)), repeat=2):
        q = np.stack([zq[a, :, 0], zq[b, :, 1]], 1)
        p, r = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (z, q))
        best = min(best, ((q - z) ** 2).sum() / (z**2).sum() + (p * np.log(p / r)).sum(1).mean())
    assert best * (1 - 1e-6) <= result.loss <= best * 1.1  # descent may end beside the best pair, not far from it


@pytest.mark.parametrize("bits", [4, 8])
def test_fine_steps_find_what_coarse_ones_miss(bits: int) -> None:
    """At 8 bits the best range lies within 5% of the whole: 14 ratios choose 1 for every row, 101 do not."""
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(16, 64, generator=g), torch.randn(400, 64, generator=g)
    ids = (x @ w.T).topk(4, 1).indices

    def found(ratios: int) -> AlignedRouter:
        return align_router(w, x, ids, bits, score="softmax", bias_E=None, counted=Divergence(), stored=torch.float32, ratios=ratios)

    coarse, fine = found(14), found(101)
    assert fine.loss < coarse.loss
    if bits == 8:
        assert set(coarse.ratios) == {1.0}
        assert any(ratio < 1 for ratio in fine.ratios)


def test_weights_are_judged_as_they_are_stored() -> None:
    w, x, ids, b = problem(2)
    result = align_router(w, x, ids, 8, score="softmax", bias_E=b, counted=Divergence(1.0), stored=torch.bfloat16)
    assert result.weight.dtype == torch.bfloat16
    assert result.loss == pytest.approx(naive_loss(w, result.weight.float(), x, ids, "softmax", b, 6, 1.0), rel=1e-4)


def test_the_rest_bucket_makes_it_a_divergence() -> None:
    """The paper's truncated sum is negative for a router that is only sharper."""
    z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    top = top_experts(z, torch.tensor([[0, 1]]), 0.0)
    p, q = z.softmax(1), (2 * z).softmax(1)
    assert float((p * (p / q).log())[top].sum()) < 0
    assert float(kl_top(z, 2 * z, top)) > 0
    assert float(kl_top(z, z + 3.0, top)) == pytest.approx(0.0, abs=1e-12)


def test_the_chosen_experts_come_first_whatever_their_scores() -> None:
    u = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert top_experts(u, torch.tensor([[4, 2]]), 0.0).nonzero()[:, 1].tolist() == [2, 4]
    assert top_experts(u, torch.tensor([[4, 2]]), 1 / 3).nonzero()[:, 1].tolist() == [0, 2, 4]
    assert bool(top_experts(u, torch.tensor([[4, 2]]), 1.0).all())


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt-softplus"])
def test_score_functions_are_told_apart_by_their_affinities(score: str, normalised: bool, k: int) -> None:
    z = 2 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    p = {"softmax": z.softmax(1), "sigmoid": z.sigmoid(), "sqrt-softplus": torch.nn.functional.softplus(z).sqrt()}[score]
    g, ids = p.topk(k, 1)
    g = 2.5 * g / (g.sum(1, keepdim=True) if normalised else 1)
    expected = None if normalised and k == 1 else score
    assert score_function(z, ids, g) == expected
    assert score_function(z, ids, g.bfloat16()) == expected


def test_an_unknown_score_function_is_not_guessed() -> None:
    z = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    g, ids = z.square().topk(2, 1)
    assert score_function(z, ids, g) is None
    assert score_function(z, ids, torch.zeros_like(g)) is None
