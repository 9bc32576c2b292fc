"""Routers on a grid of their own, clipped so that the same experts stay chosen.

Source: EAQuant (arXiv 2506.13329), its section on routing consistency alignment. With z = W x the logits, Q(W) the rounded weight
(one scale and zero point per expert's row) and p the routing probabilities, the clipping ratios c minimise

    L(c) = |Q_c(W) X - W X|^2 / |W X|^2 + lambda * mean_t KL_top(t)
    KL_top = sum_{e in top m} p_e log(p_e / q_e) + (1 - P) log((1 - P) / (1 - P_q)),     m = k + floor(a (E - k))

P and P_q are the masses of the top m experts before and after; a is the share of the experts that are not chosen, 0 to 1.

Departures: the paper's sum stops at the top m, which rewards sharpening; the rest bucket makes it a divergence. One ratio per expert
instead of one per layer: coordinate descent from the best common ratio. The first k of the top m are those that the model's own router
chose, whatever its groups and correction biases; the others follow by probability. Probabilities of routers that score each expert by
itself (sigmoid) are their scores divided by their sum.

Shape suffixes: T tokens, E experts, k experts per token, H inputs of the router, R clipping ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebit.tensor.grids import UniformGrid, as_bits
from moebit.tensor.grids.uniform import clipped_grid, round_to_grid
from moebit.tensor.spacing import evenly_spaced

RATIOS, NARROWEST = 101, 0.35  # clipping ratios from 1 down, evenly spaced: as published
TABLE_VALUES = 2**25  # logit errors (tokens x experts x ratios) that are looked at together: bounds the tokens that are used
SCORED_TOKENS = 4096  # enough to tell score functions apart
MAX_MISFIT = 0.1  # of a score function; the rounding of affinities computed in bf16 stays well below
MAX_SWEEPS = 4
NOT_ONCE = "the router is not called once for every token"  # why nothing can be said of one, in reports
NO_SCORE = "what the router makes of its logits is not recognised"

# What a router makes of a logit, in the logarithm: probabilities are the softmax of it, and so are affinities among the chosen.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z,
    "sigmoid": functional.logsigmoid,
    "sqrt-softplus": lambda z: functional.softplus(z).clamp(min=1e-30).log() / 2,
}


@dataclass(frozen=True)
class Divergence:
    """How the divergence of routing probabilities counts in L.

    Attributes:
        share: a, how many of the experts that are not chosen count one by one. weight: lambda.
    """

    share: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class AlignedRouter:
    """A router's weight on its grid.

    Attributes:
        weight: [E, H], as it will be stored. ratios: the clipping ratio of every expert's row.
        loss_before, loss: L of the min-max grid (all ratios 1) and of the chosen ratios. sweeps: of the coordinate descent.
    """

    weight: Tensor
    ratios: list[float]
    loss_before: float
    loss: float
    sweeps: int


def probabilities(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, ids_Tk: Tensor, affinity_Tk: Tensor) -> Tensor | None:
    """[T, E] float64, how likely the router finds every expert, chosen or not; None where it is not recognised how it scores them.

    Args:
        x_TH: what arrived at the router. weight_EH, bias_E: its own. ids_Tk, affinity_Tk: what it decided.
    """
    z = x_TH.double() @ weight_EH.double().T
    z = z if bias_E is None else z + bias_E.double()
    score = score_function(z, ids_Tk, affinity_Tk)
    return None if score is None else SCORES[score](z).softmax(1)


def score_function(logits_TE: Tensor, ids_Tk: Tensor, affinity_Tk: Tensor) -> str | None:
    """Which of `SCORES` turns these logits into these affinities, up to a factor per token; None where none does.

    Found from what the model computed, so that no router's forward is written down here. A single expert per token says something only
    if its affinity is not one for every token.
    """
    step = max(1, len(logits_TE) // SCORED_TOKENS)
    z, ids, g = logits_TE[::step].double(), ids_Tk[::step], affinity_Tk[::step].double()
    usable = (g > 0).all(1) & (ids >= 0).all(1) & (ids < z.shape[1]).all(1)
    z, ids, g = z[usable], ids[usable], g[usable].log()
    if not len(z):
        return None
    misfits = {}
    for name, log_score in SCORES.items():
        u = log_score(z).gather(1, ids)
        if ids.shape[1] == 1 and name == "softmax":
            u = z.log_softmax(1).gather(1, ids)
        axis = 1 if ids.shape[1] > 1 else 0
        expected, seen = u - u.mean(axis, keepdim=True), g - g.mean(axis, keepdim=True)
        misfits[name] = float((expected - seen).norm() / seen.norm()) if float(seen.norm()) > 1e-6 * len(seen) ** 0.5 else float("inf")
    best = min(misfits, key=lambda name: misfits[name])
    return best if misfits[best] < MAX_MISFIT else None


def top_experts(u_TE: Tensor, ids_Tk: Tensor, share: float) -> Tensor:
    """bool [T, E]: the `k + floor(share (E - k))` experts that rank first: the chosen ones, then by log score."""
    experts, k = u_TE.shape[1], ids_Tk.shape[1]
    count = k + int(share * (experts - k) + 1e-9)
    chosen = torch.zeros_like(u_TE, dtype=torch.bool).scatter_(1, ids_Tk.clamp(0, experts - 1), True)
    ranked = torch.where(chosen, torch.inf, u_TE).topk(count, dim=1).indices
    return torch.zeros_like(chosen).scatter_(1, ranked, True)


def kl_top(u_TE: Tensor, uq_TE: Tensor, top_TE: Tensor) -> Tensor:
    """[T] divergence of softmax(uq) from softmax(u) over the top experts, with one bucket for all others.

    Args:
        u_TE, uq_TE: log scores before and after, up to a constant per token. top_TE: as `top_experts`.
    """
    before, after = u_TE.log_softmax(1), uq_TE.log_softmax(1)
    inside = torch.where(top_TE, before.exp() * (before - after), 0.0).sum(1)
    rest, rest_q = (value.masked_fill(top_TE, -torch.inf).logsumexp(1) for value in (before, after))
    return inside + torch.where(rest > -torch.inf, rest.exp() * (rest - rest_q), 0.0)


def align_router(
    w_EH: Tensor, x_TH: Tensor, ids_Tk: Tensor, bits: int, *, score: str, bias_E: Tensor | None, counted: Divergence, stored: torch.dtype,
    ratios: int = RATIOS,
) -> AlignedRouter:  # fmt: skip
    """Round a router's weight, its clipping ratios chosen by L.

    Args:
        w_EH: the weight. x_TH: what arrives at it. ids_Tk: what the model chooses with it.
        bits: 2 to 8. score: one of `SCORES`. bias_E: added to the logits, not rounded.
        counted: how the divergence of the probabilities counts in L.
        stored: the type that the result is rounded to, before it is judged. ratios: how many clipping ratios are tried.
    """
    tried = clip_ratios(ratios)
    w, x, ids = w_EH.float(), *_sample(x_TH, ids_Tk, len(w_EH) * ratios)
    candidates = [rounded(w, ratio, bits, stored) for ratio in tried]
    logits = x @ w.T
    table = torch.stack([x @ (q.float() - w).T for q in candidates], 2)  # [T, E, R] errors of the logits
    z = logits.double() if bias_E is None else logits.double() + bias_E.double()
    log_score = SCORES[score]
    top, energy = top_experts(log_score(z), ids, counted.share), float(logits.double().square().sum())
    descent = _Descent(z, log_score, table, top, energy, counted.weight)
    common = [descent.loss(torch.full((len(w),), r)) for r in range(ratios)]
    chosen, loss, sweeps = descent.run(torch.full((len(w),), common.index(min(common))))
    value = torch.stack([candidates[r][e] for e, r in enumerate(chosen.tolist())])
    return AlignedRouter(value, [tried[r] for r in chosen.tolist()], common[0], loss, sweeps)


def rounded(w_EH: Tensor, ratio: float, bits: int, stored: torch.dtype) -> Tensor:
    """[E, H] in `stored`: the weight on the asymmetric grid of each row that covers `ratio` of its range."""
    scheme, width = UniformGrid(-1, symmetric=False), as_bits(bits, 1)
    scale, zero = clipped_grid(w_EH.float().unsqueeze(0), ratio, width, scheme)
    codes = round_to_grid(w_EH.float().unsqueeze(0), scale, zero, width, scheme)
    return (scale * (codes.float() - zero))[0].to(stored)


def clip_ratios(count: int = RATIOS) -> tuple[float, ...]:
    """Shares of a row's range that are tried, from 1 down to `NARROWEST` in even steps."""
    return tuple(1.0 - (1.0 - NARROWEST) * step / (count - 1) for step in range(count))


