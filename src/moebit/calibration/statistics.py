"""Second moments of what each expert sees, weighted by affinity and shrunk towards the layer's.

Shape suffixes: C experts of a chunk, S routed slots, T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from moebit.model.experts import ExpertWeights, intermediate
from moebit.tensor import second_moment, shrink

# Tokens of the layer that are pushed through every expert for the statistics it falls back on (METHODS §6: a sample is enough).
LAYER_SAMPLE = 512


def expert_hessians(x_SN: Tensor, affinity_S: Tensor, bounds: list[int], power: float, h_layer: Tensor) -> Tensor:
    """[C, N, N] mean second moments of each expert's inputs, `sum g^p x x^T / sum g^p`, shrunk towards `h_layer` (MoEQuant's AGQ; p = 1).

    The groups are ragged: one symmetric product per expert, each at the machine's rank-k rate.

    Args:
        x_SN: inputs of the routed slots, sorted by expert; `bounds` says where each expert's begin.
        affinity_S: the weight with which each slot's output enters the layer; power 0 weighs all alike.
        h_layer: mean second moment of the layer's tokens, [N, N] or [C, N, N].
    """
    weights = affinity_S.abs().pow(power) if power else torch.ones_like(affinity_S)
    spans = list(pairwise(bounds))
    sums = torch.stack([second_moment(x_SN[low:high], weights[low:high] if power else None) for low, high in spans])
    total = torch.stack([weights[low:high].sum() for low, high in spans])
    squares = torch.stack([weights[low:high].square().sum() for low, high in spans])
    return shrink(sums, total, squares, h_layer)


def layer_sample(tokens: int) -> Tensor:
    """Indices of at most `LAYER_SAMPLE` tokens, evenly spaced."""
    count = min(tokens, LAYER_SAMPLE)
    return (torch.arange(count) * tokens) // count


def down_layer_hessians(module: nn.Module, x_MH: Tensor, weights: ExpertWeights) -> Tensor:
    """[C, I, I] mean second moments of the down inputs if the sampled tokens went through each expert of the chunk."""
    experts, count = weights.first.shape[0], x_MH.shape[0]
    h = intermediate(module, x_MH.repeat(experts, 1), weights, [c * count for c in range(experts + 1)])
    h = h.view(experts, count, -1)
    return h.transpose(1, 2) @ h / count
