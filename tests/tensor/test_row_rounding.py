"""Dynamic rounding of activations against one row at a time, in Python's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebit.tensor.row_rounding import Rounding, round_rows, round_rows_to_float8
from tests.support.reference import naive_round_row
from tests.support.rounded import rounded_to_float8

WIDTHS = (3, 4, 5, 6, 7, 8)


def rows(seed: int = 0) -> Tensor:
    """Of both signs, of one sign, with an outlier, of zeros with one number, small and large, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 24, generator=g, dtype=torch.float64)
    x[1], x[2] = x[1].abs() + 0.1, -x[2].abs() - 0.1
    x[3, 5] = 40.0
    x[4] = 0
    x[5] = 0
    x[5, 7] = -3.0
    x[6] *= 1e-6
    x[7] *= 1e6
    x[8] = 0.25
    return x


@pytest.mark.parametrize("clip", [1.0, 0.9, 0.35])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_against_one_row_at_a_time(bits: int, symmetric: bool, clip: float) -> None:
    x = rows()
    wanted = torch.tensor([naive_round_row(row.tolist(), bits, symmetric, clip) for row in x], dtype=torch.float64)
    got = round_rows(x, bits, symmetric=symmetric, clip=clip)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    assert torch.equal(got, Rounding(bits, symmetric, clip)(x))
    assert torch.equal(round_rows(x.view(3, 4, 24), bits, symmetric=symmetric, clip=clip), got.view(3, 4, 24))  # rows, whatever is around
    for row, rounded in zip(x, got, strict=True):
        assert len(rounded.unique()) <= 2**bits
        assert not torch.equal(row, rounded) or bool((row == 0).sum() >= 23) or len(row.unique()) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_types(symmetric: bool) -> None:
    """Computed in float32, whatever comes; what comes out has the type of what went in."""
    x = rows()[:4]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = round_rows(x.to(dtype), 4, symmetric=symmetric)
        assert got.dtype == dtype
        assert torch.equal(got, round_rows(x.to(dtype).float(), 4, symmetric=symmetric).to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_scale_become_zeros(dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.zeros(3, 8, dtype=dtype)
    x[1, 2], x[2, 3] = 1e-40, -1e-38
    got = round_rows(x, 8, symmetric=symmetric)
    assert bool(torch.isfinite(got).all())
    assert not bool(got[:2].any())
    assert bool((got[2].abs() <= 2e-38).all())


def test_what_is_not_finite_stays_visible() -> None:
    x = rows()[:3].float()
    x[0, 1], x[1, 1] = float("nan"), float("inf")
    for symmetric in (True, False):
        got = round_rows(x, 4, symmetric=symmetric)
        assert bool(got[:2].isnan().any(1).all())
        assert bool(got[2].isfinite().all())


def test_the_input_is_left_alone() -> None:
    x = rows().float()
    before = x.clone()
    round_rows(x, 4, symmetric=False)
    round_rows(x, 4, symmetric=True)
    assert torch.equal(x, before)


def test_float8() -> None:
    """Against the table of its numbers; the row's largest magnitude stays, and a row far below it loses what has no numbers there."""
    x = rows().float()
    x[9] *= 1e-4  # under vLLM's least scale
    got = round_rows_to_float8(x)
    torch.testing.assert_close(got, torch.from_numpy(rounded_to_float8(x.numpy())), rtol=1e-6, atol=0)
    assert torch.equal(got, Rounding(8, True, float8=True)(x))
    assert torch.equal(got.view(3, 4, 24), round_rows_to_float8(x.view(3, 4, 24)))
    assert round_rows_to_float8(x.bfloat16()).dtype == torch.bfloat16
    ties = torch.tensor([[448.0, 25.0, 27.0, -29.0, 17.0, 0.001, 2**-10, 3 * 2**-10]])  # at scale 1: steps of 2 from 16 to 32
    assert round_rows_to_float8(ties).tolist() == [[448.0, 24.0, 28.0, -28.0, 16.0, 0.001953125, 0.0, 2 * 2**-9]]
    x[0, 0], x[1, 1] = torch.nan, -torch.inf
    assert round_rows_to_float8(x).isnan().any(1).tolist() == [True, True] + [False] * 10
