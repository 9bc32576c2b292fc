"""Quantized matrices on their way from one rounding to another: latent codes, and factors on the scales and offsets that are stored.

Every code has a latent value u, a real number that is rounded to it; the gradient passes the rounding as if it were not there. On a table
of levels, u counts places in the table, and the slope there is half the distance between the two neighbours of the level. Every number
that the grid lets be moved by itself (`Grid.factored`: scales of integers, d and dmin of ggml's blocks) has a factor that begins at 1;
in use, the product is rounded to the type that is stored, so that nothing is ever compared that could not be written.

Sources: straight-through estimation (Bengio et al., 2013, arXiv 1308.3432) with Adam (Kingma and Ba, 2014, arXiv 1412.6980); `sign` is the
descent of SignRound (Cheng et al., 2023, arXiv 2309.05516), whose offsets stay within half a step of where they began. What `gumbel` does
is in `gumbel.py`.

Shape suffixes: E matrices, O outputs, I inputs, G groups, B blocks (whose groups share a number that is stored).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moebit.tensor import QTensor

INERTIA = 0.45  # of a code step: how far from its code a latent may begin
REACH = 0.5  # of a code step: how far `sign` may take a latent from where it began
FACTORS = (0.5, 2.0)  # between which the factor of a scale or offset stays
MOMENTUM, SQUARES = 0.9, 0.999  # Adam's decay rates
TINY = 1e-12  # beside Adam's square root; losses are relative, and gradients of single weights small


class Descent:
    """Moves one tensor down its gradients, in place: with Adam, or by their sign alone."""

    def __init__(self, sign: bool) -> None:
        self.sign = sign
        self.memory: tuple[Tensor, Tensor] | None = None

    def move(self, x: Tensor, gradient: Tensor, rate: float, step: int) -> None:
        """Take step number `step`, from 1; the gradient's memory is used up."""
        if self.sign:
            x.sub_(gradient.sign_(), alpha=rate)
            return
        if self.memory is None:
            self.memory = torch.zeros_like(x), torch.zeros_like(x)
        mean, square = self.memory
        mean.lerp_(gradient, 1 - MOMENTUM)
        square.mul_(SQUARES).addcmul_(gradient, gradient, value=1 - SQUARES)
        root = torch.sqrt(square, out=gradient).div_((1 - SQUARES**step) ** 0.5).add_(TINY)
        x.addcdiv_(mean, root, value=-rate / (1 - MOMENTUM**step))


