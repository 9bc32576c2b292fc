"""Second moments, damping, factorisation and shrinkage against loops and definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.tensor import damp, factor_, second_moment, shrink
from tests.support import reference
from tests.tensor.problems import hessians

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damp_equals_the_oracle(dtype: torch.dtype) -> None:
    h_ENN = hessians(0, 4, 24, dtype=dtype)
    h_ENN[1, 3, :] = h_ENN[1, :, 3] = 0
    h_ENN[2] = 0
    before = h_ENN.clone()
    shares = [0.01, 0.1, 0.5, 1.0]
    for damping in (0.01, torch.tensor(shares, dtype=dtype)):
        ours = damp(h_ENN, damping)
        for expert in range(4):
            share = shares[expert] if isinstance(damping, torch.Tensor) else damping
            np.testing.assert_allclose(ours[expert].numpy(), reference.damped(h_ENN[expert].numpy(), share), rtol=1e-5, atol=1e-12)
    assert torch.equal(h_ENN, before)


def test_damp_is_scale_free() -> None:
    h_ENN = hessians(1, 2, 16)
    h_ENN[1, 5, :] = h_ENN[1, :, 5] = 0
    torch.testing.assert_close(damp(h_ENN * 2.0**-60, 0.05), damp(h_ENN, 0.05) * 2.0**-60, rtol=1e-12, atol=0)


def test_all_dead_gives_a_multiple_of_the_identity() -> None:
    ours = damp(torch.zeros(1, 8, 8), 0.01)[0]
    assert torch.equal(ours, ours[0, 0] * torch.eye(8))
    assert float(ours[0, 0]) == pytest.approx(1.01)


def factor(h_ENN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(F, D, ok) with F written out: its part below the diagonal, ones on it."""
    f_ENN = h_ENN.clone()
    d_EN, ok_E = factor_(f_ENN)
    return f_ENN.tril(-1) + torch.eye(h_ENN.shape[-1], dtype=h_ENN.dtype), d_EN, ok_E


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 33, 128, 300, 512])
def test_factor_is_the_ldl(size: int, dtype: torch.dtype) -> None:
    h_ENN = damp(hessians(2, 3, size, dtype=dtype), 0.01)
    f_ENN, d_EN, ok_E = factor(h_ENN)
    assert ok_E.tolist() == [True] * 3
    torch.testing.assert_close((f_ENN * d_EN[:, None]) @ f_ENN.mT, h_ENN, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for expert in range(3):
        backwards = h_ENN[expert].double().numpy()[::-1, ::-1]
        oracle = reference.unit_upper(backwards)[::-1, ::-1]
        np.testing.assert_allclose(f_ENN[expert].numpy(), oracle, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("size", [32, 600])
def test_factor_reports_failures_and_spares_the_rest(size: int) -> None:
    h_ENN = damp(hessians(3, 4, size), 0.01)
    good, good_d, _ = factor(h_ENN)
    h_ENN[1] = -h_ENN[1]
    h_ENN[3, 0, size - 1] = h_ENN[3, size - 1, 0] = 1e3
    f_ENN, d_EN, ok_E = factor(h_ENN)
    assert ok_E.tolist() == [True, False, True, False]
    for expert in (1, 3):
        assert torch.equal(f_ENN[expert], torch.eye(size, dtype=f_ENN.dtype))
        assert not d_EN[expert].any()
    for expert in (0, 2):
        assert torch.equal(f_ENN[expert], good[expert])
        assert torch.equal(d_EN[expert], good_d[expert])


def test_factor_reports_a_matrix_with_nan() -> None:
    h_ENN = damp(hessians(4, 2, 16), 0.01)
    h_ENN[0, 3, 3] = torch.nan
    f_ENN, _, ok_E = factor(h_ENN)
    assert ok_E.tolist() == [False, True]
    assert torch.isfinite(f_ENN).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "size"), [(0, 24), (1, 24), (50, 24), (40, 700)])
