"""The oracle against hand-worked numbers, against itself in another form, and against brute force."""

import itertools

import numpy as np
import pytest

from tests.support import reference
from tests.support.reference import Grid


def correlated(rng: np.random.Generator, rows: int, columns: int, tokens: int = 400) -> tuple[np.ndarray, np.ndarray]:
    x_TI = rng.normal(size=(tokens, columns // 4)) @ rng.normal(size=(columns // 4, columns)) + rng.normal(size=(tokens, columns))
    x_TI *= np.exp(rng.normal(size=columns))
    return 0.02 * rng.normal(size=(rows, columns)), x_TI.T @ x_TI / tokens


def test_quantizer_by_hand() -> None:
    asymmetric = Grid(bits=2)  # range -1 … 2, scale 1, zero point 1
    assert reference.group_grid([-1.0, 0.2, 2.0], asymmetric) == (1.0, 1)
    assert [reference.encode(v, 1.0, 1, 2) for v in (-1.0, 0.2, 0.5, 1.5, 2.0, 9.0, -9.0)] == [0, 1, 1, 3, 3, 3, 0]
    assert reference.group_grid([3.0, 1.0], asymmetric) == (1.0, 0)  # zero is always in the range
    assert reference.group_grid([-3.0, -1.0], asymmetric) == (1.0, 3)
    symmetric = Grid(bits=3, symmetric=True)
    assert reference.group_grid([-1.5, 3.0], symmetric) == (1.0, 4)
    assert reference.group_grid([-6.0, 3.0], symmetric) == (2.0, 4)
    signed = Grid(bits=3, symmetric=True, signed=True)
    assert reference.group_grid([-2.0, 4.0], signed) == (-1.0, 4)  # the largest weight takes the code -4
    assert reference.group_grid([-4.0, 2.0], signed) == (1.0, 4)
    assert reference.encode(4.0, -1.0, 4, 3) == 0
    assert reference.decode(0, -1.0, 4) == 4.0
    for grid in (asymmetric, symmetric, signed):
        scale, zero_point = reference.group_grid([0.0, 0.0], grid)
        assert reference.decode(reference.encode(0.0, scale, zero_point, grid.bits), scale, zero_point) == 0.0


def test_scale_rounding() -> None:
    assert reference.round_scale(1 + 2**-8, "bfloat16") == 1.0  # a tie, to even
    assert reference.round_scale(1 + 3 * 2**-8, "bfloat16") == 1 + 2**-6
    assert reference.round_scale(-(1 + 3 * 2**-9), "bfloat16") == -(1 + 2**-7)
    assert reference.round_scale(1 + 3 * 2**-12, "float16") == 1 + 2**-10
    assert reference.round_scale(0.1, "float32") == float(np.float32(0.1))


def test_clipping_search_prefers_the_largest_ratio() -> None:
    grid = Grid(bits=4, symmetric=True)
    assert reference.search_group_grid([0.0] * 4, [1.0] * 4, grid) == reference.group_grid([0.0] * 4, grid)
    assert reference.search_group_grid([0.3, -0.7, 0.1], [0.0] * 3, grid) == reference.group_grid([0.3, -0.7, 0.1], grid)
    values = [4.0] + [1.0, -1.0] * 20  # one outlier that does not matter
    scale, _ = reference.search_group_grid(values, [0.0] + [1.0] * 40, Grid(bits=2, symmetric=True))
    assert scale == pytest.approx(4 * 0.35)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_textbook_equals_ldl_form(symmetric: bool, group_size: int, act_order: bool) -> None:
    w_OI, h_II = correlated(np.random.default_rng(0), 5, 64)
    h_II[7, :] = h_II[:, 7] = 0
    grid = Grid(bits=3, group_size=group_size, symmetric=symmetric)
    textbook = reference.gptq(w_OI, h_II, grid, act_order=act_order)
    ldl = reference.gptq_ldl(w_OI, h_II, grid, act_order=act_order)
    np.testing.assert_array_equal(textbook.codes_OI, ldl.codes_OI)
    np.testing.assert_allclose(textbook.target_OI, ldl.target_OI, rtol=1e-7, atol=1e-12)
    assert textbook.loss < 0.8 * reference.hessian_loss(w_OI, reference.rtn(w_OI, grid).weight_OI, h_II)


def test_dynamic_scales_see_the_closed_form_update() -> None:
    """The columns of a group as they stand when it begins are W_g + (W - Q)_{<g} V_{<g,g} V_gg^-1, with H = V V^T, V upper triangular."""
    w_OI, h_II = correlated(np.random.default_rng(1), 6, 64)
    grid = Grid(bits=3, group_size=16)
    result = reference.gptq(w_OI, h_II, grid, scales="dynamic", act_order=False, clip_search=False)
    v_II = np.linalg.cholesky(reference.damped(h_II, 0.01)[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(v_II @ v_II.T, reference.damped(h_II, 0.01), rtol=1e-9, atol=1e-9)
    for group, part in enumerate(reference.group_slices(64, 16)):
        done = slice(0, part.start)
        updated_OG = w_OI[:, part] + (w_OI - result.weight_OI)[:, done] @ v_II[done, part] @ np.linalg.inv(v_II[part, part])
        scale_O1, zero_point_O1 = reference.matrix_grid(updated_OG, Grid(bits=3))
        np.testing.assert_allclose(result.scale_OG[:, group], scale_O1[:, 0], rtol=1e-9)
        np.testing.assert_array_equal(result.zero_point_OG[:, group], zero_point_O1[:, 0])


def test_gptq_of_a_diagonal_hessian_is_rounding() -> None:
    rng = np.random.default_rng(2)
    w_OI, h_II = rng.normal(size=(4, 32)), np.diag(rng.uniform(0.1, 3, size=32))
    grid = Grid(bits=4, group_size=16, symmetric=True)
    rounded = reference.rtn(w_OI, grid, np.diag(h_II))
    np.testing.assert_array_equal(reference.gptq(w_OI, h_II, grid).codes_OI, rounded.codes_OI)


def test_gptq_against_every_rounding() -> None:
    """On 5 columns all roundings can be tried: GPTQ is never better than the best, and far closer to it than to rounding each alone."""
    rng = np.random.default_rng(3)
    grid, gptq, nearest, best = Grid(bits=2), 0.0, 0.0, 0.0
    for _ in range(20):
        w_OI, x_TI = rng.normal(size=(1, 5)), rng.normal(size=(50, 2)) @ rng.normal(size=(2, 5)) + 0.2 * rng.normal(size=(50, 5))
        h_II = x_TI.T @ x_TI / 50
        scale_OG, zero_point_OG = reference.matrix_grid(w_OI, grid)
        levels = [reference.decode(code, float(scale_OG[0, 0]), int(zero_point_OG[0, 0])) for code in range(4)]
        losses = [reference.hessian_loss(w_OI, np.array([choice]), h_II) for choice in itertools.product(levels, repeat=5)]
        result = reference.gptq(w_OI, h_II, grid, clip_search=False)
        assert result.loss >= min(losses) - 1e-12
        gptq, best = gptq + result.loss, best + min(losses)
        nearest += reference.hessian_loss(w_OI, reference.rtn(w_OI, grid, clip_search=False).weight_OI, h_II)
    assert gptq - best < 0.5 * (nearest - best)


def test_indefinite_hessian_is_refused() -> None:
    h_II = np.eye(8) + 0.9 * np.fliplr(np.eye(8)) * 3
    with pytest.raises(np.linalg.LinAlgError):
        reference.gptq(np.ones((1, 8)), h_II, Grid(bits=4))


def test_shrink_limits() -> None:
    rng = np.random.default_rng(4)
    x_TI = rng.normal(size=(3, 6))
    layer_II = np.eye(6)
    h_II, total, squares = reference.weighted_hessian(x_TI, np.full(3, 0.25))
    np.testing.assert_allclose(h_II / total, x_TI.T @ x_TI / 3)
    np.testing.assert_allclose(
        reference.shrink(h_II, total, squares, layer_II), (x_TI.T @ x_TI / 3) * 3 / 9 + layer_II * 6 / 9
    )  # n_eff = 3
    np.testing.assert_array_equal(reference.shrink(np.zeros((6, 6)), 0.0, 0.0, layer_II), layer_II)


def test_packing_by_hand() -> None:
    assert reference.pack_row([1, 2, 3], 4) == bytes([0x21, 0x03, 0, 0])
    assert reference.pack_row([7, 0, 0, 0, 0, 0, 0, 1], 3) == bytes([7, 0, 0b00100000])
    assert reference.unpack_row(bytes([0x21, 0x03, 0, 0]), 4, 3) == [1, 2, 3]
