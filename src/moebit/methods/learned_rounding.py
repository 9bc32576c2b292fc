"""Rounding that is learned on the output: codes and scales of several matrices tuned together, from where a solver left them.

A solver such as GPTQ answers for one matrix at a time. What counts is what the matrices put out together, against what they should:

    min over codes and scales of  sum_t |y_q(x_t) - y_t|^2.

Codes and scales are moved along gradients that pass their rounding (`latent.py`, or `gumbel.py` for codes that are drawn), at a rate that
falls to zero; it is in code steps for codes and relative for scales. Latents near the middle between two codes go back and forth between
these, more of them the higher the rate, and the loss shows how good the codes are only once that has ended; so the rate falls early (as a
cube, where the sources let it fall in a line) and the last steps are small ones. Tokens that are held back say, now and then, how good the
rounding is: the best one is kept, and the beginning is among them.

Departures from the sources that `latent.py` and `gumbel.py` name: the rate's fall; the start is a solver's result instead of rounding to
nearest; scales are tuned through one factor instead of two clipping ratios; the result is chosen on tokens that were held back.

Shape suffixes: E matrices, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from moebit.methods.gumbel import GumbelLatent
from moebit.methods.latent import Latent
from moebit.methods.online import site_generator
from moebit.tensor import QTensor

EVALUATIONS = 10  # of the held-back loss, besides the one at the beginning
DECAY = 3  # the rate falls as this power of the share of steps that are left


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
        kind: `straight_through` with Adam, SignRound's `sign`, or `gumbel`.
        steps: of every try. rates: at which it is tried, each from the beginning.
        codes, scales: what is tuned; scales only on grids where a scale can be changed by itself. seed: of the codes that are drawn.
    """

    kind: Literal["straight_through", "sign", "gumbel"]
    steps: int
    rates: tuple[float, ...]
    codes: bool = True
    scales: bool = True
    seed: int = 0


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
    """
    begun = objective.held_back({name: q.dequantize() for name, q in matrices.items()})
    best, least, tries = Learned(dict(matrices), 0, 0, []), begun, list[Try]()
    for number, rate in enumerate(how.rates):
        tries.append(Try(rate, [0], [begun], []))
        # Nothing here keeps the latents of one try while those of the next are made: they are the most memory that is taken.
        for step, found in _better(_latents(matrices, weights, how), objective, how, tries[-1], least):
            progress(number * how.steps + step, len(how.rates) * how.steps)
            if found is not None:
                best, least = Learned(found, number, step, []), tries[-1].held_back[-1]
    return replace(best, tries=tries)


def _latents(matrices: Mapping[str, QTensor], weights: Mapping[str, Tensor], how: Learning) -> dict[str, Latent]:
    if how.kind == "gumbel":
        return {name: GumbelLatent(q, weights[name]) for name, q in matrices.items()}
    return {name: Latent(q, weights[name], how.kind == "sign") for name, q in matrices.items()}


def _better(
    latents: dict[str, Latent], objective: Objective, how: Learning, course: Try, least: float
) -> Iterator[tuple[int, dict[str, QTensor] | None]]:
    """(step, the matrices as they are after it where their held-back loss is below all before, else None), step after step."""
    for step in _steps(latents, objective, how, course):
        if course.at[-1] == step and course.held_back[-1] < least:
            least = course.held_back[-1]
            yield step, {name: latent.quantized() for name, latent in latents.items()}
        else:
            yield step, None


def _steps(latents: Mapping[str, Latent], objective: Objective, how: Learning, course: Try) -> Iterator[int]:
    """Take the steps of a try, and yield after each of them; the course is added to."""
    every, losses = max(1, how.steps // EVALUATIONS), list[float]()
    for step in range(1, how.steps + 1):
        left, draw = 1 - (step - 1) / how.steps, site_generator(how.seed, f"step {step}")
        loss, gradients = objective.gradients({name: latent.tried(left, draw) for name, latent in latents.items()}, step - 1)
        losses.append(loss)
        rate = course.rate * left**DECAY
        for name, latent in latents.items():
            latent.move(gradients[name], how.codes, how.scales, rate, step)
        if step % every == 0 or step == how.steps:
            course.at.append(step)
            course.held_back.append(objective.held_back({name: latent.value() for name, latent in latents.items()}))
            course.train.append(sum(losses) / len(losses))
            losses.clear()
        yield step
