"""Scales fitted to fixed codes, against a loop over rows and groups that computes every error by its definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.tensor import Float8Grid, QTensor, refit_scales, solve_gptq, solve_rtn
from tests.support import reference
from tests.tensor.problems import BITS, KINDS, assert_identical, grid_of, hessians, scheme_of, weights


def solved(kind: str, group_size: int, scale_dtype: str = "float64") -> tuple[QTensor, Tensor, Tensor]:
    w_EOI, h_EII = weights(3, len(BITS), 5, 128), hessians(3, len(BITS), 128)
    w_EOI[1, 2, :64] = 0  # groups of nothing but zeros
    q, _ = solve_gptq(w_EOI, h_EII, torch.tensor(BITS), scheme_of(kind, group_size, scale_dtype))
    return q, w_EOI, h_EII


def losses(q: QTensor, w_EOI: Tensor, h_EII: Tensor) -> Tensor:
    """[E, O] error of every row."""
    missed = w_EOI - q.dequantize(torch.float64)
    return torch.einsum("eoi,eij,eoj->eo", missed, h_EII, missed)


@pytest.mark.parametrize("scale_dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_loop(kind: str, group_size: int, scale_dtype: str) -> None:
    q, w_EOI, h_EII = solved(kind, group_size, scale_dtype)
    fitted, fallen = refit_scales(q, w_EOI, h_EII)
    for e, bits in enumerate(BITS):
        expected = reference.refit(
            w_EOI[e].numpy(),
            q.codes[e].numpy(),
            q.params.scale[e].double().numpy(),
            q.params.zero_point[e].numpy(),
            h_EII[e].numpy(),
            grid_of(q.grid, bits),
        )
        np.testing.assert_allclose(fitted.params.scale[e].double().numpy(), expected, rtol=1e-9)
    before, after = losses(q, w_EOI, h_EII), losses(fitted, w_EOI, h_EII)
    assert bool((after <= before * (1 + 1e-12)).all())
    assert float(after[0].sum()) < 0.999 * float(before[0].sum())  # 2 bits
    torch.testing.assert_close(fallen, (before - after).sum(1))
    assert fitted.params.scale.dtype == q.params.scale.dtype
    assert torch.equal(fitted.codes, q.codes)
    assert torch.equal(fitted.params.zero_point, q.params.zero_point)


def test_one_group_ends_at_the_least_squares_scale() -> None:
    """With one group per row there is nothing else to fit: the weighted regression of the row on its codes."""
    q, w_EOI, h_EII = solved("symmetric", -1)
    fitted, _ = refit_scales(q, w_EOI, h_EII)
    for e in range(len(BITS)):
        root = np.linalg.cholesky(h_EII[e].numpy()).T
        for row in range(w_EOI.shape[1]):
            steps = q.codes[e, row].double().numpy() - float(q.params.zero_point[e, row, 0])
            best = np.linalg.lstsq((root @ steps)[:, None], root @ w_EOI[e, row].numpy(), rcond=None)[0][0]
            assert float(fitted.params.scale[e, row, 0]) == pytest.approx(best)


def test_what_it_leaves_alone() -> None:
    """Matrices marked unusable, groups of zeros, Hessians of zeros or NaN; what a step would turn round or make zero."""
    q, w_EOI, h_EII = solved("symmetric", 32)
    usable = torch.tensor([True, False, True, True, True, True])
    fitted, fallen = refit_scales(q, w_EOI, h_EII, usable)
    assert torch.equal(fitted.params.scale[1], q.params.scale[1])
    assert not torch.equal(fitted.params.scale[2], q.params.scale[2])
    assert float(fallen[1]) == 0
    fitted, _ = refit_scales(q, w_EOI, h_EII)
    assert torch.equal(fitted.params.scale[1, 2, :2], q.params.scale[1, 2, :2])
    for value in (0.0, torch.nan):
        assert_identical(refit_scales(q, w_EOI, torch.full_like(h_EII, value))[0], q)
    for target in (-w_EOI, torch.zeros_like(w_EOI)):  # the best scale is negative, is zero
        fitted, _ = refit_scales(q, target, torch.eye(128, dtype=torch.float64).expand_as(h_EII))
        assert bool((fitted.params.scale > 0).all())


def test_rows_in_pieces_and_multiples_of_a_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    q, w_EOI, h_EII = solved("asymmetric", 32, "float32")
    fitted, _ = refit_scales(q, w_EOI, h_EII)
    assert_identical(refit_scales(q, w_EOI, 64 * h_EII)[0], fitted)
    monkeypatch.setattr("moebit.tensor.refit.ROW_BYTES", 1)
    monkeypatch.setattr("moebit.tensor.refit.MIN_ROWS", 2)
    torch.testing.assert_close(refit_scales(q, w_EOI, h_EII)[0].params.scale, fitted.params.scale)


def test_float8_is_refused() -> None:
    w = weights(0, 1, 2, 32)
    q = solve_rtn(w, 8, Float8Grid(-1))
    with pytest.raises(ValueError, match="Float8Grid"):
        refit_scales(q, w, torch.eye(32).expand(1, 32, 32))
