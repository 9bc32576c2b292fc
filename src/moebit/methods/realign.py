"""A router corrected in closed form for the drift of its inputs.

Quantized layers in front of a router deliver x^q where full precision delivers x. The weight that makes up for it best is a ridge
regression of the full-precision logits on the inputs that arrive:

    W' = argmin_W' sum_t w_t |W' x^q_t - W x_t|^2 + mu |W' - W|^2
       = W + (sum_t w_t r_t x^q_t^T) (sum_t w_t x^q_t x^q_t^T + mu I)^-1,     r_t = W x_t - W x^q_t

Source: an addition to EAQuant's routing alignment (arXiv 2506.13329) that this project makes; it costs nothing at run time and works
with any recipe. w_t is 1, or 1 / (z_(k) - z_(k+1) + eps) with the gap between the last chosen and the first unchosen logit, which
spends accuracy where the choice can flip; eps is the mean gap. mu, relative to the mean of the diagonal, is the one of `MUS` with the
least error on tokens that the regression did not see, "no correction" among them; the result is then fitted to all tokens with it.

Shape suffixes: T tokens, E experts, N inputs of the router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.methods.held_out import held_out_rows
from moebit.tensor import add_second_moment, mirror_
from moebit.tensor.linalg import ridge

MUS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean diagonal that are tried
PIECE = 4096  # tokens at a time


@dataclass(frozen=True)
class Realigned:
    """A corrected router.

    Attributes:
        weight: [E, N] float32. mu: the chosen one, None where no correction was best.
        held_out: mean weighted squared error per logit on held-out tokens without correction and with it (before the final fit).
    """

    weight: Tensor
    mu: float | None
    held_out: tuple[float, float]


def margin_weights(logits_TE: Tensor, top_k: int) -> Tensor:
    """[T] `1 / (z_(k) - z_(k+1) + eps)`, eps the mean gap, scaled to a mean of 1; ones where every expert is chosen."""
    if top_k >= logits_TE.shape[1]:
        return torch.ones(len(logits_TE))
    ranked = logits_TE.float().topk(top_k + 1, dim=1).values
    gap = ranked[:, top_k - 1] - ranked[:, top_k]
    weights = 1 / (gap + gap.mean().clamp(min=1e-12))
    return weights / weights.mean()


def realign(
    w_EN: Tensor, x_TN: Tensor, target_TE: Tensor, weights_T: Tensor, length: int, release: Callable[[], None] = lambda: None
) -> Realigned:
    """The ridge regression of the target logits on what arrives.

    Args:
        w_EN: the router's weight. x_TN: x^q, which may lie in a file. target_TE: `W x` of full precision, without biases.
        weights_T: w_t. length: of a window. release: called after every piece of x.
    """
    w, unseen = w_EN.float(), held_out_rows(len(x_TN), length)
    h, cross, total = torch.zeros(w.shape[1], w.shape[1]), torch.zeros(w.shape, dtype=torch.float64), 0.0

    def add(rows_T: Tensor) -> None:
        nonlocal total
        for rows in _pieces(rows_T):
            x, weight = x_TN[rows].float(), weights_T[rows]
            add_second_moment(h, x, weight)
            cross.add_(((target_TE[rows].float() - x @ w.T) * weight[:, None]).T.double() @ x.double())
            total += float(weight.sum())
            release()

    add(~unseen)
    corrections = [_correction(mirror_(h.clone()), cross, mu) for mu in MUS]
    errors = _errors(w, x_TN, target_TE, weights_T, unseen, corrections, release)
    best = min(range(len(errors)), key=lambda number: errors[number])
    if best == 0:
        return Realigned(w, None, (errors[0], errors[0]))
    add(unseen)
    return Realigned(w + _correction(mirror_(h), cross, MUS[best - 1]), MUS[best - 1], (errors[0], errors[best]))


def _pieces(rows_T: Tensor) -> Iterator[Tensor]:
    yield from rows_T.nonzero()[:, 0].split(PIECE)


def _correction(h_NN: Tensor, cross_EN: Tensor, mu: float) -> Tensor:
    """[E, N] the ridge regression in float64."""
    return ridge(h_NN.double().unsqueeze(0), cross_EN.unsqueeze(0), mu)[0].float()


def _errors(
    w: Tensor, x: Tensor, target: Tensor, weights: Tensor, rows_T: Tensor, corrections: list[Tensor], release: Callable[[], None]
) -> list[float]:
    """Mean weighted squared error per logit without a correction, and with each of them."""
    sums, total = torch.zeros(1 + len(corrections), dtype=torch.float64), 0.0
    for rows in _pieces(rows_T):
        piece, weight = x[rows].float(), weights[rows].double()
        missed = target[rows].float() - piece @ w.T
        for number, correction in enumerate([None, *corrections]):
            left = missed if correction is None else missed - piece @ correction.T
            sums[number] += (left.double().square().mean(1) * weight).sum()
        total += float(weight.sum())
        release()
    return (sums / max(total, 1e-30)).tolist()
