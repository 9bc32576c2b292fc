"""Rounding solvers for a stack of matrices: round-to-nearest and GPTQ, one batched call for all experts.

GPTQ (2210.17323) in the LDL form: with `H = F D F^T`, F unit upper triangular,
    q_k = Q( w_k + sum_{i<k} (w_i - q_i) F_ik ),
column by column, is the textbook's algorithm without its inverse (QuIP, 2307.13304). The sum over earlier blocks is one matrix
product; inside a block a compiled kernel runs over experts x rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moebit.tensor import kernels
from moebit.tensor.grid import QTensor, QuantScheme, as_bits, minmax_grid, round_to_float8, round_to_grid, search_grid
from moebit.tensor.linalg import damp, factor, fill_dead

MIN_RAISED_DAMPING, MAX_DAMPING = 0.01, 1.0


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


def solve_rtn(
    w_EOI: Tensor, bits: int | Tensor, scheme: QuantScheme, *, importance_EI: Tensor | None = None, clip_search: bool = True
) -> QTensor:
    """Round to nearest on the clipped (or min-max) grid.

    Args:
        w_EOI: weights.
        bits: one width, or int64 [E].
        importance_EI: weighs the clipping error per input channel.
    """
    w = _work(w_EOI)
    if scheme.float8:
        return round_to_float8(w, scheme)
    bits_E = as_bits(bits, w.shape[0], w.device)
    scale, zero = search_grid(w, bits_E, scheme, importance_EI) if clip_search else minmax_grid(w, bits_E, scheme)
    return _qtensor(round_to_grid(w, scale, zero, bits_E, scheme), scale, zero, bits_E, scheme)


def solve_gptq(
    w_EOI: Tensor,
    h_EII: Tensor,
    bits: int | Tensor,
    scheme: QuantScheme,
    *,
    scales: Literal["static", "dynamic"] = "static",
    act_order: bool = True,
    damping: float = 0.01,
    clip_search: bool = True,
    block: int = 128,
    backend: Literal["numba", "torch"] | None = None,
) -> tuple[QTensor, SolveInfo]:
    """GPTQ for E matrices in one call.

    Args:
        w_EOI: weights.
        h_EII: second moments of the inputs; any positive multiple gives the same result.
        bits: one width, or int64 [E].
        scales: `static` from the original weights, before rounding; `dynamic` from each group's columns as updated when its turn comes.
        act_order: columns in the order of descending diag(H); scales stay those of the original groups.
        damping: share of the mean diagonal added to the diagonal.
        clip_search: search the clipping ratio, weighted with diag(H); else min-max.
        block: columns per compiled block (static scales; dynamic ones work group by group).
        backend: `numba` (CPU) or `torch`; None chooses by device.

    Raises:
        ValueError: dynamic scales together with act_order (would need a group index per column), shapes that don't fit,
            a group size that doesn't divide.
    """
    w = _work(w_EOI)
    experts, _, inputs = w.shape
    if h_EII.shape != (experts, inputs, inputs):
        raise ValueError(f"Hessians {tuple(h_EII.shape)} do not belong to weights {tuple(w.shape)}")
    if scales == "dynamic" and act_order:
        raise ValueError("dynamic scales and act_order exclude each other: the groups would need an index per column; use static scales")
    bits_E = as_bits(bits, experts, w.device)
    compiled = (backend or ("numba" if w.device.type == "cpu" else "torch")) == "numba"

    h = h_EII.to(w.dtype)
    importance = fill_dead(h).diagonal(dim1=-2, dim2=-1).nan_to_num().clamp(min=0)
    order = importance.argsort(dim=-1, descending=True, stable=True) if act_order else None
    h = _reordered(h, order)
    f, d, used, ok = _factor(h, damping)

    group_width = scheme.group_width(inputs)
    whole_row = group_width == inputs
    search = search_grid if clip_search else _minmax
    columns = torch.arange(inputs, device=w.device).expand(experts, -1) if order is None else order
    group_EI = (columns // group_width).contiguous()
    if scales == "static" or whole_row:
        scale, zero = search(w, bits_E, scheme, importance)
        grid_of_block = None
    else:
        scale, zero = (w.new_ones(experts, w.shape[1], inputs // group_width) for _ in range(2))
        block, grid_of_block = group_width, search

    ordered = w if order is None else w.gather(2, order.unsqueeze(1).expand_as(w))
    codes = torch.empty(ordered.shape, dtype=torch.uint8, device=w.device)
    error = torch.empty_like(ordered)
    loss = w.new_zeros(w.shape[:2])
    qmax = torch.exp2(bits_E.to(w.dtype)) - 1
    step = kernels.gptq_block if compiled else gptq_block
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        carried = torch.bmm(error[:, :, :start], f[:, :start, start:stop]) if start else w.new_zeros(experts, w.shape[1], stop - start)
        corner = f[:, start:stop, start:stop].contiguous()
        if grid_of_block is not None:
            # METHODS §1: the columns as the textbook would have updated them by now are W_g + (carried) F_gg^-1.
            updated = ordered[:, :, start:stop] + torch.linalg.solve_triangular(corner, carried, upper=True, left=False, unitriangular=True)
            g = start // group_width
            s, z = grid_of_block(updated.contiguous(), bits_E, scheme, importance[:, start:stop].contiguous())
            scale[:, :, g : g + 1], zero[:, :, g : g + 1] = s, z
        step(ordered, carried, corner, d, scale, zero, group_EI, qmax, start, codes, error, loss)

    info = SolveInfo(_undamped_loss(loss.sum(1), error, h, used, ok), used, ~ok)
    if order is not None:
        codes = torch.empty_like(codes).scatter_(2, order.unsqueeze(1).expand_as(codes), codes)
    return _qtensor(codes, scale, zero, bits_E, scheme), info


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
) -> None:
    """`kernels.gptq_block` in plain torch: any device, the same arguments and results."""
    width = carried_EOB.shape[2]
    target = carried_EOB + w_EOI[:, :, start : start + width]
    top = qmax_E[:, None]
    for k in range(width):
        column = start + k
        index = group_EI[:, column, None, None].expand(-1, w_EOI.shape[1], 1)
        s, z = scale_EOG.gather(2, index)[..., 0], zero_EOG.gather(2, index)[..., 0]
        code = (torch.round(target[:, :, k] / s) + z).clamp(min=0).minimum(top)
        value = s * (code - z)
        loss_EO += d_EI[:, column, None] * (target[:, :, k] - value).square()
        missed = w_EOI[:, :, column] - value
        codes_EOI[:, :, column] = code.to(torch.uint8)
        error_EOI[:, :, column] = missed
        target[:, :, k + 1 :] += missed.unsqueeze(-1) * f_EBB[:, k, None, k + 1 :]


def _factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(F, D, damping used [E], ok [E]): damping rises tenfold, up to 1, for the matrices that fail; the others keep theirs."""
    used = h.new_full((h.shape[0],), damping)
    f, d, ok = factor(damp(h, used))
    failed = (~ok).nonzero()[:, 0]
    while len(failed) and float(used[failed[0]]) < MAX_DAMPING:
        used[failed] = (used[failed] * 10).clamp(min=MIN_RAISED_DAMPING, max=MAX_DAMPING)
        f_again, d_again, ok_again = factor(damp(h[failed], used[failed]))
        f[failed], d[failed], ok[failed] = f_again, d_again, ok_again
        failed = failed[~ok_again]
    return f, d, used, ok


