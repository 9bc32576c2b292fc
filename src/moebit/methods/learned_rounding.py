"""Rounding that is learned on the output: codes and scales of several matrices tuned together, from where a solver left them.

A solver such as GPTQ answers for one matrix at a time. What counts is what the matrices put out together, against what they should:

    min over codes and scales of  sum_t |y_q(x_t) - y_t|^2.

Every code has a latent value u, a real number that is rounded to it; the gradient passes the rounding as if it were not there
(straight-through). A latent begins at the solver's code plus how far the weight itself lies from it, at most `INERTIA`, so that rounding
it gives the solver's code. Scales have a relative factor that begins at 1; in use they are rounded to the type that is stored. Both are
moved by Adam or by the gradient's sign, at a rate that falls to zero; it is in code steps for u and relative for scales. Latents near the
middle between two codes go back and forth between these, more of them the higher the rate, and the loss shows how good the codes are only
once that has ended; so the rate falls early (as a cube, where the sources let it fall in a line) and the last steps are small ones.
Tokens that are held back say, now and then, how good the rounding is: the best one is kept, and the beginning is among them.

Sources: straight-through estimation (Bengio et al., 2013, arXiv 1308.3432) with Adam (Kingma and Ba, 2014, arXiv 1412.6980); `sign` is the
descent of SignRound (Cheng et al., 2023, arXiv 2309.05516), whose offsets stay within half a step of where they began. Departures: the
rate's fall; the start is a solver's result instead of rounding to nearest; scales are tuned through one factor instead of two clipping
ratios; the result is chosen on tokens that were held back.

Shape suffixes: E matrices, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moebit.tensor import QTensor

INERTIA = 0.45  # of a code step: how far from its code a latent may begin
REACH = 0.5  # of a code step: how far `sign` may take a latent from where it began
FACTORS = (0.5, 2.0)  # between which a scale's factor stays
EVALUATIONS = 10  # of the held-back loss, besides the one at the beginning
DECAY = 3  # the rate falls as this power of the share of steps that are left
MOMENTUM, SQUARES = 0.9, 0.999  # Adam's decay rates
TINY = 1e-12  # beside Adam's square root; losses are relative, and gradients of single weights small


class Objective(ABC):
    """What the matrices are to achieve together. Matrices have names; their values are float32 [E, O, I]."""

    @abstractmethod
    def held_back(self, values: Mapping[str, Tensor]) -> float:
        """Return the mean loss over the tokens that are held back."""

    @abstractmethod
    def gradients(self, values: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        """Return the mean loss over the batch of a step and its gradient in every matrix; the batch depends on the step alone."""


@dataclass(frozen=True)
class Learning:
    """How rounding is learned.

    Attributes:
        kind: `straight_through` with Adam, or `sign`. steps: of every try. rates: at which it is tried, each from the beginning.
        codes, scales: what is tuned; scales only on grids where a scale can be changed by itself.
    """

    kind: Literal["straight_through", "sign"]
    steps: int
    rates: tuple[float, ...]
    codes: bool = True
    scales: bool = True


@dataclass(frozen=True)
class Try:
    """The course of one try.

    Attributes:
        rate: at which it ran. at: steps after which the held-back loss was taken, 0 first. held_back: those losses.
        train: mean loss of the batches since the evaluation before, one number less.
    """

    rate: float
    at: list[int]
    held_back: list[float]
    train: list[float]


@dataclass(frozen=True)
class Learned:
    """What came of it.

    Attributes:
        matrices: with the codes and scales of the best evaluation; those that were given where none was better than the beginning.
        best: the try it comes from, by its number. step: after how many steps of it; 0 for the beginning. tries: their courses.
    """

    matrices: dict[str, QTensor]
    best: int
    step: int
    tries: list[Try]


def learn_rounding(
    matrices: Mapping[str, QTensor],
    weights: Mapping[str, Tensor],
    objective: Objective,
    how: Learning,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Learned:
    """Tune the codes and scales of stacked matrices together.

    Args:
        matrices: as a solver left them. weights: [E, O, I] what each stands for.
        objective: what the matrices are to achieve. how: kind, steps and rates.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: a grid with a table of levels, whose neighbours are not one code step apart.
    """
    for name, q in matrices.items():
        if q.grid.levels is not None:
            raise ValueError(f"{name}: {type(q.grid).__name__} has a table of levels; rounding is learned on evenly spaced grids only")
    begun = objective.held_back({name: q.dequantize() for name, q in matrices.items()})
    best, least, tries = Learned(dict(matrices), 0, 0, []), begun, list[Try]()
    for number, rate in enumerate(how.rates):
        tries.append(Try(rate, [0], [begun], []))
        # Nothing here keeps the latents of one try while those of the next are made: they are the most memory that is taken.
        for step, found in _better({name: _Latent(q, weights[name]) for name, q in matrices.items()}, objective, how, tries[-1], least):
            progress(number * how.steps + step, len(how.rates) * how.steps)
            if found is not None:
                best, least = Learned(found, number, step, []), tries[-1].held_back[-1]
    return replace(best, tries=tries)


def _better(
    latents: dict[str, _Latent], objective: Objective, how: Learning, course: Try, least: float
) -> Iterator[tuple[int, dict[str, QTensor] | None]]:
    """(step, the matrices as they are after it where their held-back loss is below all before, else None), step after step."""
    for step in _steps(latents, objective, how, course):
        if course.at[-1] == step and course.held_back[-1] < least:
            least = course.held_back[-1]
            yield step, {name: latent.quantized() for name, latent in latents.items()}
        else:
            yield step, None


def _steps(latents: Mapping[str, _Latent], objective: Objective, how: Learning, course: Try) -> Iterator[int]:
    """Take the steps of a try, and yield after each of them; the course is added to."""
    every, losses = max(1, how.steps // EVALUATIONS), list[float]()
    for step in range(1, how.steps + 1):
        loss, gradients = objective.gradients({name: latent.value() for name, latent in latents.items()}, step - 1)
        losses.append(loss)
        rate = course.rate * (1 - (step - 1) / how.steps) ** DECAY
        for name, latent in latents.items():
            latent.move(gradients[name], how, rate, step)
        if step % every == 0 or step == how.steps:
            course.at.append(step)
            course.held_back.append(objective.held_back({name: latent.value() for name, latent in latents.items()}))
            course.train.append(sum(losses) / len(losses))
            losses.clear()
        yield step


class _Latent:
    """A stack of matrices on its way: latent codes and factors of scales, with what their optimizer remembers."""

    def __init__(self, q: QTensor, w_EOI: Tensor) -> None:
        affine = q.grid.columns(q.params)
        self.q, groups = q, affine.scale.shape[-1]
        self.scale, self.zero = affine.scale.float().unsqueeze(-1), affine.zero.float().unsqueeze(-1)  # [E, O, G, 1]
        self.offset = None if affine.offset is None else affine.offset.float().unsqueeze(-1)
        self.top = q.grid.qmax(q.bits, torch.float32).to(q.codes.device)[:, None, None, None]
        codes = q.codes.unflatten(-1, (groups, -1)).float()
        w = w_EOI.to(q.codes.device).float().unflatten(-1, (groups, -1))
        exact = (w if self.offset is None else w - self.offset) / torch.where(self.scale == 0, 1.0, self.scale) + self.zero
        self.u = codes + (exact - codes).nan_to_num().clamp(-INERTIA, INERTIA)
        self.factor = torch.ones_like(self.scale)
        self.begun: Tensor | None = None
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}

    def codes(self) -> Tensor:
        """[E, O, G, I / G] as they are now, in float32."""
        return self.u.round().clamp(min=0).minimum(self.top)

    def stored_scale(self) -> Tensor:
        """[E, O, G, 1] scales as they would be stored, in float32."""
        if not self.q.grid.refits:
            return self.scale
        stored = (self.scale * self.factor).to(self.q.params.scale.dtype).float()
        return torch.where(torch.isfinite(stored) & (stored != 0), stored, self.scale)

    def value(self) -> Tensor:
        """[E, O, I] the numbers that codes and scales stand for now."""
        value = (self.codes() - self.zero).mul_(self.stored_scale())
        return (value if self.offset is None else value + self.offset).flatten(-2)

    def slopes(self, gradient_EOI: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient in the latents [E, O, G, I / G], in the factors [E, O, G, 1]) from the gradient in the values, past both roundings."""
        gradient = gradient_EOI.unflatten(-1, (self.scale.shape[2], -1))
        to_factor = (gradient * (self.codes() - self.zero)).sum(-1, keepdim=True) * self.scale
        return gradient * self.stored_scale(), to_factor

    def move(self, gradient_EOI: Tensor, how: Learning, rate: float, step: int) -> None:
        """Take one step down the gradient."""
        to_u, to_factor = self.slopes(gradient_EOI)
        if how.codes:
            if how.kind == "sign":
                self.begun = self.u.clone() if self.begun is None else self.begun
            self._descend("u", self.u, to_u, how, rate, step)
            if self.begun is not None:
                torch.minimum(torch.maximum(self.u, self.begun - REACH, out=self.u), self.begun + REACH, out=self.u)
            torch.minimum(self.u.clamp_(min=-INERTIA), self.top + INERTIA, out=self.u)
        if how.scales and self.q.grid.refits:
            self._descend("factor", self.factor, to_factor, how, rate, step)
            self.factor.clamp_(*FACTORS)

    def _descend(self, name: str, x: Tensor, gradient: Tensor, how: Learning, rate: float, step: int) -> None:
        """Move x in place."""
        if how.kind == "sign":
            x.sub_(gradient.sign_(), alpha=rate)
            return
        if name not in self.memory:
            self.memory[name] = torch.zeros_like(x), torch.zeros_like(x)
        mean, square = self.memory[name]
        mean.lerp_(gradient, 1 - MOMENTUM)
        square.mul_(SQUARES).addcmul_(gradient, gradient, value=1 - SQUARES)
        root = torch.sqrt(square, out=gradient).div_((1 - SQUARES**step) ** 0.5).add_(TINY)
        x.addcdiv_(mean, root, value=-rate / (1 - MOMENTUM**step))

    def quantized(self) -> QTensor:
        """The matrices with the codes and scales that they have now."""
        codes = self.codes().flatten(-2).to(torch.uint8)
        if not self.q.grid.refits:
            return replace(self.q, codes=codes)
        scale = self.stored_scale().squeeze(-1).to(self.q.params.scale.dtype)
        return replace(self.q, codes=codes, params=replace(self.q.params, scale=scale))
