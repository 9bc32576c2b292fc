"""How much each expert and channel matters on a data set (MoQa, 2503.21135).

Stage 1, data to expert: tokens, affinity. Stage 2, data to parameter: the significance of a channel (an intermediate neuron: a row of
gate and up, a column of down),
    S_ch[e,c] = sum_{t: e in S_t} g_{t,e} |h_{t,e,c}| * ||W_down[e][:, c]||_2,
what it brings into the layer's output. Stage 3, between experts: co-activation and the overlap of token sets.
    Eq. 1  S_exp[e|D] = sum_c S_ch[e,c|D] / sum_{e',c} S_ch[e',c|D]
    Eq. 2  J_e = mean_D S_exp[e|D], with the variance over D as its dynamics.

The paper leaves the significance of a channel open; the definition above is this project's choice.

Shape suffixes: E experts, C experts of a chunk, S routed slots, T tokens, k experts per token, H hidden, I intermediate, D data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.model.experts import ExpertsLayout, ExpertWeights, Slots

TOKENS = 4096  # looked at together


@dataclass
class ExpertEvidence:
    """What one data set says about the experts of a chunk, added up piece by piece.

    Attributes:
        down_norm: [C, I] lengths of down's columns.
        significance: [C, I], S_ch.
    """

    down_norm: Tensor
    significance: Tensor

    @classmethod
    def zeros(cls, layout: ExpertsLayout, weights: ExpertWeights) -> ExpertEvidence:
        """Nothing seen yet of the experts of `weights`."""
        norm = torch.linalg.vector_norm(weights.down.float(), dim=1)
        return cls(norm, torch.zeros(len(weights.down), layout.intermediate))

    def add(self, h_SI: Tensor, slots: Slots) -> None:
        """Add routed slots, sorted by expert.

        Args:
            h_SI: what enters down.
            slots: the slots, counting experts from the chunk's first one.
        """
        expert_S = torch.arange(len(self.down_norm)).repeat_interleave(torch.tensor(slots.bounds).diff())
        brought = h_SI.float().abs() * slots.affinity.float().abs().unsqueeze(1) * self.down_norm[expert_S]
        self.significance.index_add_(0, expert_S, brought)


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
