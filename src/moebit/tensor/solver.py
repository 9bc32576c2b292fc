"""Rounding solvers for a stack of matrices: round-to-nearest and GPTQ, one batched call for all experts.

GPTQ (2210.17323) in the LDL form: with `H = F D F^T`, F unit upper triangular,
    q_k = Q( w_k + sum_{i<k} (w_i - q_i) F_ik ),
column by column, is the textbook's algorithm without its inverse (QuIP, 2307.13304). The sum over earlier blocks is one matrix
product; inside a block a compiled kernel runs over experts x rows: numba's on a CPU, Triton's on CUDA.

Columns are kept in reverse solving order throughout, the last one is solved first: then F is the plain lower triangular factor of the
reordered Hessian, which is made in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moebit.tensor import kernels
from moebit.tensor.grids.base import Affine, Grid, QTensor, as_bits, rows_of
from moebit.tensor.grids.uniform import UniformGrid
from moebit.tensor.linalg import damp_, factor_, filled_diagonal, live_mean

MIN_RAISED_DAMPING, MAX_DAMPING = 0.01, 1.0
REORDER_ROWS = 1024
MIN_ROWS = 128
# Rows are independent of each other: so many bytes of them are worked on at a time, in a CPU's caches, and so that a GPU has enough to do.
ROW_BYTES, DEVICE_ROW_BYTES = 16 * 2**20, 256 * 2**20

Backend = Literal["numba", "torch", "triton"]


@dataclass(frozen=True)
class SolveInfo:
    """What happened, per matrix.

    Attributes:
        loss: tr(dW H dW^T) with the Hessian as given (undamped), [E].
        damping: the damping that was used, [E]; raised tenfold up to 1.0 where the factorisation failed.
        fallback: bool [E]: no damping helped and the matrix was rounded to nearest.
    """

    loss: Tensor
    damping: Tensor
    fallback: Tensor


def solve_rtn(w_EOI: Tensor, bits: int | Tensor, grid: Grid, *, importance_EI: Tensor | None = None, clip_search: bool = True) -> QTensor:
    """Round to nearest on a grid of searched (or covering) ranges.

    Args:
        w_EOI: weights.
        bits: one width, or int64 [E].
        grid: which numbers the weights may become.
        importance_EI: weighs the error per input channel when ranges are searched.
        clip_search: search the ranges; else cover all weights.
    """
    bits_E = as_bits(bits, _experts(w_EOI), w_EOI.device)
    params = grid.fit(w_EOI, bits_E, importance_EI, clip_search)
    codes, start = [], 0
    for w in _rows_of(w_EOI):
        codes.append(grid.round(w, rows_of(params, slice(start, start + w.shape[1])), bits_E))
        start += w.shape[1]
    return QTensor(torch.cat(codes, 1) if len(codes) > 1 else codes[0], params, bits_E, grid)


def solve_gptq(
    w_EOI: Tensor,
    h_EII: Tensor,
    bits: int | Tensor,
    grid: Grid,
    *,
    scales: Literal["static", "dynamic"] = "static",
    act_order: bool = True,
    damping: float = 0.01,
    clip_search: bool = True,
    block: int = 128,
    backend: Backend | None = None,
) -> tuple[QTensor, SolveInfo]:
    """GPTQ for E matrices in one call.

    Args:
        w_EOI: weights.
        h_EII: second moments of the inputs; any positive multiple gives the same result.
        bits: one width, or int64 [E].
        grid: which numbers the weights may become.
        scales: `static` from the original weights, before rounding; `dynamic` from each group's columns as updated when its turn comes.
        act_order: columns in the order of descending diag(H); scales stay those of the original groups.
        damping: share of the mean diagonal added to the diagonal.
        clip_search: search the clipping ratio, weighted with diag(H); else min-max.
        block: columns per compiled block (static scales; dynamic ones work group by group).
        backend: what runs inside a block, `numba` (CPU), `triton` (CUDA) or `torch`; None takes `backend_of`'s.

    Raises:
        ValueError: dynamic scales together with act_order (would need a group index per column) or on a grid that is not uniform,
            shapes that don't fit, a group size that doesn't divide.
    """
    experts, inputs = _experts(w_EOI), w_EOI.shape[-1]
    if h_EII.shape != (experts, inputs, inputs):
        raise ValueError(f"Hessians {tuple(h_EII.shape)} do not belong to weights {tuple(w_EOI.shape)}")
    if scales == "dynamic" and act_order:
        raise ValueError("dynamic scales and act_order exclude each other: the groups would need an index per column; use static scales")
    work = torch.float64 if w_EOI.dtype == torch.float64 else torch.float32
    bits_E = as_bits(bits, experts, w_EOI.device)
    group_width = grid.group_width(inputs)
    dynamic = scales == "dynamic" and group_width != inputs
    if dynamic and not isinstance(grid, UniformGrid):
        raise ValueError(f"scales: dynamic takes a grid of integers, not {type(grid).__name__}; use static scales")
    h = h_EII.to(work)
    importance = filled_diagonal(h).nan_to_num().clamp(min=0)
    order = _reverse_order(importance, act_order)
    f, d, used, ok = _factor(h, order, damping)
    params = None if dynamic else grid.fit(w_EOI, bits_E, importance, clip_search)
    general = grid.levels is not None or (params is not None and grid.columns(params).offset is not None)
    problem = _Problem(
        f,
        d,
        order,
        (order // group_width).contiguous(),
        importance,
        bits_E,
        grid.qmax(bits_E, work),
        grid,
        clip_search,
        block,
        _step(backend or backend_of(w_EOI.device), general),
    )
    codes: list[Tensor] = []
    found: list[Affine] = []
    damped_loss, squared, failed_loss = torch.zeros_like(d[:, 0]), torch.zeros_like(d), torch.zeros_like(d[:, 0])
    for w in _rows_of(w_EOI):
        start = sum(part.shape[1] for part in codes)
        mine = None if params is None else rows_of(params, slice(start, start + w.shape[1]))
        some, affine, loss, error = _solve_rows(problem, w, None if mine is None else grid.columns(mine))
        codes.append(some)
        found.append(affine)
        damped_loss += loss.sum(1)
        squared += error.square().sum(1)
        failed_loss[~ok] += _direct_loss(error[~ok], h[~ok], order[~ok])
    info = SolveInfo(torch.where(ok, _undamped(damped_loss, squared, h, order, used), failed_loss), used, ~ok)
    if params is None:
        assert isinstance(grid, UniformGrid)
        params = grid.stored(torch.cat([part.scale for part in found], 1), torch.cat([part.zero for part in found], 1))
    return QTensor(torch.cat(codes, 1) if len(codes) > 1 else codes[0], params, bits_E, grid), info


def backend_of(device: torch.device) -> Backend:
    """What runs inside a block where nobody says: numba on a CPU; on other devices Triton where it is installed, else plain torch."""
    if device.type == "cpu":
        return "numba"
    return "triton" if importlib.util.find_spec("triton") else "torch"


def _step(backend: Backend, general: bool) -> Callable[..., None]:
    """What runs inside a block; Triton has a kernel for plain integers only, tables and offsets run in torch there."""
    if general:
        return kernels.gptq_block_general if backend == "numba" else gptq_block
    if backend == "triton":
        from moebit.tensor import triton_kernels  # not everyone has Triton, and importing it takes time

        return triton_kernels.gptq_block
    return kernels.gptq_block if backend == "numba" else gptq_block


@dataclass(frozen=True)
class _Problem:
    """What all rows of a stack of matrices have in common; columns in reverse solving order.

    Attributes:
        f, d: the factor below its diagonal, and D. order: int64 [E, N] original column of every position. group: [E, N] scale group.
        importance: [E, N] diagonal of the Hessian by original column.
    """

    f: Tensor
    d: Tensor
    order: Tensor
    group: Tensor
    importance: Tensor
    bits: Tensor
    qmax: Tensor
    grid: Grid
    clip_search: bool
    block: int
    step: Callable[..., None]


def _solve_rows(p: _Problem, w_EOI: Tensor, affine: Affine | None) -> tuple[Tensor, Affine, Tensor, Tensor]:
    """(codes in the original order of columns, what their scales were, loss [E, O], error [E, O, N] in the solver's order) of some rows.

    Args:
        affine: fixed scales; None takes each group's from its columns as updated when its turn comes.
    """
    experts, rows, inputs = w_EOI.shape
    groups, dynamic = p.grid.groups(inputs), affine is None
    if affine is None:
        affine = Affine(w_EOI.new_ones(experts, rows, groups), w_EOI.new_ones(experts, rows, groups))
    affine = _as_type(affine, w_EOI.dtype)
    levels = p.grid.levels
    index = p.order.unsqueeze(1).expand_as(w_EOI)
    w = w_EOI.gather(2, index)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    error, loss = torch.empty_like(w), w.new_zeros(w.shape[:2])
    block = inputs // groups if dynamic else p.block
    for stop in range(inputs, 0, -block):
        start = max(0, stop - block)
        if stop < inputs:
            carried = torch.bmm(error[:, :, stop:], p.f[:, stop:, start:stop])
        else:
            carried = w.new_zeros(experts, rows, stop - start)
        corner = p.f[:, start:stop, start:stop].contiguous()
        if dynamic:
            # The columns as the textbook would have updated them by now are W_g + (carried) F_gg^-1.
            updated = w[:, :, start:stop] + torch.linalg.solve_triangular(corner, carried, upper=False, left=False, unitriangular=True)
            g = (inputs - stop) // block
            importance = p.importance.gather(1, p.order[:, start:stop])
            mine = p.grid.columns(p.grid.fit(updated.contiguous(), p.bits, importance.contiguous(), p.clip_search))
            affine.scale[:, :, g : g + 1], affine.zero[:, :, g : g + 1] = mine.scale, mine.zero
        further = () if levels is None and affine.offset is None else (affine.offset, levels)
        p.step(w, carried, corner, p.d, affine.scale, affine.zero, p.group, p.qmax, start, codes, error, loss, *further)
    return torch.empty_like(codes).scatter_(2, index, codes), affine, loss, error


def _as_type(affine: Affine, dtype: torch.dtype) -> Affine:
    offset = None if affine.offset is None else affine.offset.to(dtype).contiguous()
    return Affine(affine.scale.to(dtype).contiguous(), affine.zero.to(dtype).contiguous(), offset)


def gptq_block(
    w_EOI: Tensor,
    carried_EOB: Tensor,
    f_EBB: Tensor,
    d_EI: Tensor,
    scale_EOG: Tensor,
    zero_EOG: Tensor,
    group_EI: Tensor,
    qmax_E: Tensor,
    start: int,
    codes_EOI: Tensor,
    error_EOI: Tensor,
    loss_EO: Tensor,
    offset_EOG: Tensor | None = None,
    levels_L: Tensor | None = None,
) -> None:
    """Do what `kernels.gptq_block` and `kernels.gptq_block_general` do, in plain torch on any device."""
    width = carried_EOB.shape[2]
    target = carried_EOB + w_EOI[:, :, start : start + width]
    top = qmax_E[:, None]
    for k in range(width - 1, -1, -1):
        column = start + k
        index = group_EI[:, column, None, None].expand(-1, w_EOI.shape[1], 1)
        s, z = scale_EOG.gather(2, index)[..., 0], zero_EOG.gather(2, index)[..., 0]
        o = None if offset_EOG is None else offset_EOG.gather(2, index)[..., 0]
        code, value = _nearest(target[:, :, k], s, z, o, levels_L, top)
        loss_EO += d_EI[:, column, None] * (target[:, :, k] - value).square()
        missed = w_EOI[:, :, column] - value
        codes_EOI[:, :, column] = code.to(torch.uint8)
        error_EOI[:, :, column] = missed
        target[:, :, :k] += missed.unsqueeze(-1) * f_EBB[:, k, None, :k]


def _nearest(x: Tensor, s: Tensor, z: Tensor, o: Tensor | None, levels: Tensor | None, top: Tensor) -> tuple[Tensor, Tensor]:
    """(code, value) nearest to x; a scale of 0 has one value only."""
    if o is None and levels is None:
        code = (torch.round(x / s) + z).clamp(min=0).minimum(top)
        return code, s * (code - z)
    ratio = torch.where(s == 0, 0.0, (x if o is None else x - o) / torch.where(s == 0, 1.0, s))
    if levels is None:
        code = (torch.round(ratio) + z).clamp(min=0).minimum(top)
        steps = code - z
    else:
        table = levels.to(x.dtype).to(x.device)
        code = torch.bucketize(ratio, (table[1:] + table[:-1]) / 2, right=True)
        steps = table[code]
    return code, s * steps if o is None else s * steps + o


def _reverse_order(importance_EN: Tensor, act_order: bool) -> Tensor:
    """int64 [E, N]: the original column at every position; the column that is solved first stands last."""
    if act_order:
        return importance_EN.argsort(dim=-1, descending=True, stable=True).flip(-1)
    return torch.arange(importance_EN.shape[1] - 1, -1, -1, device=importance_EN.device).expand_as(importance_EN).contiguous()


def _factor(h_ENN: Tensor, order_EN: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(F, D, damping used [E], ok [E]) of the reordered Hessians: damping rises tenfold, up to 1, for those that fail."""
    used = h_ENN.new_full((h_ENN.shape[0],), damping)
    f = damp_(_reordered(h_ENN, order_EN), used)
    d, ok = factor_(f)
    failed = (~ok).nonzero()[:, 0]
    while len(failed) and float(used[failed[0]]) < MAX_DAMPING:
        used[failed] = (used[failed] * 10).clamp(min=MIN_RAISED_DAMPING, max=MAX_DAMPING)
        again = damp_(_reordered(h_ENN[failed], order_EN[failed]), used[failed])
        d_again, ok_again = factor_(again)
        f[failed], d[failed], ok[failed] = again, d_again, ok_again
        failed = failed[~ok_again]
    return f, d, used, ok


def _reordered(h_ENN: Tensor, order_EN: Tensor) -> Tensor:
    """A copy with rows and columns in another order, made without a second full-size copy."""
    result = torch.empty_like(h_ENN)
    for h, order, target in zip(h_ENN, order_EN, result, strict=True):
        for low in range(0, len(order), REORDER_ROWS):
            torch.index_select(h[order[low : low + REORDER_ROWS]], 1, order, out=target[low : low + REORDER_ROWS])
    return result


def _undamped(damped_E: Tensor, squared_EN: Tensor, h_ENN: Tensor, order_EN: Tensor, used_E: Tensor) -> Tensor:
    """tr(dW H dW^T) from the damped loss that the solver adds up on its way: what the damping added is known exactly.

    Args:
        squared_EN: sum of squared errors by column, in the solver's order.
    """
    dead = h_ENN.diagonal(dim1=-2, dim2=-1).gather(1, order_EN) == 0
    added = live_mean(h_ENN) * (used_E * squared_EN.sum(-1) + (squared_EN * dead).sum(-1))
    return (damped_E - added).clamp(min=0)


def _direct_loss(error_EON: Tensor, h_ENN: Tensor, order_EN: Tensor) -> Tensor:
    """Loss of matrices that have no factorisation, `sum E H E^T` by its definition."""
    h = _reordered(h_ENN, order_EN)
    return torch.einsum("eoi,eij,eoj->e", error_EON, h, error_EON)


def _experts(w_EOI: Tensor) -> int:
    if w_EOI.ndim != 3:
        raise ValueError(f"weights must be a stack [E, out, in], got shape {tuple(w_EOI.shape)}")
    return w_EOI.shape[0]


def _rows_of(w_EOI: Tensor) -> Iterator[Tensor]:
    """All rows, in the type that solvers compute in, as many at a time as `ROW_BYTES` holds."""
    work = torch.float64 if w_EOI.dtype == torch.float64 else torch.float32
    at_once = ROW_BYTES if w_EOI.device.type == "cpu" else DEVICE_ROW_BYTES
    step = max(MIN_ROWS, at_once // (w_EOI.shape[0] * w_EOI.shape[2] * work.itemsize))
    for start in range(0, w_EOI.shape[1], step):
        yield w_EOI[:, start : start + step].to(work).contiguous()
