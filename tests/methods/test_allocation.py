"""Fuzzy clusters against plain loops, choices under a size against every choice there is and against an exact solver."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebit.methods.allocation import frequency_errors, fuzzy_memberships, fuzzy_widths, knapsack_choice, low_first


def loops_fuzzy(x: list[float], clusters: int, fuzziness: float = 2.0) -> tuple[list[list[float]], list[float]]:
    """Fuzzy c-means as the textbook has it (Bezdek, 1981), one value and one cluster at a time."""
    ordered = sorted(x)
    centres = []
    for k in range(clusters):
        place = (k + 0.5) / clusters * (len(x) - 1)
        low = math.floor(place)
        high = min(low + 1, len(x) - 1)
        centres.append(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    def memberships() -> list[list[float]]:
        table = []
        for value in x:
            exact = [c for c in centres if c == value]
            if exact:
                table.append([1 / len(exact) if c == value else 0.0 for c in centres])
                continue
            row = []
            for c in centres:
                row.append(1 / sum((abs(value - c) / abs(value - other)) ** (2 / (fuzziness - 1)) for other in centres))
            table.append(row)
        return table

    for _ in range(500):
        u = memberships()
        moved = []
        for k in range(clusters):
            total = sum(row[k] ** fuzziness for row in u)
            moved.append(sum(row[k] ** fuzziness * value for row, value in zip(u, x, strict=True)) / total if total else centres[k])
        settled = max(abs(a - b) for a, b in zip(moved, centres, strict=True)) < 1e-12
        centres = moved
        if settled:
            break
    centres = sorted(centres)
    return memberships(), centres


@pytest.mark.parametrize(("count", "clusters", "seed"), [(8, 2, 0), (16, 3, 1), (32, 5, 2), (24, 4, 3), (7, 5, 4)])
def test_fuzzy_c_means_is_the_textbooks(count: int, clusters: int, seed: int) -> None:
    x = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).square()
    u, centres = fuzzy_memberships(x, clusters)
    for row in range(2):
        wanted_u, wanted_centres = loops_fuzzy(x[row].tolist(), clusters)
        assert np.allclose(centres[row].numpy(), wanted_centres, atol=1e-6)
        assert np.allclose(u[row].numpy(), wanted_u, atol=1e-4)


def test_fuzzy_c_means_of_clear_clusters() -> None:
    x = torch.tensor([[0.1, 0.11, 0.09, 0.5, 0.51, 0.9]], dtype=torch.float64)
    u, centres = fuzzy_memberships(x, 3)
    assert u[0].argmax(1).tolist() == [0, 0, 0, 1, 1, 2]
    assert torch.allclose(u.sum(2), torch.ones(1, 6, dtype=torch.float64))
    assert bool((centres.diff(dim=1) > 0).all())


def test_alike_experts_share_all_clusters() -> None:
    u, _ = fuzzy_memberships(torch.full((1, 6), 0.3), 4)
    assert torch.allclose(u, torch.full((1, 6, 4), 0.25, dtype=torch.float64))
    assert low_first(u[0]).tolist() == [0] * 6


def test_low_precision_first() -> None:
    u = torch.tensor([[0.46, 0.54, 0.0], [0.44, 0.56, 0.0], [0.0, 0.52, 0.48], [0.05, 0.05, 0.9], [0.5, 0.0, 0.5]])
    assert low_first(u).tolist() == [0, 1, 1, 2, 0]


def sizes_of(weights: list[int], widths: list[int]) -> torch.Tensor:
    return torch.tensor([[n * b for b in widths] for n in weights], dtype=torch.int64)


def exact(errors: torch.Tensor, sizes: torch.Tensor, budget: int) -> float:
    """The least error of all choices that fit."""
    best = math.inf
    for choice in itertools.product(range(errors.shape[1]), repeat=len(errors)):
        if sum(int(sizes[i, k]) for i, k in enumerate(choice)) <= budget:
            best = min(best, sum(float(errors[i, k]) for i, k in enumerate(choice)))
    return best


def solve_milp(errors: torch.Tensor, sizes: torch.Tensor, budget: int) -> float:
    """The same by branch and bound (HiGHS)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    items, widths = errors.shape
    one_each = np.kron(np.eye(items), np.ones((1, widths)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.numpy().reshape(1, -1), -np.inf, budget)]
    result = milp(errors.numpy().flatten(), constraints=constraints, integrality=np.ones(items * widths), bounds=Bounds(0, 1))
    assert result.status == 0
    return float(result.fun)


