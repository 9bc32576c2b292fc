"""How much each expert and channel matters on a data set (MoQa, 2503.21135), and what rounding it would cost the layer's output.

Stage 1, data to expert: tokens, affinity. Stage 2, data to parameter: the significance of a channel (an intermediate neuron: a row of
gate and up, a column of down),
    S_ch[e,c] = sum_{t: e in S_t} g_{t,e} |h_{t,e,c}| * ||W_down[e][:, c]||_2,
what it brings into the layer's output. Stage 3, between experts: co-activation and the overlap of token sets.
    Eq. 1  S_exp[e|D] = sum_c S_ch[e,c|D] / sum_{e',c} S_ch[e',c|D]
    Eq. 2  J_e = mean_D S_exp[e|D], with the variance over D as its dynamics.

The paper leaves the significance of a channel open; the definition above is this project's choice.

The error of a rounded projection is counted where it arrives, in the layer's output, to first order and without the terms between
channels:
    up, gate  sum_t g^2 sum_c ||Wd_c||^2 d_{t,c}^2 (dW_c x_t)^2,  d = the slope of h_c in up's or gate's output
    down      sum_t g^2 ||dW h_t||^2
so that projections, experts and layers share a unit. The weights of the first line, w_{t,c}, are approximated by the product of their
sums over channels and over tokens: one second moment `sum_t w_t x x^T` per projection, weighted rows. Nothing is divided by counts: an
expert that sees many tokens counts for as much. A norm behind the experts, where an architecture has one, is left out.

Shape suffixes: E experts, C experts of a chunk, S routed slots, T tokens, k experts per token, H hidden, I intermediate, D data sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from moebit.model.experts import ExpertsLayout, ExpertWeights, Slots
from moebit.tensor import add_second_moment, mirror_

TOKENS = 4096  # looked at together


@dataclass
class ExpertEvidence:
    """What one data set says about the experts of a chunk, added up piece by piece.

    Attributes:
        layout: of the experts module. down_norm: [C, I] lengths of down's columns.
        significance: [C, I], S_ch.
        moments: projection -> [C, N, N] weighted second moment of its inputs (upper blocks until `moment`); empty if not wanted.
        rows: gate, up -> [C, I] sums of the weights by output row.
    """

    layout: ExpertsLayout
    down_norm: Tensor
    significance: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, layout: ExpertsLayout, weights: ExpertWeights, errors: bool) -> ExpertEvidence:
        """Nothing seen yet of the experts of `weights`; with `errors`, second moments are added up, too, which errors are measured with."""
        count = len(weights.down)
        norm = torch.linalg.vector_norm(weights.down.float(), dim=1)
        result = cls(layout, norm, torch.zeros(count, layout.intermediate))
        for projection in layout.projections if errors else ():
            size = layout.features(projection)[1]
            result.moments[projection] = torch.zeros(count, size, size)
            if projection != "down_proj":
                result.rows[projection] = torch.zeros(count, layout.intermediate)
        return result

    def add(self, x_SH: Tensor, h_SI: Tensor, slope_SO: Tensor | None, slots: Slots) -> None:
        """Add routed slots, sorted by expert.

        Args:
            x_SH: the slots' inputs. h_SI: what enters down. slope_SO: the slope of h in every output of the first projections; needed
                where errors are wanted. slots: the slots, counting from the chunk's first expert.
        """
        expert_S = torch.arange(len(self.down_norm)).repeat_interleave(torch.tensor(slots.bounds).diff())
        g_S = slots.affinity.float()
        brought = h_SI.float().abs() * g_S.abs().unsqueeze(1) * self.down_norm[expert_S]
        self.significance.index_add_(0, expert_S, brought)
        if slope_SO is not None:
            scale = (g_S.unsqueeze(1) * self.down_norm[expert_S]).square()
            for projection, rows in self.rows.items():
                w_SI = slope_SO[:, self.layout.rows(projection)].float().square() * scale
                rows.index_add_(0, expert_S, w_SI)
                self._add_moment(projection, x_SH, w_SI.sum(1), slots.bounds)
            self._add_moment("down_proj", h_SI, g_S.square(), slots.bounds)

    def _add_moment(self, projection: str, x_SN: Tensor, w_S: Tensor, bounds: list[int]) -> None:
        for c, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                add_second_moment(self.moments[projection][c], x_SN[low:high], w_S[low:high])

    def moment(self, projection: str) -> Tensor:
        """[C, N, N] complete; takes the place of the sums."""
        return mirror_(self.moments[projection])


def output_error(dw_COI: Tensor, moment_CII: Tensor, rows_CO: Tensor | None = None) -> Tensor:
    """float64 [C] `tr(dW Hs dW^T)`, with rows weighted by their share of `rows_CO` where given (a share of zero counts nothing)."""
    by_row = (torch.bmm(dw_COI, moment_CII) * dw_COI).sum(-1).double()
    if rows_CO is None:
        return by_row.sum(1)
    rows = rows_CO.double()
    return (by_row * rows).sum(1) / rows.sum(1).clamp(min=1e-300)


def coactivation(ids_Tk: Tensor, experts: int) -> Tensor:
    """int64 [E, E]: tokens that chose both experts; on the diagonal, tokens that chose one."""
    total = torch.zeros(experts, experts, dtype=torch.float64)
    for ids in ids_Tk.split(TOKENS):
        chosen = torch.zeros(len(ids), experts).scatter_(1, ids, 1.0)
        total += (chosen.T @ chosen).double()
    return total.round().to(torch.int64)


def channel_shares(significance: Tensor) -> Tensor:
    """float64, S_ch as shares of the layer's sum, [..., E, I]; all zero where there is nothing."""
    s = significance.double()
    return s / s.sum((-2, -1), keepdim=True).clamp(min=1e-300)


def expert_shares(significance: Tensor) -> Tensor:
    """float64 [..., E], S_exp (Eq. 1) from S_ch [..., E, I]."""
    return channel_shares(significance).sum(-1)


def baseline(shares_DE: Tensor, how: str = "mean") -> Tensor:
    """[E], J of Eq. 2 from S_exp over data sets; `max` instead of `mean` lets the set decide that needs an expert most."""
    return shares_DE.amax(0) if how == "max" else shares_DE.mean(0)


def dynamics(shares_D: Tensor) -> Tensor:
    """Variance over data sets (the first axis) of shares of any shape; zeros for a single set."""
    return shares_D.double().var(0, correction=0)