def test_second_moment_equals_the_loop(tokens: int, size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    x_TN = torch.from_numpy(rng.normal(size=(tokens, size))).to(dtype)
    weight_T = torch.from_numpy(rng.uniform(size=tokens))
    weight_T[tokens // 2 :] *= 0.01
    ours = second_moment(x_TN, weight_T)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(ours, ours.T)
    oracle, _, _ = reference.weighted_hessian(x_TN.double().numpy(), weight_T.numpy())
    np.testing.assert_allclose(ours.numpy(), oracle, rtol=1e-4, atol=1e-4 if ours.dtype == torch.float32 else 1e-12)
    unweighted, _, _ = reference.weighted_hessian(x_TN.double().numpy(), np.ones(tokens))
    np.testing.assert_allclose(second_moment(x_TN).numpy(), unweighted, rtol=1e-4, atol=1e-4 if ours.dtype == torch.float32 else 1e-12)


def test_second_moment_of_views_and_bad_shapes() -> None:
    x_NT = torch.from_numpy(np.random.default_rng(6).normal(size=(12, 40)))
    torch.testing.assert_close(second_moment(x_NT.T[::2]), x_NT[:, ::2] @ x_NT[:, ::2].T)
    with pytest.raises(ValueError, match="tokens"):
        second_moment(x_NT[None])


def shrink_problem(seed: int, experts: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Sums, weight sums, squared weight sums, and the tokens each expert had: none, one, a few, many."""
    rng = np.random.default_rng(seed)
    tokens = [0, 1, size // 2, 20 * size][:experts]
    parts = [reference.weighted_hessian(rng.normal(size=(t, size)), rng.uniform(0.05, 1, size=t)) for t in tokens]
    sums = torch.from_numpy(np.stack([part[0] for part in parts]))
    return sums, torch.tensor([p[1] for p in parts], dtype=torch.float64), torch.tensor([p[2] for p in parts], dtype=torch.float64), tokens


@pytest.mark.parametrize("per_expert", [False, True])
def test_shrink_equals_the_oracle(per_expert: bool) -> None:
    h_sum_ENN, total_E, squares_E, _ = shrink_problem(7, 4, 12)
    layer = hessians(8, 4, 12)
    layer = layer if per_expert else layer[0]
    ours = shrink(h_sum_ENN, total_E, squares_E, layer)
    for expert in range(4):
        mine = (layer[expert] if per_expert else layer).numpy()
        oracle = reference.shrink(h_sum_ENN[expert].numpy(), float(total_E[expert]), float(squares_E[expert]), mine)
        np.testing.assert_allclose(ours[expert].numpy(), oracle, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours[0], layer[0] if per_expert else layer, rtol=0, atol=0)  # no tokens: the layer's, exactly


def test_shrink_trusts_an_expert_by_its_tokens() -> None:
    h_sum_ENN, total_E, squares_E, tokens = shrink_problem(9, 4, 12)
    layer = hessians(10, 1, 12)[0]
    ours = shrink(h_sum_ENN, total_E, squares_E, layer)
    distance = [float((ours[e] - h_sum_ENN[e] / total_E[e]).norm() / (layer - h_sum_ENN[e] / total_E[e]).norm()) for e in (1, 2, 3)]
    assert distance[0] > 0.9
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 0.1
    assert tokens[3] > tokens[2]


@pytest.mark.parametrize("exponent", [-20, -60, 40])
def test_shrink_does_not_know_the_unit_of_the_weights(exponent: int) -> None:
    """Affinities times a constant (their square times its square) say the same."""
    h_sum_ENN, total_E, squares_E, _ = shrink_problem(11, 4, 12)
    layer, unit = hessians(12, 1, 12)[0], 2.0**exponent
    expected = shrink(h_sum_ENN, total_E, squares_E, layer)
    torch.testing.assert_close(shrink(h_sum_ENN * unit, total_E * unit, squares_E * unit**2, layer), expected, rtol=1e-10, atol=1e-12)


def test_shrink_in_float32() -> None:
    h_sum_ENN, total_E, squares_E, _ = shrink_problem(13, 4, 12)
    layer = hessians(14, 1, 12)[0]
    ours = shrink(h_sum_ENN.float(), total_E.float(), squares_E.float(), layer.float())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), shrink(h_sum_ENN, total_E, squares_E, layer), rtol=1e-5, atol=1e-5)
