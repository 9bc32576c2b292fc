"""AWQ (2306.00978): channels that carry large activations are scaled up before rounding, weighted by affinity as in MoEQuant (2505.03804).

The scale of a site is s = m^a / sqrt(max m^a min m^a), m the root mean square of every input channel, a the best of 0, 1/20 … 19/20 for
    sum_e sum_t g_te^p || Q(W_e diag(s)) diag(s)^-1 x_t - W_e x_t ||^2
on a sample of the tokens, Q being the rounding that follows with its clipping search: one s for a layer's gate, up, router and shared
experts, which share a norm, and one for every expert's down.

Departures: the root mean square instead of the mean absolute value (both tell large channels from small ones); each expert is judged on at
most `SAMPLE` of its own tokens, weighed so that they stand for all; clipping is searched for every candidate by the error of the weights
times the second moments of the scaled inputs, as in the rounding itself (the authors judge scales without clipping, and clip afterwards).
Shape suffixes: C experts (or 1), O outputs, I inputs, S sampled tokens, R ratios.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.tensor import Grid, solve_rtn

RATIOS: tuple[float, ...] = tuple(step / 20 for step in range(20))
SAMPLE = 256
SMALLEST = 1e-4  # channels that never fire


def magnitudes(x_CSI: Tensor, weight_CS: Tensor) -> Tensor:
    """[C, I] root mean square of every channel over weighted tokens; ones where there are none."""
    total = weight_CS.sum(1)[:, None]
    mean = torch.einsum("csi,cs->ci", x_CSI.square(), weight_CS) / total.clamp(min=1e-30)
    return torch.where(total > 0, mean.sqrt(), torch.ones_like(mean))


def candidates(magnitude_CI: Tensor) -> Tensor:
    """[R, C, I]: one scale per ratio, the geometric mean of its extremes 1. The first is 1 throughout: no scaling."""
    floored = magnitude_CI.clamp(min=SMALLEST)
    powers = torch.stack([floored.pow(ratio) for ratio in RATIOS])
    return powers / (powers.amax(-1, keepdim=True) * powers.amin(-1, keepdim=True)).sqrt()


def losses(w_COI: Tensor, s_RCI: Tensor, x_CSI: Tensor, weight_CS: Tensor, bits_C: Tensor, grid: Grid, clip_search: bool = True) -> Tensor:
    """[R, C]: `sum_t weight_t || Q(W s) s^-1 x_t - W x_t ||^2` of every matrix for every scale, Q being the rounding that follows.

    Args:
        s_RCI: scales; [R, 1, I] for one that all matrices share.
        clip_search: whether Q searches for clipping ratios, by the error of the weights times the second moments of x / s.
    """
    w, x = w_COI.float(), x_CSI.float()
    moment_CI, result = second_moments(x, weight_CS), []
    for s in s_RCI.float():
        importance = moment_CI / s.square()
        missed = solve_rtn(w * s[:, None], bits_C, grid, importance_EI=importance, clip_search=clip_search).dequantize()
        missed.div_(s[:, None]).sub_(w)
        result.append((torch.bmm(x, missed.mT).square().sum(-1) * weight_CS).sum(-1).double())
    return torch.stack(result)


def second_moments(x_CSI: Tensor, weight_CS: Tensor) -> Tensor:
    """[C, I] second moments of every channel; channels that never fire have the mean of the others, matrices without tokens ones."""
    total_CI = torch.einsum("csi,cs->ci", x_CSI.square(), weight_CS)
    live = total_CI > 0
    mean = total_CI.sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)
    return torch.where(live, total_CI, torch.where(mean > 0, mean, torch.ones_like(mean)))


def best(s_RCI: Tensor, losses_RC: Tensor) -> Tensor:
    """[C, I]: the scale with the least loss, for every matrix; the smallest ratio wins ties."""
    index = losses_RC.argmin(0)
    return s_RCI.gather(0, index[None, :, None].expand(1, -1, s_RCI.shape[-1]).clone())[0]


def sampled_slots(tokens_S: Tensor, affinity_S: Tensor, bounds: list[int], power: float) -> tuple[Tensor, Tensor]:
    """(tokens int64 [C, SAMPLE], weights [C, SAMPLE]): evenly spaced slots of every expert, weighed so that they stand for all of its own.

    Places that an expert with fewer slots does not fill have weight 0 (and token 0).
    """
    low, count = torch.tensor(bounds[:-1]), torch.tensor(bounds).diff()
    kept = count.clamp(max=SAMPLE)
    place = torch.arange(SAMPLE)[None]
    there = place < kept[:, None]
    slot = torch.where(there, low[:, None] + place * count[:, None] // kept.clamp(min=1)[:, None], 0)
    if not len(tokens_S):
        return torch.zeros_like(slot), torch.zeros(slot.shape)
    weight = affinity_S[slot].float().abs().pow(power) if power else torch.ones(slot.shape)
    return torch.where(there, tokens_S[slot], 0), weight * there * (count / kept.clamp(min=1))[:, None]


def representable(gain_I: Tensor, s_I: Tensor, offset: float) -> Tensor:
    """Nearly s: what the norm is really divided by once its gain is rounded to the type it is stored in, in float64.

    Columns multiplied with this cancel the stored gain exactly, instead of up to the rounding of a narrow type.
    """
    whole = gain_I.double() + offset
    rounded = (whole / s_I.double() - offset).to(gain_I.dtype).double() + offset
    exact = whole / rounded
    return torch.where((rounded != 0) & (exact > 0) & exact.isfinite(), exact, s_I.double())
