"""Sums over the weights of a group that all fits of ggml's blocks are made from, compiled for CPUs and in plain torch.

Weights lie with the rows last, [E, G, W, R] (experts, groups, columns of a group, rows), so that sums run over columns while rows lie side
by side: every row's sum keeps its order, and the inner loop vectorizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from moebit.tensor.kernels import follow_torch


@dataclass(frozen=True)
class Piece:
    """Some rows of a stack of matrices, with what their codes can mean.

    Attributes:
        x: weights [E, G, W, R], float32.
        weight: how much an error in a column counts, [E, G, W]; positive somewhere in every group.
        low, high: the smallest and the largest level.
        table: sorted levels, whole numbers as float32, or None where all integers from `low` to `high` are levels.
    """

    x: Tensor
    weight: Tensor
    low: int
    high: int
    table: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Sum of the weights of a group, [E, G, 1]."""
        return self.weight.sum(-1, keepdim=True)

    @property
    def codes(self) -> int:
        """The largest code."""
        return self.high - self.low if self.table is None else len(self.table) - 1


@dataclass(frozen=True)
class Moments:
    """Weighted sums per group, [E, G, R], of the levels q nearest to (x - offset) / scale and of what they leave, r = x - scale q - offset.

    Errors are made from r, not from x, because differences of sums of squares of x would cancel in float32.

    Attributes:
        q, qq: sums of w q and w q^2. r, rq, rr: sums of w r, w r q and w r^2. Without an offset q and r are zero.
    """

    q: Tensor
    qq: Tensor
    r: Tensor
    rq: Tensor
    rr: Tensor


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _moments(x: Any, weight: Any, scale: Any, offset: Any, low: Any, high: Any, lookup: Any, out: Any) -> None:
    experts, groups, width, rows = x.shape
    shifted = offset.shape[2] == rows
    tabled = lookup.shape[0] > 0
    two = np.float32(2)
    for flat in numba.prange(experts * groups):
        e, g = flat // groups, flat % groups
        s = scale[e, g]
        inverse, q, o = np.zeros(rows, dtype=x.dtype), np.zeros(rows, dtype=x.dtype), np.zeros(rows, dtype=x.dtype)
        sums = np.zeros((5, rows), dtype=x.dtype)
        for k in range(rows):
            inverse[k] = 1 / s[k] if abs(s[k]) > 1e-36 else 0
        if shifted:
            o[:] = offset[e, g]
        for j in range(width):
            w, column = weight[e, g, j], x[e, g, j]
            if tabled:
                for k in range(rows):
                    y = min(max(column[k] * inverse[k], low), high)
                    q[k] = lookup[np.int32(np.floor(two * (y - low)))]
            else:
                for k in range(rows):
                    q[k] = min(max(np.rint((column[k] - o[k]) * inverse[k]), low), high)
            for k in range(rows):
                left = column[k] - s[k] * q[k] - o[k]
                sums[1, k] += w * q[k] * q[k]
                sums[3, k] += w * left * q[k]
                sums[4, k] += w * left * left
            if shifted:
                for k in range(rows):
                    left = column[k] - s[k] * q[k] - o[k]
                    sums[0, k] += w * q[k]
                    sums[2, k] += w * left
        out[:, e, g] = sums


def moments(piece: Piece, scale_EGR: Tensor, offset_EGR: Tensor | None) -> Moments:
    """The sums for these scales and offsets (None where the type has no offset); compiled on a CPU."""
    if piece.x.device.type != "cpu":
        return moments_torch(piece, scale_EGR, offset_EGR)
    follow_torch()
    out = torch.empty(5, *scale_EGR.shape)
    offset = scale_EGR.new_empty(*scale_EGR.shape[:2], 0) if offset_EGR is None else offset_EGR
    arrays = [t.contiguous().numpy() for t in (piece.x, piece.weight, scale_EGR, offset)]
    _moments(*arrays, np.float32(piece.low), np.float32(piece.high), _lookup(piece), out.numpy())
    return Moments(*out)


def moments_torch(piece: Piece, scale_EGR: Tensor, offset_EGR: Tensor | None) -> Moments:
    """`moments` in plain torch: any device, the same arguments and results."""
    scale, w = scale_EGR.unsqueeze(2), piece.weight.unsqueeze(-1)
    offset = torch.zeros_like(scale) if offset_EGR is None else offset_EGR.unsqueeze(2)
    target = (piece.x - offset) * inverse(scale)
    if piece.table is None:
        q = target.round_().clamp_(piece.low, piece.high)
    else:
        q = piece.table[nearest(target, piece.table)]
    left = piece.x - scale * q - offset
    sums = [(w * q).sum(2), (w * q * q).sum(2), (w * left).sum(2), (w * left * q).sum(2), (w * left * left).sum(2)]
    if offset_EGR is None:
        sums[0], sums[2] = torch.zeros_like(sums[0]), torch.zeros_like(sums[2])
    return Moments(*sums)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or so small that the inverse would overflow."""
    return torch.where(scale.abs() > 1e-36, 1 / scale, 0.0)


def nearest(target: Tensor, table: Tensor) -> Tensor:
    """int64 index of the level that is nearest; the upper one of two that are equally near."""
    return torch.bucketize(target, (table[1:] + table[:-1]) / 2, right=True)


def _lookup(piece: Piece) -> Any:
    """float32 level by twice the distance from the lowest one, rounded down: levels are whole, so their middles are halves."""
    if piece.table is None:
        return np.zeros(0, dtype=np.float32)
    positions = piece.low + torch.arange(2 * (piece.high - piece.low) + 1) / 2
    return piece.table[nearest(positions, piece.table)].numpy()
