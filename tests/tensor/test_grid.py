"""Scales, zero points and rounding against the oracle's scalar formulas."""

import numpy as np
import pytest
import torch

from moebit.tensor import QTensor, UniformGrid, UniformParams, minmax_grid, round_to_grid, search_grid, solve_rtn
from tests.support import reference
from tests.tensor.problems import BITS, GROUP_SIZES, KINDS, assert_identical, assert_same, grid_of, scheme_of, weights


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_rtn_equals_the_oracle(kind: str, group_size: int, clip_search: bool) -> None:
    w_EOI = weights(0, len(BITS), 3, 256)
    importance_EI = torch.from_numpy(np.random.default_rng(1).uniform(0, 4, size=(len(BITS), 256)))
    scheme = scheme_of(kind, group_size)
    ours = solve_rtn(w_EOI, torch.tensor(BITS), scheme, importance_EI=importance_EI, clip_search=clip_search)
    for expert, bits in enumerate(BITS):
        oracle = reference.rtn(w_EOI[expert].numpy(), grid_of(scheme, bits), importance_EI[expert].numpy(), clip_search)
        assert_same(ours, expert, oracle)
        np.testing.assert_allclose(ours.dequantize(torch.float64)[expert].numpy(), oracle.weight_OI, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_rounded_before_the_weights(kind: str, scale_dtype: str) -> None:
    """Equal to the oracle, which rounds the scale first; and rounding it last would have given other codes (so the test can tell)."""
    w_EOI = weights(2, len(BITS), 4, 128)
    scheme = scheme_of(kind, 64, scale_dtype)
    ours = solve_rtn(w_EOI, torch.tensor(BITS), scheme)
    assert ours.params.scale.dtype == scheme.scale_dtype
    for expert, bits in enumerate(BITS):
        assert_same(ours, expert, reference.rtn(w_EOI[expert].numpy(), grid_of(scheme, bits)))
    if scale_dtype == "bfloat16":
        exact = solve_rtn(w_EOI, torch.tensor(BITS), scheme_of(kind, 64))
        assert not torch.equal(ours.codes, exact.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_grid_functions_compose_to_rtn(kind: str) -> None:
    w_EOI, bits_E = weights(3, len(BITS), 4, 128, torch.float32), torch.tensor(BITS)
    scheme = scheme_of(kind, 32, "float16")
    for clip_search, make in ((False, minmax_grid), (True, search_grid)):
        scale, zero_point = make(w_EOI, bits_E, scheme)
        ours = solve_rtn(w_EOI, bits_E, scheme, clip_search=clip_search)
        assert torch.equal(scale.to(torch.float16), ours.params.scale)
        assert torch.equal(zero_point.to(torch.uint8), ours.params.zero_point)
        assert torch.equal(round_to_grid(w_EOI, scale, zero_point, bits_E, scheme), ours.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_qtensor_layout(kind: str) -> None:
    w_EOI = weights(4, len(BITS), 5, 96, torch.float32)
    scheme = scheme_of(kind, 32, "bfloat16")
    ours = solve_rtn(w_EOI, torch.tensor(BITS), scheme)
    assert (ours.codes.shape, ours.codes.dtype) == (w_EOI.shape, torch.uint8)
    assert (ours.params.scale.shape, ours.params.scale.dtype) == ((len(BITS), 5, 3), torch.bfloat16)
    assert (ours.params.zero_point.shape, ours.params.zero_point.dtype) == ((len(BITS), 5, 3), torch.uint8)
    assert (ours.bits.tolist(), ours.bits.dtype) == (BITS, torch.int64)
    assert ours.grid == scheme
    for expert, bits in enumerate(BITS):
        assert int(ours.codes[expert].max()) < 2**bits
        if scheme.symmetric:
            assert (ours.params.zero_point[expert] == 2 ** (bits - 1)).all()
    assert ours.dequantize().dtype == torch.float32
    exact = ours.dequantize(torch.float64)
    assert torch.equal(ours.dequantize(torch.bfloat16), ours.dequantize().to(torch.bfloat16))
    torch.testing.assert_close(ours.dequantize().double(), exact, rtol=1e-6, atol=0)
    # Near the weights: no further than one step, whatever the clipping... and at 8 bits nearly equal.
    eight = BITS.index(8)
    assert float((exact[eight] - w_EOI[eight]).norm() / w_EOI[eight].norm()) < 0.01


def test_dequantize_of_given_codes() -> None:
    codes = torch.tensor([[[0, 1, 3, 2]]], dtype=torch.uint8)
    scale = torch.tensor([[[0.5, -2.0]]])
    zero_point = torch.tensor([[[1, 2]]], dtype=torch.uint8)
    tensor = QTensor(codes, UniformParams(scale, zero_point), torch.tensor([2]), UniformGrid(2, symmetric=False))
    assert tensor.dequantize().tolist() == [[[-0.5, 0.0, -2.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_even_multiple(dtype: torch.dtype) -> None:
    """w / scale exactly between two integers: 0.5 → 0, 1.5 → 2, 2.5 → 2 and so on, before the zero point is added."""
    w_EOI = 0.5 * torch.tensor([[[-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]]], dtype=dtype)
    expected = torch.tensor([[[-4, -2, -2, 0, 0, 2, 2, 4]]])
    scale = torch.full((1, 1, 1), 0.5, dtype=dtype)
    for zero_point in (8, 7):  # an odd zero point must not turn the ties around
        zero = torch.full((1, 1, 1), zero_point, dtype=torch.uint8)
        codes = round_to_grid(w_EOI, scale, zero, torch.tensor([4]), UniformGrid(-1, symmetric=False))
        assert torch.equal(codes.long() - zero_point, expected), zero_point


def test_rounding_clamps_at_both_ends() -> None:
    w_EOI = torch.tensor([[[-99.0, 99.0, 0.0, 1.0]]])
    one = torch.ones(1, 1, 1)
    codes = round_to_grid(w_EOI, one, torch.full((1, 1, 1), 2, dtype=torch.uint8), torch.tensor([3]), UniformGrid(-1, symmetric=False))
    assert codes.tolist() == [[[0, 7, 2, 3]]]


def test_signed_scale_uses_every_code() -> None:
    w_EOI = torch.tensor([[[4.0, -1.0, 0.0, 3.0], [-4.0, 1.0, 0.0, -3.0]]])
    scale, zero_point = minmax_grid(w_EOI, torch.tensor([3]), UniformGrid(-1, symmetric=True, signed=True))
    assert scale.flatten().tolist() == [-1.0, 1.0]
    codes = round_to_grid(w_EOI, scale, zero_point, torch.tensor([3]), UniformGrid(-1, symmetric=True, signed=True))
    assert codes.tolist() == [[[0, 5, 4, 1], [0, 5, 4, 1]]]


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_groups_stay_zero(dtype: torch.dtype, kind: str, clip_search: bool) -> None:
    w_EOI = weights(5, len(BITS), 3, 96, dtype)
    w_EOI[:, 1, 32:64] = 0
    w_EOI[:, 2] = 0
    ours = solve_rtn(w_EOI, torch.tensor(BITS), scheme_of(kind, 32, "float16"), clip_search=clip_search)
    assert torch.isfinite(ours.params.scale.float()).all()
    assert (ours.dequantize()[:, 1, 32:64] == 0).all()
    assert (ours.dequantize()[:, 2] == 0).all()
    assert (ours.dequantize()[:, 0] != 0).any()


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_below_the_smallest_scale_become_zero(kind: str, clip_search: bool) -> None:
    """A float16 scale underflows long before a float32 weight does; that must not divide by zero."""
    w_EOI = 1e-9 * weights(6, 2, 3, 64, torch.float32)
    ours = solve_rtn(w_EOI, torch.tensor([2, 8]), scheme_of(kind, 32, "float16"), clip_search=clip_search)
    assert (ours.dequantize() == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_keep_zero_in_range(sign: int) -> None:
    w_EOI = sign * (1 + weights(7, 1, 4, 64).abs())
    ours = solve_rtn(w_EOI, 4, scheme_of("asymmetric", 32), clip_search=False)
    assert (ours.params.zero_point == (0 if sign == 1 else 15)).all()
    assert_same(ours, 0, reference.rtn(w_EOI[0].numpy(), grid_of(ours.grid, 4), clip_search=False))


def test_clipping_search_never_loses_to_minmax() -> None:
    w_EOI, bits_E = weights(8, len(BITS), 8, 128), torch.tensor(BITS)
    importance_EI = torch.from_numpy(np.random.default_rng(2).uniform(0, 1, size=(len(BITS), 128)) ** 4)
    for kind in KINDS:
        errors = []
        for clip_search in (True, False):
            ours = solve_rtn(w_EOI, bits_E, scheme_of(kind, 64), importance_EI=importance_EI, clip_search=clip_search)
            squared_EOI = (ours.dequantize(torch.float64) - w_EOI).square() * importance_EI[:, None]
            errors.append(squared_EOI.unflatten(-1, (2, 64)).sum(-1))
        assert (errors[0] <= errors[1] * (1 + 1e-12)).all()
        assert errors[0][0].sum() < 0.9 * errors[1][0].sum()  # and at 2 bits it is much better


def test_importance_decides_and_ties_keep_the_full_range() -> None:
    outlier = torch.tensor([[[4.0] + [1.0, -1.0] * 31 + [0.5]]], dtype=torch.float64)
    scheme, bits_E = scheme_of("symmetric", -1), torch.tensor([2])
    importance_EI = torch.ones(1, 64, dtype=torch.float64)
    importance_EI[0, 0] = 0
    assert float(search_grid(outlier, bits_E, scheme, importance_EI)[0]) == pytest.approx(4 * 0.35)
    importance_EI = 1 - importance_EI
    assert float(search_grid(outlier, bits_E, scheme, importance_EI)[0]) == pytest.approx(4.0)
    nothing = torch.zeros(1, 64, dtype=torch.float64)
    for kind in KINDS:
        searched, plain = search_grid(outlier, bits_E, scheme_of(kind, -1), nothing), minmax_grid(outlier, bits_E, scheme_of(kind, -1))
        assert torch.equal(searched[0], plain[0])
        assert torch.equal(searched[1], plain[1])


def test_importance_is_scale_free() -> None:
    w_EOI, bits_E, scheme = weights(9, 2, 4, 64), torch.tensor([3, 4]), scheme_of("asymmetric", 32)
    importance_EI = torch.from_numpy(np.random.default_rng(3).uniform(0, 1, size=(2, 64)))
    expected = solve_rtn(w_EOI, bits_E, scheme, importance_EI=importance_EI)
    for factor in (2.0**-40, 2.0**40):
        assert_identical(solve_rtn(w_EOI, bits_E, scheme, importance_EI=importance_EI * factor), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_independent(kind: str) -> None:
    """A batch equals its experts one at a time, whatever their widths; permuting the experts permutes the results."""
    w_EOI, bits_E = weights(10, len(BITS), 4, 128, torch.float32), torch.tensor(BITS)
    scheme = scheme_of(kind, 64, "float16")
    together = solve_rtn(w_EOI, bits_E, scheme)
    for expert, bits in enumerate(BITS):
        alone = solve_rtn(w_EOI[expert : expert + 1], bits, scheme)
        picked = QTensor(
            together.codes[expert : expert + 1],
            UniformParams(together.params.scale[expert : expert + 1], together.params.zero_point[expert : expert + 1]),
            together.bits[expert : expert + 1],
            scheme,
        )
        assert_identical(alone, picked)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = solve_rtn(w_EOI[order], bits_E[order], scheme)
    assert torch.equal(permuted.codes, together.codes[order])
    assert torch.equal(permuted.params.scale, together.params.scale[order])


def test_views_are_welcome_and_left_alone() -> None:
    """Experts come as slices and transposes of a checkpoint's storage."""
    stored = weights(11, 3, 128, 16, torch.float32)
    before, scheme = stored.clone(), scheme_of("asymmetric", 64, "float32")
    view_EOI = stored.transpose(1, 2)[:, ::2]
    assert_identical(solve_rtn(view_EOI, 4, scheme), solve_rtn(view_EOI.contiguous(), 4, scheme))
    assert torch.equal(stored, before)


def test_half_precision_weights_are_solved_in_float32() -> None:
    w_EOI, scheme = weights(12, 2, 4, 64).to(torch.bfloat16), scheme_of("asymmetric", 32, "float16")
    assert_identical(solve_rtn(w_EOI, 4, scheme), solve_rtn(w_EOI.float(), 4, scheme))


def test_bad_arguments_are_named() -> None:
    w_EOI = weights(13, 2, 4, 96, torch.float32)
    with pytest.raises(ValueError, match="96"):
        solve_rtn(w_EOI, 4, scheme_of("asymmetric", 64))
    for bits in (1, 9, torch.tensor([4, 4, 4])):
        with pytest.raises(ValueError, match="bit width"):
            solve_rtn(w_EOI, bits, scheme_of("asymmetric", 32))
