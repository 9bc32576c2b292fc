"""Packed weights through which gradients flow: to the inputs of linears and experts, and to their biases; never to the codes.

Autograd keeps what a product was made of until the backward pass, and a dequantized weight is what a packed model has no room for. So a
product here keeps nothing but a way to the weight, which is dequantized once more when the gradient comes.

Shape suffixes: C experts, S routed slots (rows), I inputs, O outputs, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebit.model.experts import Slots

WeightOf = Callable[[int], Tensor]


class RaggedProduct(torch.autograd.Function):
    """Rows [bounds[c], bounds[c + 1]) times the transposed matrix c, plus its bias, where the matrices are made when they are needed."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, bias_CO: Tensor | None, bounds: list[int], outputs: int, weight_of: WeightOf) -> Tensor:
        """[S, O]. `weight_of(c)` gives matrix c [O, I] in the type of `x_SI`, the same whenever it is asked."""
        ctx.bounds, ctx.weight_of = bounds, weight_of
        ctx.biases = None if bias_CO is None else (bias_CO.shape, bias_CO.dtype)
        y = x_SI.new_empty(x_SI.shape[0], outputs)
        for c, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                product = x_SI[low:high] @ weight_of(c).T
                y[low:high] = product if bias_CO is None else product + bias_CO[c]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The gradients of the rows [S, I] and of the biases [C, O]."""
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            parts = [gradient_SO[low:high] @ ctx.weight_of(c) for c, (low, high) in enumerate(pairwise(ctx.bounds)) if low < high]
            to_x = torch.cat(parts) if parts else None
        if ctx.biases is not None and ctx.needs_input_grad[1]:
            to_bias = torch.zeros(*ctx.biases[0], dtype=ctx.biases[1], device=gradient_SO.device)
            for c, (low, high) in enumerate(pairwise(ctx.bounds)):
                to_bias[c] = gradient_SO[low:high].sum(0)
        return to_x, to_bias, None, None, None


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient with respect to one of these is asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def linear(x: Tensor, bias_O: Tensor | None, outputs: int, weight: Callable[[], Tensor]) -> Tensor:
    """[..., O]: a linear layer over a weight that `weight()` makes."""
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias_O is None else bias_O.to(x.dtype).unsqueeze(0)
    product: Tensor = RaggedProduct.apply(rows, bias, [0, len(rows)], outputs, lambda c: weight())
    return product.view(*x.shape[:-1], outputs)


def experts_output(
    module: Any, x_TH: Tensor, slots: Slots, biases: tuple[Tensor | None, Tensor | None], first_of: WeightOf, down_of: WeightOf
) -> Tensor:
    """[T, H] float32: what `intermediate` and `finish` of model/experts.py add up to for every expert, differentiable.

    Args:
        module: the experts module, for its gating, its norm and what happens to its inputs.
        biases: of the first projections and of down, [E, O].
        first_of, down_of: the matrices of an expert, [2I or I, H] and [H, I], in the type of `x_TH`.
    """
    steps = getattr(module, "moebit_inputs", None)
    x_SH = (x_TH if steps is None else steps.first(x_TH))[slots.tokens]
    hidden, bounds = x_TH.shape[-1], slots.bounds
    width = first_of(0).shape[0]
    first: Tensor = RaggedProduct.apply(x_SH, biases[0], bounds, width, first_of)
    h_SI: Tensor = module._apply_gate(first) if module.has_gate else module.act_fn(first)
    if steps is not None:
        h_SI = steps.down(h_SI, bounds, 0)
    y_SH: Tensor = RaggedProduct.apply(h_SI, biases[1], bounds, hidden, down_of)
    if module.has_post_expert_norm:
        y_SH = module.post_expert_norm(y_SH)
    answers = y_SH.float() * slots.affinity.unsqueeze(1)
    return answers.new_zeros(x_TH.shape).index_add(0, slots.tokens, answers)