def search_rounded(w_EH: Tensor, bits: int, stored: torch.dtype, ratios: int = RATIOS) -> Tensor:
    """[E, H] in `stored`: rounded to nearest, each row with the clipping ratio whose rounding error is least; looks at no tokens."""
    candidates = torch.stack([rounded(w_EH, ratio, bits, stored) for ratio in clip_ratios(ratios)])
    best = (candidates.float() - w_EH.float()).square().sum(2).argmin(0)
    return candidates[best, torch.arange(len(w_EH))]


def _sample(x_TH: Tensor, ids_Tk: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(inputs, chosen experts) of as many tokens, evenly spaced, as the table has room for."""
    rows = evenly_spaced(len(x_TH), max(1, TABLE_VALUES // columns))
    return x_TH[rows].float(), ids_Tk[rows]


@dataclass(frozen=True)
class _Descent:
    """Coordinate descent over the ratios of a router's rows.

    Attributes:
        z: [T, E] logits before, float64. table: [T, E, R] what each ratio adds to them. top: [T, E] as `top_experts`.
        energy: |W X|^2. weight: lambda.
    """

    z: Tensor
    log_score: Callable[[Tensor], Tensor]
    table: Tensor
    top: Tensor
    energy: float
    weight: float

    def loss(self, choice_E: Tensor) -> float:
        """L of one ratio (its number) for each expert."""
        error = self.table.gather(2, choice_E.view(1, -1, 1).expand(len(self.table), -1, 1))[..., 0].double()
        divergence = kl_top(self.log_score(self.z), self.log_score(self.z + error), self.top)
        return float(error.square().sum()) / max(self.energy, 1e-30) + self.weight * float(divergence.mean())

    def run(self, choice_E: Tensor) -> tuple[Tensor, float, int]:
        """(choice, L, sweeps): each expert in turn takes the ratio that is best with the others as they are, until none moves."""
        choice, sweeps = choice_E.clone(), 0
        current = self.log_score(self.z + self._errors(choice))
        for _ in range(MAX_SWEEPS):
            moved, sweeps = False, sweeps + 1
            for e in range(len(choice)):
                losses = self._losses(e, current)
                best = int(losses.argmin())
                if float(losses[best]) < float(losses[choice[e]]):
                    choice[e], moved = best, True
                    current[:, e] = self.log_score(self.z[:, e] + self.table[:, e, best].double())
            if not moved:
                break
        return choice, self.loss(choice), sweeps

    def _errors(self, choice_E: Tensor) -> Tensor:
        return self.table.gather(2, choice_E.view(1, -1, 1).expand(len(self.table), -1, 1))[..., 0].double()

    def _losses(self, e: int, current_TE: Tensor) -> Tensor:
        """[R] the part of L that changes with the ratio of expert e, up to a constant."""
        error = self.table[:, e].double()  # [T, R]
        u = self.log_score(self.z[:, e, None] + error)
        p, top = self.log_score(self.z).softmax(1), self.top
        others = torch.arange(self.z.shape[1]) != e
        inside = current_TE.masked_fill(~(top & others), -torch.inf).logsumexp(1, keepdim=True).expand_as(u)
        outside = current_TE.masked_fill(~(~top & others), -torch.inf).logsumexp(1, keepdim=True).expand_as(u)
        mine = top[:, e, None]
        inside, outside = torch.where(mine, torch.logaddexp(inside, u), inside), torch.where(mine, outside, torch.logaddexp(outside, u))
        everything, mass = torch.logaddexp(inside, outside), torch.where(top, p, 0.0).sum(1, keepdim=True)
        rest = torch.where(top, 0.0, p).sum(1, keepdim=True)
        cross = -torch.where(mine, p[:, e, None] * u, 0.0) + mass * everything
        bucket = torch.where(rest > 0, rest * (outside - everything), 0.0)
        return error.square().sum(0) / max(self.energy, 1e-30) + self.weight * (cross - bucket).mean(0)
