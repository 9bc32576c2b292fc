"""Routed experts through which gradients flow: to the inputs and the affinities, and to the weights where they are wanted.

`model/experts.py` multiplies ragged groups into memory that is there already, which autograd cannot follow. Here the same products have
their backward written beside them. Shape suffixes: C experts, S routed slots, I inputs, O outputs, H hidden.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moebit.model.experts import ExpertWeights, grouped_linear
from moebit.tensor.row_rounding import Rounding


class GroupedLinear(torch.autograd.Function):
    """`grouped_linear` with a backward: rows [bounds[c], bounds[c + 1]) times matrix c."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, w_COI: Tensor, bias_CO: Tensor | None, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(x_SI, w_COI)
        ctx.bounds, ctx.bias = bounds, bias_CO is not None
        return grouped_linear(x_SI, w_COI, bias_CO, bounds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_SI, w_COI = ctx.saved_tensors
        gradient_SO, bounds = gradients[0].contiguous(), ctx.bounds
        to_x = grouped_linear(gradient_SO, w_COI.transpose(1, 2), None, bounds) if ctx.needs_input_grad[0] else None
        to_w = to_bias = None
        if ctx.needs_input_grad[1]:
            to_w = torch.zeros_like(w_COI)
            for c, (low, high) in enumerate(pairwise(bounds)):
                if low < high:
                    torch.mm(gradient_SO[low:high].T, x_SI[low:high], out=to_w[c])
        if ctx.bias and ctx.needs_input_grad[2]:
            expert_S = torch.arange(len(w_COI), device=x_SI.device).repeat_interleave(torch.tensor(bounds, device=x_SI.device).diff())
            to_bias = gradient_SO.new_zeros(len(w_COI), gradient_SO.shape[1]).index_add_(0, expert_S, gradient_SO)
        return to_x, to_w, to_bias, None


def past_rounding(x: Tensor, rounding: Rounding) -> Tensor:
    """Rounded inputs, past whose rounding the gradient goes as if it were not there (straight-through; Bengio et al., 2013, 1308.3432)."""
    return x + (rounding(x.detach()) - x.detach())


def experts_output(
    module: Any, x_SH: Tensor, affinity_S: Tensor, weights: ExpertWeights, bounds: list[int], rounding: Rounding | None = None
) -> Tensor:
    """Return [S, H], what experts answer to routed slots sorted by expert, scaled by the affinities; differentiable.

    Args:
        module: the experts module, for its gating and for a norm behind the experts.
        x_SH: the slots' inputs.
        affinity_S: the weights with which the answers enter the layer's output.
        weights: of the experts, [C, ...].
        bounds: C + 1 positions; expert c owns the rows between two of them.
        rounding: of what enters down; that of what enters gate and up is the caller's.
    """
    out: Tensor = GroupedLinear.apply(x_SH, weights.first, weights.first_bias, bounds)
    h_SI: Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    h_SI = h_SI if rounding is None else past_rounding(h_SI, rounding)
    y: Tensor = GroupedLinear.apply(h_SI, weights.down, weights.down_bias, bounds)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    return y * affinity_S.unsqueeze(1)