def _undamped_loss(damped: Tensor, error: Tensor, h: Tensor, used: Tensor, ok: Tensor) -> Tensor:
    """tr(dW H dW^T) from the damped loss that the solver adds up on its way: what the damping added is known exactly."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    live = diagonal != 0
    mean = torch.where(live.any(-1), diagonal.sum(-1) / live.sum(-1).clamp(min=1), torch.ones_like(diagonal[:, 0]))
    squared = error.square().sum(1)
    added = mean * (used * squared.sum(-1) + (squared * ~live).sum(-1))
    loss = (damped - added).clamp(min=0)
    if not bool(ok.all()):
        bad = ~ok
        loss[bad] = torch.einsum("eoi,eij,eoj->e", error[bad], h[bad], error[bad])
    return loss


def _minmax(w: Tensor, bits: Tensor, scheme: QuantScheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return minmax_grid(w, bits, scheme)


def _reordered(h: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return h
    rows = h.gather(1, order.unsqueeze(2).expand_as(h))
    return rows.gather(2, order.unsqueeze(1).expand_as(h))


def _work(w: Tensor) -> Tensor:
    if w.ndim != 3:
        raise ValueError(f"weights must be a stack [E, out, in], got shape {tuple(w.shape)}")
    return (w if w.dtype in (torch.float32, torch.float64) else w.float()).contiguous()


def _qtensor(codes: Tensor, scale: Tensor, zero: Tensor, bits: Tensor, scheme: QuantScheme) -> QTensor:
    return QTensor(codes, scale.to(scheme.scale_dtype), zero.to(torch.uint8), bits, scheme)
