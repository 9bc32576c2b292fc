"""What the statistics of experts with few tokens are drawn towards: the tokens that nearly went to them.

The Hessian of an expert is shrunk towards one that is sure to be there (`tensor/linalg.py`, `shrink`). By default that is the layer's mean
second moment, which knows nothing of the expert. Soft coverage takes

    sum_t p_{t,e} x_t x_t^T / sum_t p_{t,e},     p the router's probabilities of all experts,

in its place: a token counts as much as the router would have sent it there, chosen or not.

Source: an addition of this project to GPTQ for experts (it reads MoEQuant's affinity, arXiv 2505.03804, beyond the chosen experts).
Departures from the formula: it is taken over at most `SAMPLE` evenly spaced tokens, since every token counts for every expert;
probabilities of routers that score each expert by itself (sigmoid) are their scores divided by their sum. For down projections, the
layer's sample that goes through each expert is weighted in the same way.

Shape suffixes: T tokens, M, S sampled ones, C experts of a chunk, E experts, N inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.methods.router import probabilities
from moebit.model.experts import RoutedTokens
from moebit.tensor import add_second_moment, mirror_
from moebit.tensor.spacing import evenly_spaced

SAMPLE, PIECE = 4096, 512  # tokens that the moments are taken over, and at a time


@dataclass(frozen=True)
class SoftCoverage:
    """How near a sample of a layer's tokens came to each of its experts.

    Attributes:
        positions: int64 [M] the tokens. shares: [M, E] of their probabilities; the column of an expert adds up to one.
        through: [S, E] the same for the layer's sample that goes through each expert.
    """

    positions: Tensor
    shares: Tensor
    through: Tensor

    def moments(self, x_TN: Tensor, start: int, stop: int) -> Tensor:
        """[C, N, N] `sum_t p_t x_t x_t^T / sum_t p_t` for experts [start, stop)."""
        sums = torch.zeros(stop - start, x_TN.shape[1], x_TN.shape[1])
        for low in range(0, len(self.positions), PIECE):
            x = x_TN[self.positions[low : low + PIECE]].float()
            for c, h in enumerate(sums):
                add_second_moment(h, x, self.shares[low : low + PIECE, start + c])
        return mirror_(sums)


def soft_coverage(x_TN: Tensor, weight_EN: Tensor, bias_E: Tensor | None, routed: RoutedTokens, sample_S: Tensor) -> SoftCoverage | None:
    """Ask a router about all its experts; None where it is not recognised how it makes affinities of logits.

    Args:
        x_TN: what arrived at the router. weight_EN, bias_E: the router's. routed: what it decided.
        sample_S: the tokens that go through each expert.
    """

    def share(rows: Tensor) -> Tensor | None:
        p = probabilities(x_TN[rows], weight_EN, bias_E, routed.ids[rows], routed.weights[rows])
        return None if p is None else (p / p.sum(0).clamp(min=torch.finfo(p.dtype).tiny)).float()

    positions = evenly_spaced(len(x_TN), SAMPLE)
    shares, through = share(positions), share(sample_S)
    return None if shares is None or through is None else SoftCoverage(positions, shares, through)
