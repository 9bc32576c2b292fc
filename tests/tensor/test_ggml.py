"""ggml's block types: bytes and values against ggml itself and gguf's reader, fits against ggml's rounding and a naive loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.tensor import solve_gptq, solve_rtn
from moebit.tensor.grids.ggml import GRIDS
from moebit.tensor.grids.ggml_fp4 import Nvfp4Params
from moebit.tensor.grids.ggml_grid import GgmlGrid
from moebit.tensor.grids.ggml_moments import Piece, moments, moments_torch
from tests.support import ggml

NAMES = sorted(GRIDS)
# Weighted squared error of our fit over that of ggml_quantize_chunk.
WORST_RATIO = {name: 1.0 for name in NAMES} | {"q2_k": 0.95, "q3_k": 0.99, "q4_k": 0.97, "q6_k": 0.97, "q2_0": 0.4}


def _weights(kind: str, seed: int = 0, shape: tuple[int, int, int] = (2, 24, 512)) -> Tensor:
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal(shape) if kind == "normal" else generator.standard_t(4, shape)
    return torch.from_numpy(0.05 * drawn).float()


def _importance(seed: int = 1, shape: tuple[int, int] = (2, 512)) -> Tensor:
    return torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(shape))).float()


def _bits(grid: GgmlGrid, experts: int = 2) -> Tensor:
    return torch.full((experts,), grid.bits)


def _without_tensor_scale(params: object) -> object:
    """What blocks alone say: readers of blocks do not see NVFP4's scale of a whole tensor."""
    if not isinstance(params, Nvfp4Params):
        return params
    return dataclasses.replace(params, tensor_scale=torch.ones_like(params.tensor_scale))


def _assert_equal(a: object, b: object) -> None:
    assert type(a) is type(b)
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None and right is None) or torch.equal(left, right), field.name


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ggmls_own_bytes_mean_the_same_and_come_back(name: str, importance: bool) -> None:
    grid, w = GRIDS[name], _weights("heavy")
    w[0, :2, :64] = 0
    packed = ggml.quantize(grid, w, _importance() if importance else None)
    codes, params = grid.unpack(packed, 512)
    assert codes.shape == w.shape
    assert int(codes.max()) <= grid.largest_code
    assert torch.equal(grid.dequantize(codes, params).flatten(), ggml.dequantize(grid, packed))
    assert torch.equal(grid.pack(codes, params), packed)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_mean_what_they_mean_to_ggml(name: str) -> None:
    """Random bytes reach every field and every bit; only float16 numbers are kept finite, and FP4's two zeros are one."""
    grid = GRIDS[name]
    packed = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (1, 200, grid.layout.size), dtype=np.uint8))
    place = 0
    for part in grid.layout.parts:
        if getattr(part, "field", None) in ("d", "m", "dmin"):
            packed[..., place + 1] &= 0xBF  # the top bit of the exponent: no infinities
        place += part.size
    if name == "nvfp4":
        packed[..., :4] &= 0x7F
    codes, params = grid.unpack(packed, grid.block)
    assert torch.equal(grid.dequantize(codes, params).flatten(), ggml.dequantize(grid, packed))
    if grid.levels is None or name.startswith("iq4"):
        assert torch.equal(grid.pack(codes, params), packed)


