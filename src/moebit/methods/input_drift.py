"""Linears corrected for the drift of their inputs, in closed form, before they are rounded.

Quantized layers in front of a linear deliver x^q where full precision delivers x. The weight that makes up for it best is a ridge
regression of what the linear should put out on the inputs that arrive:

    W' = argmin_W' sum_t w_t |W' x^q_t - W x_t|^2 + mu |W' - W|^2
       = W + W (sum_t w_t (x_t - x^q_t) x^q_t^T) (sum_t w_t x^q_t x^q_t^T + mu I)^-1

W' is what is rounded, in the place of W.

Source: asymmetric calibration, GPTAQ (arXiv 2504.02692), which carries the same term from column to column of GPTQ. Departures: it is taken
once, before rounding, so that any order of columns and any grid can follow; mu, relative to the mean of the diagonal, is the one of `MUS`
with the least error on tokens that the regression did not see, "no correction" among them, as for routers (`methods/realign.py`).

Shape suffixes: C matrices (experts of a chunk, or one), O outputs, N inputs, S tokens or routed slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moebit.methods.held_out import held_out_rows
from moebit.tensor import add_second_moment, mirror_
from moebit.tensor.linalg import ridge

MUS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean diagonal that are tried
FITTED, HELD_OUT = 0, 1


@dataclass(frozen=True)
class InputDriftMoments:
    """Sums over what arrives and what should arrive, in two parts: tokens that are fitted and tokens that are held out.

    Attributes:
        h: [2, C, N, N] `sum w x^q x^q^T`, complete above the diagonal only. cross: [2, C, N, N] `sum w (x - x^q) x^q^T`.
        held_out: bool [T], by token of the calibration set.
    """

    h: Tensor
    cross: Tensor
    held_out: Tensor

    @classmethod
    def zeros(cls, matrices: int, size: int, tokens: int, length: int) -> InputDriftMoments:
        """Sums over nothing yet, for `tokens` tokens in windows of `length`, of which every fourth is held out."""
        h, cross = torch.zeros(2, matrices, size, size), torch.zeros(2, matrices, size, size)
        return cls(h, cross, held_out_rows(tokens, length))

    def add(self, x_SN: Tensor, exact_SN: Tensor, weight_S: Tensor | None, tokens_S: Tensor, bounds: list[int]) -> None:
        """Add inputs, sorted by matrix.

        Args:
            x_SN: what arrives. exact_SN: what full precision delivers. tokens_S: their tokens.
        """
        for c, (low, high) in enumerate(pairwise(bounds)):
            unseen = self.held_out[tokens_S[low:high]]
            for part, rows in ((FITTED, ~unseen), (HELD_OUT, unseen)):
                index = low + rows.nonzero()[:, 0]
                if not len(index):
                    continue
                x, weight = x_SN[index].float(), None if weight_S is None else weight_S[index].float()
                add_second_moment(self.h[part, c], x, weight)
                missed = exact_SN[index].float() - x
                missed = missed if weight is None else missed * weight.unsqueeze(1)
                self.cross[part, c].addmm_(missed.T, x)

    @property
    def hessian(self) -> Tensor:
        """[C, N, N] of all tokens."""
        return mirror_(self.h).sum(0)


@dataclass(frozen=True)
class Corrected:
    """Weights that make up for the drift of their inputs.

    Attributes:
        weight: [C, O, N] float32. mu: of each matrix, None where no correction was best.
        gain: by how much the squared error of the outputs fell on held-out tokens, as a share of the outputs' own square.
    """

    weight: Tensor
    mu: list[float | None]
    gain: list[float]


def correct_input_drift(w_CON: Tensor, moments: InputDriftMoments) -> Corrected:
    """The ridge regression; mu is chosen for every matrix by itself, and the result is then fitted to all tokens with it."""
    w, h = w_CON.float(), mirror_(moments.h)
    wanted, unseen = torch.bmm(w, moments.cross[FITTED]), torch.bmm(w, moments.cross[HELD_OUT])
    changes = torch.stack([_change(ridge(h[FITTED], wanted, mu), h[HELD_OUT], unseen) for mu in MUS])
    lowest, number = changes.min(0)
    number = torch.where(lowest < 0, number, -1)
    total, result = h.sum(0), w.clone()
    for candidate, mu in enumerate(MUS):
        mine = number == candidate
        if bool(mine.any()):
            result[mine] += ridge(total[mine], (wanted + unseen)[mine], mu)
    square = (torch.bmm(w, h[HELD_OUT]) * w).sum((1, 2))
    gain = torch.where(number >= 0, -lowest / square.clamp(min=torch.finfo(square.dtype).tiny), 0.0)
    return Corrected(result, [MUS[n] if n >= 0 else None for n in number.tolist()], gain.tolist())


def _change(k_CON: Tensor, h_CNN: Tensor, cross_CON: Tensor) -> Tensor:
    """[C] of `sum w |W (x - x^q) - K x^q|^2` from K = 0 to K, from the sums over tokens alone."""
    return (torch.bmm(k_CON, h_CNN) * k_CON).sum((1, 2)) - 2 * (cross_CON * k_CON).sum((1, 2))
