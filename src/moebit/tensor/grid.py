"""Uniform quantization grids for stacked matrices [E, O, I], one bit width per matrix, groups of input channels.

Codes are stored unsigned: a symmetric code q in [-2^(b-1), 2^(b-1) - 1] is kept as q + 2^(b-1) with the constant zero
point 2^(b-1), so that every grid dequantizes as `scale * (code - zero_point)` and one kernel serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.tensor import kernels

FLOAT8 = torch.float8_e4m3fn
DEQUANTIZE_WEIGHTS = 2**22  # so many at a time: the float32 in between takes four bytes each
# Clipping search: shares of the group's range that are tried, largest first (the first wins ties).
CLIP_RATIOS: tuple[float, ...] = tuple(round(1.0 - 0.05 * step, 2) for step in range(14))


@dataclass(frozen=True)
class QuantScheme:
    """How a matrix is put on a grid; the bit width stands beside it, one per expert.

    Attributes:
        group_size: input channels that share a scale; -1 for the whole row.
        symmetric: zero is the middle code and no zero point is stored.
        signed: symmetric only. The scale takes the sign of the group's largest-magnitude weight, so that this weight sits
            on code -2^(b-1) and all 2^b codes are used; the classic grid leaves that code idle. Matters at 2 and 3 bits.
        scale_dtype: scales are rounded to this type *before* the weights are rounded, so that what is stored is what was solved for.
        float8: the codes are float8 e4m3 numbers (their bytes) instead of integers; 8 bits, symmetric.
    """

    group_size: int
    symmetric: bool
    signed: bool = False
    scale_dtype: torch.dtype = torch.float32
    float8: bool = False

    def group_width(self, in_features: int) -> int:
        """Input channels per group of a matrix with `in_features` inputs.

        Raises:
            ValueError: the group size does not divide the input size.
        """
        if self.group_size == -1:
            return in_features
        if self.group_size <= 0 or in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features} input channels")
        return self.group_size

    def groups(self, in_features: int) -> int:
        """Scales per output row."""
        return in_features // self.group_width(in_features)


@dataclass(frozen=True)
class QTensor:
    """A stack of quantized matrices.

    Attributes:
        codes: uint8 [E, O, I], unsigned.
        scale: `scheme.scale_dtype` [E, O, G].
        zero_point: uint8 [E, O, G]; 2^(b-1) throughout for symmetric grids.
        bits: int64 [E].
        scheme: the grid's scheme.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    scheme: QuantScheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E, O, I] weights, computed in float32 (float64 if asked for) and rounded once to `dtype`."""
        if self.scheme.float8:
            numbers = self.codes.view(FLOAT8).to(torch.float64 if dtype == torch.float64 else torch.float32)
            return dequantize(numbers, self.scale, torch.zeros_like(self.zero_point), dtype)
        return dequantize(self.codes, self.scale, self.zero_point, dtype)


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


def as_bits(bits: int | Tensor, experts: int, device: torch.device | None = None) -> Tensor:
    """int64 [E] bit widths from one width or one per expert.

    Raises:
        ValueError: a width outside 2..8, or the wrong number of them.
    """
    result = torch.full((experts,), bits, dtype=torch.int64) if isinstance(bits, int) else bits.to(torch.int64)
    if result.shape != (experts,):
        raise ValueError(f"{tuple(result.shape)} bit widths for {experts} experts")
    if bool(((result < 2) | (result > 8)).any()):
        raise ValueError(f"bit widths must lie between 2 and 8, got {sorted(set(result.tolist()))}")
    return result.to(device) if device is not None else result


def _grouped(w_EOI: Tensor, scheme: QuantScheme) -> Tensor:
    width = scheme.group_width(w_EOI.shape[-1])
    return w_EOI.view(*w_EOI.shape[:-1], -1, width)


@dataclass(frozen=True)
class _Range:
    """What a grid is made from, per group [E, O, G]: the range of the weights, or the largest-magnitude weight with its sign."""

    low: Tensor
    high: Tensor
    extreme: Tensor


