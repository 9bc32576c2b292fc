"""Scales fitted again once the codes are known, group by group.

A solver chooses scales before it rounds, from the weights alone. With the codes fixed, a row's error `R H R^T`, R = w - Q, is quadratic
in its scales; minimised over those of one group at a time,

    s_g += (R H q_g^T) / (q_g H q_g^T),     q_g = code - zero point in group g, zero elsewhere,

with R as the groups before it left it. Codes, zero points and size stay as they are.

Source: an addition of this project to GPTQ (2210.17323): one sweep of coordinate descent on its objective, over scales instead of codes.
Departures from the formula: the new scale is rounded to the type that is stored, and taken only if with it the row's error falls, it is
finite and keeps its sign.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moebit.tensor.grids.base import QTensor
from moebit.tensor.solver import MIN_ROWS, ROW_BYTES


def refit_scales(q: QTensor, w_EOI: Tensor, h_EII: Tensor, usable_E: Tensor | None = None) -> tuple[QTensor, Tensor]:
    """Fit the scales of quantized matrices to the weights they stand for.

    Args:
        w_EOI: weights as they were before rounding. h_EII: second moments of the inputs; any positive multiple gives the same result.
        usable_E: bool; matrices that are to stay as they are have False.

    Returns:
        (the matrices with new scales, by how much their error tr(dW H dW^T) fell [E])

    Raises:
        ValueError: a grid whose scales cannot be changed one by one (tables, scales that are stored as multiples of another).
    """
    if not q.grid.refits:
        raise ValueError(f"the scales of {type(q.grid).__name__} are not fitted again: set solver.refit: false")
    work = torch.float64 if w_EOI.dtype == torch.float64 else torch.float32
    experts, rows, inputs = w_EOI.shape
    step = max(MIN_ROWS, ROW_BYTES // (experts * inputs * work.itemsize))
    h, scale, fallen = h_EII.to(work), q.params.scale.clone(), torch.zeros(experts, dtype=work, device=w_EOI.device)
    for some in (slice(start, start + step) for start in range(0, rows, step)):
        fallen += _refit_rows(q.codes[:, some], scale[:, some], q.params.zero_point[:, some], w_EOI[:, some].to(work), h, usable_E)
    return replace(q, params=replace(q.params, scale=scale)), fallen


def _refit_rows(codes_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor, w_EOI: Tensor, h_EII: Tensor, usable_E: Tensor | None) -> Tensor:
    """Some rows of `refit_scales`, their scales in place; returns [E] by how much the error fell."""
    width, work = w_EOI.shape[2] // scale_EOG.shape[2], w_EOI.dtype
    steps = codes_EOI.to(work) - zero_EOG.to(work).repeat_interleave(width, 2)
    missed = w_EOI - scale_EOG.to(work).repeat_interleave(width, 2) * steps
    fallen = w_EOI.new_zeros(len(w_EOI))
    for g in range(scale_EOG.shape[2]):
        columns = slice(g * width, (g + 1) * width)
        q_g, old = steps[:, :, columns], scale_EOG[:, :, g].to(work)
        pull = (torch.bmm(missed, h_EII[:, :, columns]) * q_g).sum(2)
        curvature = (torch.bmm(q_g, h_EII[:, columns, columns]) * q_g).sum(2)
        new = (old + pull / curvature).to(scale_EOG.dtype)
        change = new.to(work) - old
        gain = change * (2 * pull - change * curvature)  # of a row's error; NaN where a group has no codes but zeros
        good = (curvature > 0) & (gain > 0) & torch.isfinite(new) & (new.sign() == scale_EOG[:, :, g].sign())
        if usable_E is not None:
            good &= usable_E[:, None]
        scale_EOG[:, :, g] = torch.where(good, new, scale_EOG[:, :, g])
        missed[:, :, columns] -= torch.where(good, change, 0.0).unsqueeze(2) * q_g
        fallen += torch.where(good, gain, 0.0).sum(1)
    return fallen