class Latent:
    """A stack of matrices, codes as latents and stored scales with factors.

    Args:
        q: as a solver left them. w_EOI: what they stand for. sign: move by the gradient's sign instead of with Adam.
    """

    def __init__(self, q: QTensor, w_EOI: Tensor, sign: bool = False) -> None:
        device = q.codes.device
        affine, self.q = q.grid.columns(q.params), q
        self.groups = affine.scale.shape[-1]
        self.zero = affine.zero.float().unsqueeze(-1)
        self.top = q.grid.qmax(q.bits, torch.float32).to(device)[:, None, None, None]
        levels = q.grid.levels
        self.levels = None if levels is None else levels.to(device)
        codes = q.codes.unflatten(-1, (self.groups, -1))
        w = w_EOI.to(device).float().unflatten(-1, (self.groups, -1))
        scale, offset = self._columns(q.params)
        exact = (w if offset is None else w - offset) / torch.where(scale == 0, 1.0, scale)
        self.u = codes.float() + self._beside(exact, codes).nan_to_num().clamp(-INERTIA, INERTIA)
        self.begun = self.u.clone() if sign else None
        self.stored = {name: getattr(q.params, name) for name in q.grid.factored if getattr(q.params, name) is not None}
        self.factors = {name: torch.ones(x.shape, device=device) for name, x in self.stored.items()}
        self.descents = {name: Descent(sign) for name in ("u", *self.stored)}

    def _columns(self, params: Any) -> tuple[Tensor, Tensor | None]:
        """(scales, offsets) [E, O, G, 1] in float32."""
        affine = self.q.grid.columns(params)
        offset = None if affine.offset is None else affine.offset.float().unsqueeze(-1)
        return affine.scale.float().unsqueeze(-1), offset

    def _beside(self, exact: Tensor, codes: Tensor) -> Tensor:
        """How far, in steps, exact values lie from their codes."""
        if self.levels is None:
            return exact + self.zero - codes.float()
        over = exact - self.levels[codes.long()]
        to = (codes.long() + torch.where(over < 0, -1, 1)).clamp(0, len(self.levels) - 1)
        gap = (self.levels[to] - self.levels[codes.long()]).abs()
        return torch.where(gap > 0, over / gap, 0.0)

    def codes(self) -> Tensor:
        """[E, O, G, I / G] as they are now, in float32."""
        return self.u.round().clamp(min=0).minimum(self.top)

    def _numbers(self) -> Tensor:
        """[E, O, G, I / G] what is multiplied by the scales."""
        return self.codes() - self.zero if self.levels is None else self.levels[self.codes().long()]

    def params(self) -> Any:
        """The grid's parameters as they would be stored now."""
        moved = {name: self._moved(name) for name in self.stored}
        return replace(self.q.params, **moved) if moved else self.q.params

    def tried(self, left: float, generator: torch.Generator) -> Tensor:
        """[E, O, I] the numbers whose gradient the next step takes; `left`: the share of the steps that are left, before it."""
        return self.value()

    def _moved(self, name: str) -> Tensor:
        """A stored number times its factor, where that is a number of the same kind; else as it was."""
        old = self.stored[name]
        new = (old.float() * self.factors[name]).to(old.dtype)
        return torch.where(torch.isfinite(new) & (new.sign() == old.sign()), new, old)

    def value(self) -> Tensor:
        """[E, O, I] the numbers that codes and scales stand for now, in float32."""
        return self._scaled(self._numbers())

    def _scaled(self, numbers: Tensor) -> Tensor:
        """[E, O, I] numbers times their scales, plus their offsets; the numbers' memory is used up."""
        scale, offset = self._columns(self.params())
        value = numbers.mul_(scale)
        return (value if offset is None else value.add_(offset)).flatten(-2)

    def slopes(self, gradient_EOI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients in the latents [E, O, G, I / G] and in the factors, by name, from the gradient in the values, past all roundings."""
        gradient = gradient_EOI.unflatten(-1, (self.groups, -1))
        step = self._columns(self.params())[0]
        to_u = gradient * step if self.levels is None else gradient * step * self._spacing()
        return to_u, self._to_factors(gradient, self._numbers())

    def _to_factors(self, gradient: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Gradients in the factors, by name, from that in the values [E, O, G, I / G], which have these numbers."""
        began_scale, began_offset = self._columns(self.q.params)
        to_factors = dict[str, Tensor]()
        for number, name in enumerate(self.q.grid.factored):
            if name in self.stored:  # the first of them multiplies scales, the second offsets
                of = (gradient * numbers).sum(-1) * began_scale[..., 0] if number == 0 else gradient.sum(-1) * _only(began_offset)
                to_factors[name] = of.unflatten(-1, (self.factors[name].shape[-1], -1)).sum(-1)
        return to_factors

    def _spacing(self) -> Tensor:
        """[E, O, G, I / G] of the table's levels around every code."""
        assert self.levels is not None
        at, last = self.codes().long(), len(self.levels) - 1
        low, high = (at - 1).clamp(min=0), (at + 1).clamp(max=last)
        return (self.levels[high] - self.levels[low]) / (high - low)

    def move(self, gradient_EOI: Tensor, codes: bool, scales: bool, rate: float, step: int) -> None:
        """Take one step down the gradient in the values, with the codes, the scales, or both."""
        to_u, to_factors = self.slopes(gradient_EOI)
        if codes:
            self.descents["u"].move(self.u, to_u, rate, step)
            if self.begun is not None:
                torch.minimum(torch.maximum(self.u, self.begun - REACH, out=self.u), self.begun + REACH, out=self.u)
            torch.minimum(self.u.clamp_(min=-INERTIA), self.top + INERTIA, out=self.u)
        self._move_factors(to_factors if scales else {}, rate, step)

    def _move_factors(self, to_factors: dict[str, Tensor], rate: float, step: int) -> None:
        for name, gradient in to_factors.items():
            self.descents[name].move(self.factors[name], gradient, rate, step)
            self.factors[name].clamp_(*FACTORS)

    def quantized(self) -> QTensor:
        """The matrices with the codes and scales that they have now."""
        return replace(self.q, codes=self.codes().flatten(-2).to(torch.uint8), params=self.params())


def _only(offset: Tensor | None) -> Tensor:
    """[E, O, G] of a grid whose offsets are stored."""
    assert offset is not None
    return offset[..., 0]
