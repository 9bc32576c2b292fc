"""Evenly spaced grids for stacked matrices [E, O, I], one bit width per matrix, groups of input channels.

Codes are stored unsigned: a symmetric code q in [-2^(b-1), 2^(b-1) - 1] is kept as q + 2^(b-1) with the constant zero
point 2^(b-1), so that every grid dequantizes as `scale * (code - zero_point)` and one kernel serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.tensor import kernels
from moebit.tensor.grids.base import Affine, Grid, divided, joined_rows

DEQUANTIZE_WEIGHTS = 2**22  # so many at a time: the float32 in between takes four bytes each
FIT_WEIGHTS, DEVICE_FIT_WEIGHTS = 2**22, 2**26  # so many are searched at a time: every candidate's scales are held beside them
# Clipping search: shares of the group's range that are tried, largest first (the first wins ties).
CLIP_RATIOS: tuple[float, ...] = tuple(round(1.0 - 0.05 * step, 2) for step in range(14))


@dataclass(frozen=True)
class UniformParams:
    """Attributes:
    scale: the grid's `scale_dtype` [E, O, G].
    zero_point: uint8 [E, O, G]; 2^(b-1) throughout for symmetric grids.
    """

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class UniformGrid(Grid):
    """An evenly spaced grid; the bit width stands beside it, one per expert.

    Attributes:
        group_size: input channels that share a scale; -1 for the whole row.
        symmetric: zero is the middle code and no zero point is stored.
        signed: symmetric only. The scale takes the sign of the group's largest-magnitude weight, so that this weight sits
            on code -2^(b-1) and all 2^b codes are used; the classic grid leaves that code idle. Matters at 2 and 3 bits.
        scale_dtype: scales are rounded to this type *before* the weights are rounded, so that what is stored is what was solved for.
        ratios: the shares of a group's range that the clipping search tries, falling.
        least_zero: asymmetric only; the least zero point that can be stored.
    """

    group_size: int
    symmetric: bool
    signed: bool = False
    scale_dtype: torch.dtype = torch.float32
    ratios: tuple[float, ...] = CLIP_RATIOS
    least_zero: int = 0

    @property
    def value_dtype(self) -> torch.dtype:
        return self.scale_dtype

    def group_width(self, in_features: int) -> int:
        return divided(self.group_size, in_features)

    @property
    def refits(self) -> bool:
        return True

    @property
    def factored(self) -> tuple[str, ...]:
        return ("scale",)

    def fit(self, w_EOI: Tensor, bits_E: Tensor, importance_EI: Tensor | None = None, search: bool = True) -> UniformParams:
        work = w_EOI.dtype if w_EOI.dtype == torch.float64 else torch.float32
        parts = []
        for rows in _slabs(w_EOI):
            w = w_EOI[:, rows].to(work).contiguous()
            found = search_grid(w, bits_E, self, importance_EI) if search else minmax_grid(w, bits_E, self)
            parts.append(self.stored(*found))
        return joined_rows(parts)  # type: ignore[no-any-return]

    def stored(self, scale: Tensor, zero: Tensor) -> UniformParams:
        """Return the parameters of these scales and zero points [E, O, G]."""
        return UniformParams(scale.to(self.scale_dtype), zero.to(torch.uint8))

    def columns(self, params: UniformParams) -> Affine:
        return Affine(params.scale, params.zero_point)

    def round(self, w_EOI: Tensor, params: UniformParams, bits_E: Tensor) -> Tensor:
        return round_to_grid(w_EOI, params.scale, params.zero_point, bits_E, self)

    def dequantize(self, codes_EOI: Tensor, params: UniformParams, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize(codes_EOI, params.scale, params.zero_point, dtype)


def _slabs(w_EOI: Tensor) -> Iterator[slice]:
    """Rows that are searched at a time."""
    budget = FIT_WEIGHTS if w_EOI.device.type == "cpu" else DEVICE_FIT_WEIGHTS
    step = max(1, budget // max(1, w_EOI.shape[0] * w_EOI.shape[2]))
    yield from (slice(start, start + step) for start in range(0, w_EOI.shape[1], step))


def dequantize(codes_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * (code - zero_point)`, [..., O, I] from groups along the last axis."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    groups = scale_EOG.shape[-1]
    codes, scale, zero = codes_EOI.flatten(0, -2), scale_EOG.flatten(0, -2), zero_EOG.flatten(0, -2)
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, DEQUANTIZE_WEIGHTS // max(1, codes.shape[-1]))
    for rows in (slice(start, start + step) for start in range(0, len(codes), step)):
        piece = codes[rows].unflatten(-1, (groups, -1)).to(work, copy=True)
        piece.sub_(zero[rows].to(work).unsqueeze(-1)).mul_(scale[rows].to(work).unsqueeze(-1))
        result[rows] = piece.flatten(-2)
    return result.view(codes_EOI.shape)


def _grouped(w_EOI: Tensor, grid: UniformGrid) -> Tensor:
    width = grid.group_width(w_EOI.shape[-1])
    return w_EOI.view(*w_EOI.shape[:-1], -1, width)


@dataclass(frozen=True)
class _Range:
    """What a grid is made from, per group [E, O, G]: the range of the weights, or the largest-magnitude weight with its sign."""

    low: Tensor
    high: Tensor
    extreme: Tensor


def _range(w_EOI: Tensor, grid: UniformGrid) -> _Range:
    grouped = _grouped(w_EOI, grid)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return _Range(low, high, torch.where(high >= -low, high, low))


def _grid_of(extent: _Range, ratio: float, bits_E: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """(scale, zero point) [E, O, G], both in the weights' dtype; an all-zero group gets scale 1 and codes that mean 0."""
    bits = bits_E.to(extent.low.dtype)[:, None, None]
    half = torch.exp2(bits - 1)
    if grid.symmetric:
        scale = -ratio * extent.extreme / half if grid.signed else ratio * extent.extreme.abs() / (half - 1)
        scale = scale.to(grid.scale_dtype).to(extent.low.dtype)
        zero = half.expand_as(scale).contiguous()
        return torch.where(scale == 0, torch.ones_like(scale), scale), zero
    levels = torch.exp2(bits) - 1
    scale = (ratio * (extent.high - extent.low) / levels).to(grid.scale_dtype).to(extent.low.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.minimum(torch.round(-ratio * extent.low / scale), levels)
    return _raised(scale, zero, ratio * extent.high, levels, grid) if grid.least_zero else (scale, zero)


def _raised(scale: Tensor, zero: Tensor, high: Tensor, levels: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """(scale, zero point) with zero points of at least `least_zero`; where one is raised, fewer codes cover what is above zero."""
    wider = (high / (levels - grid.least_zero)).to(grid.scale_dtype).to(scale.dtype)
    low = zero < grid.least_zero
    return torch.where(low & (wider > 0), wider, scale), zero.clamp(min=grid.least_zero)


def minmax_grid(w_EOI: Tensor, bits_E: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """The grid that just covers every group's range.

    Args:
        w_EOI: weights, float32 or float64.
        bits_E: int64 [E].

    Returns:
        (scale, zero_point): [E, O, G] in the weights' dtype; the scale already rounded to `grid.scale_dtype`.
    """
    return _grid_of(_range(w_EOI, grid), 1.0, bits_E, grid)


def clipped_grid(w_EOI: Tensor, ratio: float, bits_E: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """The grid that covers a share `ratio` of every group's range; the arguments and the result are those of `minmax_grid`."""
    return _grid_of(_range(w_EOI, grid), ratio, bits_E, grid)


def search_grid(w_EOI: Tensor, bits_E: Tensor, grid: UniformGrid, importance_EI: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per group, the clipped range whose rounding error `sum_j importance_j (Q(w_j) - w_j)^2` is least.

    The grid says which shares of the range are tried; the largest wins ties. The error is weighted with the diagonal of the Hessian,
    as in GPTQ-based quantizers.

    Args:
        importance_EI: non-negative weight of every input channel; None weighs all alike.

    Returns:
        (scale, zero_point): [E, O, G], see `minmax_grid`.
    """
    extent = _range(w_EOI, grid)
    grids = [_grid_of(extent, ratio, bits_E, grid) for ratio in grid.ratios]
    scales = torch.stack([scale for scale, _ in grids])
    zeros = torch.stack([zero for _, zero in grids])
    importance = torch.ones_like(w_EOI[:, 0]) if importance_EI is None else importance_EI.to(w_EOI.dtype)
    qmax = torch.exp2(bits_E.to(w_EOI.dtype)) - 1
    if w_EOI.device.type == "cpu":
        best = kernels.best_grid(w_EOI, scales, zeros, importance, qmax)
    else:
        best = _best_grid(w_EOI, scales, zeros, importance, qmax)
    index = best.unsqueeze(0)
    return scales.gather(0, index)[0], zeros.gather(0, index)[0]


def _best_grid(w_EOI: Tensor, scales: Tensor, zeros: Tensor, importance_EI: Tensor, qmax_E: Tensor) -> Tensor:
    """int64 [E, O, G] index of the best of the candidate grids [R, E, O, G]; the plain form of the compiled kernel."""
    groups = scales.shape[-1]
    w = w_EOI.unflatten(-1, (groups, -1))
    importance = importance_EI.unflatten(-1, (groups, -1))[:, None]
    top = qmax_E[:, None, None, None]
    errors = []
    for scale, zero in zip(scales.unsqueeze(-1), zeros.unsqueeze(-1), strict=True):
        codes = (torch.round(w / scale) + zero).clamp(min=0).minimum(top)
        errors.append(((scale * (codes - zero) - w).square() * importance).sum(-1))
    return torch.stack(errors).argmin(0)


def round_to_grid(w_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor, bits_E: Tensor, grid: UniformGrid) -> Tensor:
    """uint8 codes [E, O, I] of the nearest grid points; ties go to the even code (IEEE round half to even of w / scale)."""
    groups = grid.groups(w_EOI.shape[-1])
    w = w_EOI.unflatten(-1, (groups, -1))
    top = (torch.exp2(bits_E.to(w_EOI.dtype)) - 1)[:, None, None, None]
    codes = torch.round(w / scale_EOG.to(w.dtype).unsqueeze(-1)) + zero_EOG.to(w.dtype).unsqueeze(-1)
    return codes.clamp(min=0).minimum(top).flatten(-2).to(torch.uint8)