@pytest.mark.parametrize("name", NAMES)
def test_gguf_reads_what_we_fit_and_pack(name: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="needs gguf: pip install -c constraints.txt -e '.[dev]'")
    types = pytest.importorskip("gguf").GGMLQuantizationType
    if not hasattr(types, name.upper()):
        pytest.skip(f"this version of gguf does not know {name}")
    grid, w = GRIDS[name], _weights("normal")
    params = grid.fit(w, _bits(grid), _importance())
    codes = grid.round(w, params)
    packed = grid.pack(codes, params)
    read = quants.dequantize(packed.numpy(), types[name.upper()])
    ours = grid.dequantize(codes, _without_tensor_scale(params))
    np.testing.assert_array_equal(read, ours.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_ggml_reads_what_we_fit_and_pack(name: str) -> None:
    grid, w = GRIDS[name], _weights("heavy")
    params = grid.fit(w, _bits(grid), _importance())
    codes = grid.round(w, params)
    packed = grid.pack(codes, params)
    assert packed.shape == (2, 24, 512 // grid.block * grid.layout.size)
    assert torch.equal(ggml.dequantize(grid, packed), grid.dequantize(codes, _without_tensor_scale(params)).flatten())
    again, read = grid.unpack(packed, 512)
    assert torch.equal(again, codes)
    _assert_equal(read, _without_tensor_scale(params))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_nearest_values(name: str) -> None:
    grid, w = GRIDS[name], _weights("normal", shape=(1, 4, 256))
    params = grid.fit(w, _bits(grid, 1))
    ours = (grid.dequantize(grid.round(w, params), params) - w).abs()
    for code in range(grid.largest_code + 1):
        other = (grid.dequantize(torch.full(w.shape, code, dtype=torch.uint8), params) - w).abs()
        assert bool((ours <= other * (1 + 1e-5) + 1e-9).all()), code


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("name", NAMES)
def test_the_fit_loses_no_more_than_ggmls(name: str, kind: str, importance: bool) -> None:
    grid, w = GRIDS[name], _weights(kind)
    given = _importance() if importance else None
    params = grid.fit(w, _bits(grid), given)
    ours = grid.dequantize(grid.round(w, params), params)
    theirs = ggml.dequantize(grid, ggml.quantize(grid, w, given)).view_as(w)
    weight = torch.ones(2, 1, 512) if given is None else given[:, None]
    ratio = float(((ours - w).square() * weight).sum() / ((theirs - w).square() * weight).sum())
    assert ratio <= WORST_RATIO[name], ratio


@pytest.mark.parametrize("name", NAMES)
def test_searching_pays(name: str) -> None:
    grid, w, importance = GRIDS[name], _weights("heavy"), _importance()
    quick, searched = (grid.fit(w, _bits(grid), importance, search=search) for search in (False, True))
    errors = [((grid.dequantize(grid.round(w, p), p) - w).square() * importance[:, None]).sum() for p in (quick, searched)]
    assert 0.3 * errors[0] < errors[1] < 0.99 * errors[0]


def _naive_q4_k(w_I: np.ndarray, weight_I: np.ndarray) -> float:
    """Weighted error of a row as Q4_K: each group's range, the largest scale and offset on 63, float64, no search at all."""
    total = 0.0
    for start in range(0, len(w_I), 256):
        groups = [range(start + 32 * g, start + 32 * (g + 1)) for g in range(8)]
        lows = [min(0.0, min(w_I[i] for i in group)) for group in groups]
        scales = [(max(w_I[i] for i in group) - low) / 15 for group, low in zip(groups, lows, strict=True)]
        d, dmin = float(np.float16(max(scales) / 63)), float(np.float16(max(-low for low in lows) / 63))
        for group, low, scale in zip(groups, lows, scales, strict=True):
            sc, m = min(63, round(scale / d)), min(63, round(-low / dmin))
            for i in group:
                q = min(15, max(0, round((w_I[i] + dmin * m) / (d * sc))))
                total += weight_I[i] * (d * sc * q - dmin * m - w_I[i]) ** 2
    return total


def test_the_fit_is_better_than_a_naive_one() -> None:
    grid, w, importance = GRIDS["q4_k"], _weights("heavy", shape=(1, 6, 512)), _importance(shape=(1, 512))
    params = grid.fit(w, _bits(grid, 1), importance)
    ours = (grid.dequantize(grid.round(w, params), params) - w).double().square() @ importance[0].double()
    for row in range(6):
        bound = _naive_q4_k(w[0, row].double().numpy(), importance[0].double().numpy())
        assert float(ours[0, row]) < 0.9 * bound


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_constant_blocks(name: str) -> None:
    grid = GRIDS[name]
    w = torch.zeros(1, 3, 256)
    w[0, 1], w[0, 2] = 0.25, -0.25
    params = grid.fit(w, _bits(grid, 1))
    value = grid.dequantize(grid.round(w, params), params)
    assert bool((value[0, 0] == 0).all())
    torch.testing.assert_close(value, w, rtol=0.04 if name == "nvfp4" else 0.02, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_huge_outlier_spoils_no_more_than_its_block(name: str) -> None:
    grid = GRIDS[name]
    w = _weights("normal", shape=(1, 4, 512))
    w[0, 0, 3] = 1e4
    params = grid.fit(w, _bits(grid, 1))
    value = grid.dequantize(grid.round(w, params), params)
    assert bool(value.isfinite().all())
    assert float((value[0, 0, 3] - 1e4).abs()) < (0.2 if name == "mxfp4" else 0.02) * 1e4  # between two powers of two
    if name != "nvfp4":  # whose scale of the whole tensor grows with the outlier
        assert float((value[0, 1:] - w[0, 1:]).norm() / w[0, 1:].norm()) < 0.6
        assert float((value[0, 0, 256:] - w[0, 0, 256:]).norm() / w[0, 0, 256:].norm()) < 0.6


@pytest.mark.parametrize("size", [1e-30, 1e38])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_sizes_give_finite_values(name: str, size: float) -> None:
    grid = GRIDS[name]
    w = _weights("normal", shape=(1, 2, 256)).clamp(-0.2, 0.2) * size
    params = grid.fit(w, _bits(grid, 1))
    assert bool(grid.dequantize(grid.round(w, params), params).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_tiny_blocks_beside_large_ones(name: str) -> None:
    grid = GRIDS[name]
    w = _weights("normal", shape=(1, 4, 512))
    w[0, 0] = torch.where(w[0, 0] > 0, 1.0, -1.0)
    w[0, 1:] *= 1e-6 / 0.05
    params = grid.fit(w, _bits(grid, 1))
    affine = grid.columns(params)
    value = grid.dequantize(grid.round(w, params), params)
    assert bool(value.isfinite().all())
    assert bool(affine.scale.isfinite().all())
    assert float(value[0, 1:].abs().max()) < 1e-5
    if name == "nvfp4":
        assert bool((params.scale > 0).all())
        assert bool((affine.scale > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_dead_columns_do_not_disturb(name: str) -> None:
    grid, w = GRIDS[name], _weights("normal")
    importance = _importance()
    importance[0, :256] = 0
    importance[1] = 0
    params = grid.fit(w, _bits(grid), importance)
    value = grid.dequantize(grid.round(w, params), params)
    assert float((value - w).norm() / w.norm()) < 0.6


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    w = _weights("normal", shape=(1, 2, 96))
    with pytest.raises(ValueError, match=r"q4_k has blocks of 256 weights, which do not divide rows of 96; types that fit: q4_0, q4_1"):
        GRIDS["q4_k"].fit(w, torch.tensor([4]))
    with pytest.raises(ValueError, match="no block type fits; keep the tensor in f16"):
        GRIDS["q4_0"].check(33)
    with pytest.raises(ValueError, match="a row of 64 weights has 36 bytes as q4_0, got 20"):
        GRIDS["q4_0"].unpack(torch.zeros(1, 1, 20, dtype=torch.uint8), 64)


def test_what_cannot_be_fitted_is_refused() -> None:
    w = _weights("normal", shape=(2, 2, 256))
    with pytest.raises(ValueError, match=r"q4_k has 4 bits per code for all experts, asked for \[3, 4\]"):
        GRIDS["q4_k"].fit(w, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="importance is not finite"):
        GRIDS["q4_k"].fit(w, torch.tensor([4, 4]), torch.full((2, 256), torch.nan))
    w[1, 1, 1] = torch.inf
    with pytest.raises(ValueError, match="weights to be put on q4_k are not all finite"):
        GRIDS["q4_k"].fit(w, torch.tensor([4, 4]))


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "iq4_nl", "nvfp4"])
def test_pieces_do_not_change_the_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, w, importance = GRIDS[name], _weights("normal"), _importance()
    whole = grid.fit(w, _bits(grid), importance)
    for budget in (5 * 512, 24 * 512):  # some rows of an expert; a whole expert
        monkeypatch.setattr("moebit.tensor.grids.ggml_grid.PIECE_WEIGHTS", budget)
        _assert_equal(grid.fit(w, _bits(grid), importance), whole)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_the_compiled_sums_are_those_of_the_plain_form(offset: bool, table: bool) -> None:
    if table and offset:
        pytest.skip("no type has a table and an offset")
    x = _weights("normal", shape=(2, 3, 32 * 20)).view(2, 3, 32, 20)
    weight = _importance(shape=(2, 96)).view(2, 3, 32)
    piece = Piece(x, weight, -12, 12, GRIDS["mxfp4"].levels) if table else Piece(x, weight, 0, 15)
    scale = torch.linspace(-0.01, 0.02, 2 * 3 * 20).view(2, 3, 20)
    scale[0, 0, 0] = 0
    shift = torch.full_like(scale, -0.1) if offset else None
    for ours, plain in zip(
        dataclasses.astuple(moments(piece, scale, shift)), dataclasses.astuple(moments_torch(piece, scale, shift)), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["q4_k", "q3_k", "q2_k", "q4_0", "q4_1", "q8_0", "iq4_xs", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_solver_takes_them_as_any_other_grid(name: str, backend: Any) -> None:
    """GPTQ on the frozen scales: what the file decodes to loses less of the output than rounding to nearest, whatever runs inside."""
    grid, draw = GRIDS[name], torch.Generator().manual_seed(7)
    x = torch.randn(2, 600, 40, generator=draw) @ torch.randn(2, 40, 512, generator=draw) + 0.3 * torch.randn(2, 600, 512, generator=draw)
    w = torch.randn(2, 16, 512, generator=draw)
    solved, info = solve_gptq(w, x.mT @ x, grid.bits, grid, backend=backend)
    rounded = solve_rtn(w, grid.bits, grid, importance_EI=x.square().sum(1))
    decoded = ggml.dequantize(grid, grid.pack(solved.codes, solved.params)).view(w.shape)
    if isinstance(solved.params, Nvfp4Params):  # blocks do not hold the scale of the whole tensor
        decoded = decoded * solved.params.tensor_scale[:, None, None]

    def loss(value: Tensor) -> Tensor:
        return (x @ (value - w).mT).double().square().sum((1, 2))

    assert torch.equal(decoded, solved.dequantize())
    assert bool((loss(decoded) < 0.6 * loss(rounded.dequantize())).all())
    torch.testing.assert_close(info.loss.double(), loss(decoded), rtol=1e-3, atol=0)