def check(errors: torch.Tensor, sizes: torch.Tensor, budget: int, choice: torch.Tensor, optimum: float) -> None:
    """It fits, nothing more fits, and it is at most one item's step from the optimum."""
    used = int(sizes.gather(1, choice.unsqueeze(1)).sum())
    found = float(errors.gather(1, choice.unsqueeze(1)).sum())
    assert used <= budget
    for item, k in enumerate(choice.tolist()):
        assert all(used + int(sizes[item, j] - sizes[item, k]) > budget for j in range(k + 1, sizes.shape[1]))
    step = float((errors[:, :-1] - errors[:, 1:]).abs().max())
    assert optimum - 1e-9 <= found <= optimum + step


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.floats(0.0, 1.0),
)
@settings(max_examples=40, deadline=None)
def test_knapsack_against_every_choice(seed: int, items: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    widths = [2, 3, 4, 8]
    errors = torch.from_numpy(draw.lognormal(0, 2, (items, 1)) * np.array([4.0**-b for b in widths]) * draw.uniform(0.7, 1.0, (items, 4)))
    sizes = sizes_of(draw.choice([64, 128, 192], items).tolist(), widths)
    lowest, highest = int(sizes[:, 0].sum()), int(sizes[:, -1].sum())
    budget = lowest + int(share * (highest - lowest))
    check(errors, sizes, budget, knapsack_choice(errors, sizes, budget), exact(errors, sizes, budget))


@pytest.mark.parametrize("seed", range(4))
def test_knapsack_against_an_exact_solver(seed: int) -> None:
    draw = np.random.default_rng(seed)
    widths = [2, 3, 4, 5, 6, 8]
    errors = torch.from_numpy(draw.lognormal(0, 2, (60, 1)) * np.array([4.0**-b for b in widths]) * draw.uniform(0.8, 1.0, (60, 6)))
    sizes = sizes_of(draw.choice([128, 256], 60).tolist(), widths)
    budget = int(3.3 * sizes[:, 0].sum() / 2)
    optimum = solve_milp(errors, sizes, budget)
    choice = knapsack_choice(errors, sizes, budget)
    check(errors, sizes, budget, choice, optimum)
    assert float(errors.gather(1, choice.unsqueeze(1)).sum()) <= 1.03 * optimum


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", [64, 64 * 3_000_017])
def test_knapsack_of_few_large_and_many_small_items(seed: int, unit: int) -> None:
    """Layers as items: the bisection alone takes a layer's bits away to raise linears by more than they can use."""
    draw = np.random.default_rng(seed)
    widths = [2, 3, 4, 6, 8]
    scale = np.concatenate([draw.uniform(0.9, 1.1, 4), draw.uniform(0.05, 0.3, 16)])
    errors = torch.from_numpy(scale[:, None] * np.array([4.0**-b for b in widths]))
    sizes = sizes_of([unit * 96] * 4 + [unit] * 16, widths)
    budget = int(sizes[:, 1].sum())
    optimum = solve_milp(errors, sizes // unit, budget // unit)
    choice = knapsack_choice(errors, sizes, budget)
    found = float(errors.gather(1, choice.unsqueeze(1)).sum())
    assert int(sizes.gather(1, choice.unsqueeze(1)).sum()) <= budget
    assert found <= float(errors[:, 1].sum())  # never worse than one width for all
    assert found == pytest.approx(optimum, rel=1e-6 if unit == 64 else 0.02)


def test_knapsack_gives_the_rest_to_whom_it_harms_least() -> None:
    """Experts without tokens have no error: they get bits only when nobody else can use them."""
    errors = torch.tensor([[9.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    sizes = sizes_of([10, 10], [2, 4, 8])
    assert knapsack_choice(errors, sizes, 100).tolist() == [2, 0]
    assert knapsack_choice(errors, sizes, 120).tolist() == [2, 1]
    assert knapsack_choice(errors, sizes, 160).tolist() == [2, 2]
    assert knapsack_choice(errors, sizes, 40).tolist() == [0, 0]
    with pytest.raises(ValueError, match="40 bytes"):
        knapsack_choice(errors, sizes, 39)


def test_alike_items_fill_the_size() -> None:
    """Where all slopes tie, a bisection alone would leave everything at one width."""
    errors = torch.tensor([[4.0, 1.0]]).expand(10, 2)
    sizes = sizes_of([8] * 10, [2, 4])
    for budget in (160, 200, 239, 320):
        raised = int(knapsack_choice(errors, sizes, budget).sum())
        assert raised == min(10, (budget - 160) // 16)


@pytest.mark.parametrize("target", [2.2, 2.7, 3.0, 3.6, 5.0])
def test_fuzzy_choice_meets_the_size_and_keeps_the_order(target: float) -> None:
    j = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).square()
    widths = [2, 3, 4, 6, 8]
    sizes, weights = sizes_of([80] * 64, widths), torch.full((64,), 8 * 80)
    budget = int(target * 64 * 80)
    choice = fuzzy_widths(list(j), len(widths), sizes, weights, budget)
    used = int(sizes.gather(1, choice.unsqueeze(1)).sum())
    assert budget - 2 * 80 < used <= budget  # the largest step of the ladder is two bits
    for layer in range(4):  # a more significant expert never has fewer bits than a less significant one
        bits = choice.view(4, 16)[layer]
        assert bool((bits[j[layer].argsort()].diff() >= 0).all())


def test_frequency_prefers_the_busy() -> None:
    errors = frequency_errors(torch.tensor([0.7, 0.2, 0.1, 0.0]), [2, 4, 8])
    choice = knapsack_choice(errors, sizes_of([10] * 4, [2, 4, 8]), 180)
    assert choice.tolist() == [2, 1, 1, 0]
