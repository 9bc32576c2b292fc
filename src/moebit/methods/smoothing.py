"""Scales that move what is hard to round from activations into weights, without changing what the model computes.

Behind a norm (SmoothQuant, arXiv 2211.10438; EAQuant, arXiv 2506.13329, its section on smoothing aggregation): channel j of the norm's
output is divided by s_j and column j of everything that reads it is multiplied by s_j,

    s_j = a_j^alpha / w_j^(1 - alpha),     a_j = max_t |x_tj|,  w_j = max_o |W_oj|     (both at least 1e-5).

`smoothquant` takes a over the layer's tokens and w over all readers. `expert_aware` takes s_j^i of every expert i from its own tokens and
its own gate and up, s_j^router and s_j^shared from all tokens, and joins them: `max` over all (the paper), or a mean of the experts'
weighted by their tokens (`frequency`) or by their mean routing probability (`router`), still no less than the router's and the shared
experts'. `none` is the scale of the layer as `smoothquant` has it. Experts without tokens have no say. Scales are divided by their
geometric mean, so that weights keep their size.

Down behind up, per expert (routed, shared, or a dense layer's): channels whose extremes stand out are divided by

    f_c = (extreme_c / largest extreme that does not stand out)^0.7

in up's rows and multiplied back in down's columns; needs h to be linear in up. Maxima and minima are looked at separately, and the larger
factor counts. A channel stands out beyond `q3 + 1.5 (q3 - q1)` with the quantiles .65 and .35 of the extremes; where several do, only those
above the cut that separates them best.

Departures: the paper's code leaves the router out of the maximum; its cut mixes gap and variance, which depends on the unit: here it is
the largest variance between the two sides (Otsu). The geometric mean is ours; neither function nor ranking depends on it.

Shape suffixes: E experts, H channels, I intermediate channels, T tokens, k experts per token, S routed slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-5
OUTLIER_POWER = 0.7
LOW_QUANTILE, HIGH_QUANTILE, REACH = 0.35, 0.65, 1.5


def smooth_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """`a^alpha / w^(1 - alpha)`, elementwise; both floored."""
    return activation.double().clamp(min=FLOOR) ** alpha / weight.double().clamp(min=FLOOR) ** (1 - alpha)


def centred(s_H: Tensor) -> Tensor:
    """Scales with a geometric mean of one."""
    return s_H / s_H.log().mean().exp()


def aggregated(experts_EH: Tensor, say_E: Tensor, others: Sequence[Tensor], how: str) -> Tensor:
    """[H] one scale of a layer from those of its parts.

    Args:
        experts_EH: scale of every expert. say_E: what it weighs (tokens, or mean probability); zero has no say.
        others: [H] scales of the router and the shared experts. how: `max`, or a weighted mean for anything else.
    """
    heard = say_E > 0
    if not bool(heard.any()):
        joined = list(others)
    elif how == "max":
        joined = [experts_EH[heard].amax(0), *others]
    else:
        weight = say_E[heard].double() / say_E[heard].double().sum()
        joined = [(experts_EH[heard] * weight[:, None]).sum(0), *others]
    return torch.stack(joined).amax(0)


def expert_extremes(x_TH: Tensor, ids_Tk: Tensor, experts: int) -> Tensor:
    """[E, H] largest |x| per channel among the tokens of every expert; zero without tokens. Ids outside [0, E) are left out."""
    result = torch.zeros(experts + 1, x_TH.shape[1])
    inside = torch.where((ids_Tk >= 0) & (ids_Tk < experts), ids_Tk, experts)
    for slot in inside.T:
        result.scatter_reduce_(0, slot[:, None].expand(x_TH.shape), x_TH.abs().float(), "amax")
    return result[:experts]


def outlier_factors(high_EI: Tensor, low_EI: Tensor) -> Tensor:
    """[E, I] factor by which channels that stand out are divided; 1 elsewhere.

    Args:
        high_EI, low_EI: largest and smallest value of every channel.
    """
    return torch.maximum(_one_sided(high_EI), _one_sided(-low_EI))


def _one_sided(extreme_EI: Tensor) -> Tensor:
    """The factors for one side, on which outliers are large; row by row, since every expert has its own number of them."""
    return torch.stack([_row_factors(row) for row in extreme_EI.double()])


def _row_factors(row_I: Tensor) -> Tensor:
    factors = torch.ones_like(row_I)
    q1, q3 = torch.quantile(row_I, torch.tensor([LOW_QUANTILE, HIGH_QUANTILE], dtype=row_I.dtype))
    candidates = (row_I > q3 + REACH * (q3 - q1)).nonzero()[:, 0]
    if not len(candidates) or len(candidates) == len(row_I):
        return factors
    outliers = candidates[row_I[candidates] > otsu(row_I[candidates])] if len(candidates) > 1 else candidates
    rest = torch.ones_like(row_I, dtype=torch.bool)
    rest[outliers] = False
    largest = float(row_I[rest].max())
    if largest > FLOOR:
        factors[outliers] = (row_I[outliers] / largest) ** OUTLIER_POWER
    return factors


def otsu(values: Tensor) -> float:
    """The value up to which the lower of two classes goes, so that the variance between them is largest (Otsu 1979).

    Where all values are equal there is nothing to separate: below all of them.
    """
    ordered = values.sort().values
    if bool(ordered[0] == ordered[-1]):
        return float(ordered[0]) - 1
    count = len(ordered)
    below = torch.arange(1, count, dtype=ordered.dtype)
    mean_below = ordered.cumsum(0)[:-1] / below
    mean_above = (ordered.sum() - ordered.cumsum(0)[:-1]) / (count - below)
    between = below * (count - below) * (mean_above - mean_below).square()
    return float(ordered[int(between.argmax())])
