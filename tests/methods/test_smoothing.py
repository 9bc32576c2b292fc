"""Smoothing scales and outlier factors against naive float64 loops, and cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moebit.methods.smoothing import aggregated, centred, expert_extremes, otsu, outlier_factors, smooth_scale


def test_scales_by_hand() -> None:
    s = smooth_scale(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([4.0, 1.0, 0.0]), 0.5)
    assert s.tolist() == pytest.approx([2.0, 1.0, 1.0])
    assert smooth_scale(torch.tensor([8.0]), torch.tensor([5.0]), 1.0).tolist() == pytest.approx([8.0])
    assert smooth_scale(torch.tensor([8.0]), torch.tensor([5.0]), 0.0).tolist() == pytest.approx([0.2])
    assert float(centred(torch.tensor([2.0, 8.0])).prod()) == pytest.approx(1.0)


@pytest.mark.parametrize("how", ["max", "frequency"])
def test_aggregation_against_loops(how: str) -> None:
    g = torch.Generator().manual_seed(0)
    experts, router, shared = (
        torch.rand(4, 7, generator=g).double(),
        torch.rand(7, generator=g).double(),
        torch.rand(7, generator=g).double(),
    )
    say = torch.tensor([3, 0, 5, 2])
    for j in range(7):
        heard = [(float(experts[i, j]), int(say[i])) for i in range(4) if say[i] > 0]
        joined = max(s for s, _ in heard) if how == "max" else sum(s * n for s, n in heard) / sum(n for _, n in heard)
        expected = max(joined, float(router[j]), float(shared[j]))
        assert float(aggregated(experts, say, [router, shared], how)[j]) == pytest.approx(expected)
    assert torch.equal(aggregated(experts, torch.zeros(4), [router, shared], how), torch.maximum(router, shared))


def test_extremes_per_expert_against_loops() -> None:
    g = torch.Generator().manual_seed(1)
    x, ids = torch.randn(30, 5, generator=g), torch.randint(-1, 5, (30, 2), generator=g)  # 4 experts: -1 and 4 are unused slots
    expected = np.zeros((4, 5))
    for t in range(30):
        for e in set(ids[t].tolist()) & set(range(4)):
            expected[e] = np.maximum(expected[e], np.abs(x[t].numpy()))
    np.testing.assert_array_equal(expert_extremes(x, ids, 4).numpy(), expected.astype(np.float32))


def naive_factors(row: list[float]) -> list[float]:
    q1, q3 = np.quantile(row, 0.35), np.quantile(row, 0.65)
    candidates = [c for c in range(len(row)) if row[c] > q3 + 1.5 * (q3 - q1)]
    if len(candidates) > 1:
        values = sorted(row[c] for c in candidates)
        cuts = []
        for n in range(1, len(values)):
            below, above = values[:n], values[n:]
            cuts.append(n * (len(values) - n) * (sum(above) / len(above) - sum(below) / len(below)) ** 2)
        cut = values[int(np.argmax(cuts))] if values[0] < values[-1] else -math.inf
        candidates = [c for c in candidates if row[c] > cut]
    if not candidates:
        return [1.0] * len(row)
    rest = max(row[c] for c in range(len(row)) if c not in candidates)
    return [(row[c] / rest) ** 0.7 if c in candidates and rest > 1e-5 else 1.0 for c in range(len(row))]


def test_outlier_factors_against_loops() -> None:
    g = torch.Generator().manual_seed(2)
    high, low = torch.rand(6, 40, generator=g).double(), -torch.rand(6, 40, generator=g).double()
    high[0, 3], high[1, 5:8], low[2, 4], low[3, 0:2] = 30.0, torch.tensor([4.0, 50.0, 60.0]), -9.0, torch.tensor([-9.0, -80.0])
    low[0, 3] = -500.0  # both sides of one channel: the larger factor counts
    high[4], low[4] = 0.0, 0.0
    expected = [np.maximum(naive_factors(h.tolist()), naive_factors((-v).tolist())) for h, v in zip(high, low, strict=True)]
    np.testing.assert_allclose(outlier_factors(high, low).numpy(), np.stack(expected), rtol=1e-12)
    assert float(outlier_factors(high, low).min()) >= 1


def test_outliers_by_hand() -> None:
    row = torch.tensor([[1.0, 0.9, 1.1, 1.0, 0.95, 1.05, 8.0, 64.0, 70.0]])
    factors = outlier_factors(row, torch.zeros_like(row))[0]
    assert factors[:7].tolist() == [1.0] * 7  # 8 stands out, but not beside 64 and 70
    assert factors[7:].tolist() == pytest.approx([8.0**0.7, 8.75**0.7])


def test_the_cut_of_two_classes() -> None:
    assert otsu(torch.tensor([1.0, 2.0, 10.0, 11.0])) == 2.0
    assert otsu(torch.tensor([5.0, 5.0])) < 5.0
    assert otsu(torch.tensor([1.0, 100.0])) == 1.0
