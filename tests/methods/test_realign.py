"""The ridge regression against numpy's least squares, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.methods.held_out import held_out_rows
from moebit.methods.realign import MUS, margin_weights, realign

E, N, T, LENGTH = 5, 16, 320, 20


def problem(noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W, x^q, W x) for inputs that drift: scaled, shifted, and with noise."""
    g = torch.Generator().manual_seed(seed)
    w, x = torch.randn(E, N, generator=g), torch.randn(T, N, generator=g)
    drift = torch.eye(N) + 0.2 * torch.randn(N, N, generator=g)
    return w, x @ drift + noise * torch.randn(T, N, generator=g), x @ w.T


def naive_ridge(w: Tensor, x: Tensor, target: Tensor, weights: Tensor, mu: float) -> np.ndarray:
    """argmin by stacking the penalty under the data and numpy's lstsq, row by row."""
    a, b, root = x.double().numpy(), target.double().numpy(), np.sqrt(weights.double().numpy())
    mean = float((root[:, None] * a).__pow__(2).sum() / a.shape[1])
    penalty = np.sqrt(mu * mean) * np.eye(a.shape[1])
    rows = []
    for e in range(len(w)):
        left = np.vstack([root[:, None] * a, penalty])
        right = np.concatenate([root * b[:, e], penalty @ w[e].double().numpy()])
        rows.append(np.linalg.lstsq(left, right, rcond=None)[0])
    return np.stack(rows)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("margin", [False, True])
def test_it_is_the_ridge_regression_with_the_mu_that_held_out_tokens_choose(noise: float, margin: bool) -> None:
    w, x, target = problem(noise)
    weights = margin_weights(target, 2) if margin else torch.ones(T)
    unseen = held_out_rows(T, LENGTH)
    errors = []
    for mu in MUS:
        fitted = naive_ridge(w, x[~unseen], target[~unseen], weights[~unseen], mu)
        missed = (target[unseen].double().numpy() - x[unseen].double().numpy() @ fitted.T) ** 2
        errors.append(float((missed.mean(1) * weights[unseen].double().numpy()).sum() / float(weights[unseen].sum())))
    result = realign(w, x, target, weights, LENGTH)
    assert result.mu == MUS[int(np.argmin(errors))]
    assert result.held_out[1] == pytest.approx(min(errors), rel=1e-3, abs=1e-6)
    np.testing.assert_allclose(result.weight.numpy(), naive_ridge(w, x, target, weights, result.mu), rtol=2e-3, atol=2e-3)


def test_drift_that_is_linear_is_undone() -> None:
    w, x, target = problem(0.0)
    result = realign(w, x, target, torch.ones(T), LENGTH)
    before, after = ((target - x @ v.T).square().mean().item() for v in (w, result.weight))
    assert after < 1e-3 * before


def test_inputs_that_do_not_drift_are_left_alone() -> None:
    w, x, _ = problem(0.0)
    result = realign(w, x, x @ w.T, torch.ones(T), LENGTH)
    torch.testing.assert_close(result.weight, w, rtol=1e-4, atol=1e-4)


def test_noise_alone_is_no_reason_to_change_anything_much() -> None:
    """Target noise that no weight explains: held-out tokens choose no correction, or nearly none."""
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(E, 40, generator=g), torch.randn(48, 40, generator=g)
    target = x @ w.T + 3 * torch.randn(48, E, generator=g)
    result = realign(w, x, target, torch.ones(48), 12)
    assert result.mu is None or result.mu == max(MUS)
    assert result.held_out[1] <= result.held_out[0]


def test_inputs_that_never_fire_change_nothing() -> None:
    w = torch.randn(E, N, generator=torch.Generator().manual_seed(0))
    result = realign(w, torch.zeros(T, N), torch.randn(T, E, generator=torch.Generator().manual_seed(1)), torch.ones(T), LENGTH)
    assert result.mu is None
    assert torch.equal(result.weight, w)


def test_margins() -> None:
    z = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.9, 0.0], [5.0, 1.0, 0.0]])
    gaps = [1.0, 0.1, 4.0]
    raw = torch.tensor([1 / (gap + sum(gaps) / 3) for gap in gaps])
    torch.testing.assert_close(margin_weights(z, 1), raw / raw.mean())
    assert torch.equal(margin_weights(z, 3), torch.ones(3))


def test_every_fourth_window_is_held_out() -> None:
    assert held_out_rows(80, 10).view(8, 10).float().mean(1).tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert held_out_rows(40, 20).nonzero()[:, 0].tolist() == list(range(30, 40))