def _range(w_EOI: Tensor, scheme: QuantScheme) -> _Range:
    grouped = _grouped(w_EOI, scheme)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return _Range(low, high, torch.where(high >= -low, high, low))


def _grid_of(extent: _Range, ratio: float, bits_E: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """(scale, zero point) [E, O, G], both in the weights' dtype; an all-zero group gets scale 1 and codes that mean 0."""
    bits = bits_E.to(extent.low.dtype)[:, None, None]
    half = torch.exp2(bits - 1)
    if scheme.symmetric:
        scale = -ratio * extent.extreme / half if scheme.signed else ratio * extent.extreme.abs() / (half - 1)
        scale = scale.to(scheme.scale_dtype).to(extent.low.dtype)
        zero = half.expand_as(scale).contiguous()
        return torch.where(scale == 0, torch.ones_like(scale), scale), zero
    levels = torch.exp2(bits) - 1
    scale = (ratio * (extent.high - extent.low) / levels).to(scheme.scale_dtype).to(extent.low.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.minimum(torch.round(-ratio * extent.low / scale), levels)
    return scale, zero


def minmax_grid(w_EOI: Tensor, bits_E: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The grid that just covers every group's range.

    Args:
        w_EOI: weights, float32 or float64.
        bits_E: int64 [E].

    Returns:
        (scale, zero_point): [E, O, G] in the weights' dtype; the scale already rounded to `scheme.scale_dtype`.
    """
    return _grid_of(_range(w_EOI, scheme), 1.0, bits_E, scheme)


def clipped_grid(w_EOI: Tensor, ratio: float, bits_E: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The grid that covers a share `ratio` of every group's range; arguments and result as `minmax_grid`."""
    return _grid_of(_range(w_EOI, scheme), ratio, bits_E, scheme)


def search_grid(w_EOI: Tensor, bits_E: Tensor, scheme: QuantScheme, importance_EI: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per group, the clipped range whose rounding error `sum_j importance_j (Q(w_j) - w_j)^2` is least.

    Ratios 1.00, 0.95 … 0.35 of the range; the largest wins ties. METHODS: clipping search as in GPTQ-based MoE quantizers,
    weighted with the diagonal of the Hessian.

    Args:
        importance_EI: non-negative weight of every input channel; None weighs all alike.

    Returns:
        As `minmax_grid`.
    """
    extent = _range(w_EOI, scheme)
    grids = [_grid_of(extent, ratio, bits_E, scheme) for ratio in CLIP_RATIOS]
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


def round_to_grid(w_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor, bits_E: Tensor, scheme: QuantScheme) -> Tensor:
    """uint8 codes [E, O, I] of the nearest grid points; ties go to the even code (IEEE round half to even of w / scale)."""
    groups = scheme.groups(w_EOI.shape[-1])
    w = w_EOI.unflatten(-1, (groups, -1))
    top = (torch.exp2(bits_E.to(w_EOI.dtype)) - 1)[:, None, None, None]
    codes = torch.round(w / scale_EOG.to(w.dtype).unsqueeze(-1)) + zero_EOG.to(w.dtype).unsqueeze(-1)
    return codes.clamp(min=0).minimum(top).flatten(-2).to(torch.uint8)


def round_to_float8(w_EOI: Tensor, scheme: QuantScheme) -> QTensor:
    """Round to nearest on float8 e4m3, the group's largest magnitude on its largest number (448); an all-zero group gets scale 1.

    A float's steps grow with its size, so that clipping the range gains nothing there and is not searched for.
    """
    largest = torch.finfo(FLOAT8).max
    groups = _grouped(w_EOI, scheme)
    scale = (groups.abs().amax(-1) / largest).to(scheme.scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (groups / scale.to(w_EOI.dtype).unsqueeze(-1)).clamp(-largest, largest).to(FLOAT8)
    zero = torch.zeros(scale.shape, dtype=torch.uint8, device=w_EOI.device)
    bits = torch.full((w_EOI.shape[0],), 8, dtype=torch.int64, device=w_EOI.device)
    return QTensor(codes.view(torch.uint8).flatten(-2), scale, zero, bits, scheme)
