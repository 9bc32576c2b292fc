"""Second moments of what each expert sees, weighted by affinity and shrunk towards the layer's.

Shape suffixes: C experts of a chunk, S routed slots, T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from moebit.model.experts import ExpertsLayout, ExpertWeights, gating_slopes, grouped_linear, intermediate
from moebit.tensor import add_second_moment, mirror_, shrink_
from moebit.tensor.spacing import evenly_spaced

# Tokens of the layer that are pushed through every expert for the statistics it falls back on (a sample is enough).
LAYER_SAMPLE = 512


@dataclass
class ExpertMoments:
    """Weighted second moments of what the experts of a chunk see, added up piece by piece.

    Attributes:
        sums: [C, N, N], complete only above the diagonal until `shrunk`. total, squares: [C] sums of the weights and of their squares.
        power: of the affinity in the weights, `sum g^p x x^T` (MoEQuant's AGQ; p = 1); 0 weighs all tokens alike.
    """

    sums: Tensor
    total: Tensor
    squares: Tensor
    power: float

    @classmethod
    def zeros(cls, experts: int, size: int, power: float) -> ExpertMoments:
        return cls(torch.zeros(experts, size, size), torch.zeros(experts), torch.zeros(experts), power)

    def add(self, x_SN: Tensor, affinity_S: Tensor, bounds: list[int]) -> None:
        """Add routed slots, sorted by expert; `bounds` says where each expert's begin.

        The groups are ragged: one symmetric product per expert that has any, each at the machine's rate.
        """
        powered = to_power(affinity_S, self.power)
        weights = torch.ones(len(affinity_S)) if powered is None else powered
        for c, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                add_second_moment(self.sums[c], x_SN[low:high], weights[low:high] if self.power else None)
                self.total[c] += weights[low:high].sum()
                self.squares[c] += weights[low:high].square().sum()

    def shrunk(self, h_layer: Tensor) -> Tensor:
        """[C, N, N] mean second moments `sum g^p x x^T / sum g^p`, drawn towards the layer's; takes the place of the sums.

        Args:
            h_layer: mean second moment of the layer's tokens, [N, N] or [C, N, N].
        """
        return shrink_(mirror_(self.sums), self.total, self.squares, h_layer)


def to_power(affinity_S: Tensor, power: float) -> Tensor | None:
    """[S] what routed slots count; None for all alike."""
    return affinity_S.float().abs().pow(power) if power else None


def shared_affinity(gate: nn.Module, x_TH: Tensor, power: float) -> Tensor:
    """[T] how much tokens count for shared experts behind a gate: `sigmoid(gate x)^p`.

    It is to shared experts what MoEQuant's affinity (arXiv 2505.03804, section 3.3) is to routed ones.
    """
    weight: Tensor = gate(x_TH).float().sigmoid().flatten().pow(power)
    return weight


def layer_sample(tokens: int, most: int = LAYER_SAMPLE) -> Tensor:
    """Indices of at most `most` of a layer's tokens, evenly spaced."""
    return evenly_spaced(tokens, most)


def output_sensitivity(
    module: nn.Module, layout: ExpertsLayout, x_SH: Tensor, affinity_S: Tensor, weights: ExpertWeights, bounds: list[int]
) -> Tensor:
    """[S] how much an error in gate and up at a routed slot costs in the layer's output: the slot's weight in their shared Hessian.

    `g^2 sum_c ||W_down[:, c]||^2 ((dh_c/da_c)^2 + (dh_c/du_c)^2)`, a and u what gate and up put out, h what enters down: the squared error
    that an independent unit error in each of a and u makes, to first order. The architecture's own gating is differentiated.
    """
    out = grouped_linear(x_SH, weights.first, weights.first_bias, bounds).detach().float()
    _, slope_SO = gating_slopes(module, out)
    norm_CI = weights.down.float().square().sum(1)
    both = torch.stack([norm_CI, norm_CI], 2).flatten(1) if layout.interleaved else norm_CI.repeat(1, 2)
    norm_CO, slope_SO = both if layout.gated else norm_CI, slope_SO.square_()
    cost_S = torch.empty(len(x_SH))
    for c, (low, high) in enumerate(pairwise(bounds)):
        torch.mv(slope_SO[low:high], norm_CO[c], out=cost_S[low:high])
    return cost_S * affinity_S.float().square()


def down_layer_hessians(
    module: nn.Module, x_MH: Tensor, weights: ExpertWeights, slots: int = 16384, shares_MC: Tensor | None = None
) -> Tensor:
    """[C, I, I] mean second moments of the down inputs if the sampled tokens went through each expert of the chunk.

    Args:
        slots: rows that go through experts at a time. shares_MC: what the tokens count for each expert, if not all alike.
    """
    experts, count = weights.first.shape[0], x_MH.shape[0]
    step, parts = max(1, slots // max(1, count)), []
    for start in range(0, experts, step):
        some = weights.experts(start, min(start + step, experts))
        c = len(some.first)
        sys.audit("moebit.rows", "sample", c * count)
        h = intermediate(module, x_MH.repeat(c, 1), some, [i * count for i in range(c + 1)]).view(c, count, -1).float()
        if shares_MC is None:
            parts.append(torch.bmm(h.mT, h) / count)
        else:
            parts.append(torch.bmm((h * shares_MC[:, start : start + c].T.unsqueeze(2)).mT, h))
    return torch.cat(parts)
