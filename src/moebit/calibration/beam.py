"""EBSS, expert-balanced self-sampling (MoEQuant, arXiv 2505.03804, §3.2): a beam search for likely text that uses the experts evenly.

At every step the w best extensions over all candidates of a sequence are kept, by the score (smaller is better)

    score(c + v) = -(RS(c) + log p(v | c)) / (|c| + 1) + sigma(c) / tau

with RS the cumulative log-probability, |c| the tokens of c, its random first one counted, and sigma its imbalance (`usage.py`).
Departures and choices:
- The imbalance is the parent's: a child's routing is known only after its own forward. Given that, only the w likeliest tokens of each
  candidate can survive, so that looking at w * w extensions is exact.
- `scope: set` judges u = (candidate's shares + shares of the other sequences' best candidates) / 2; `sequence` is the paper.
- `extend: sampled` (ours, the default of `moebit sample`) looks at w tokens drawn from each candidate's distribution, without
  replacement, instead of its w likeliest: text like that of plain sampling, of which the beam keeps what is balanced. The likeliest text
  of a model is dull and the same everywhere.
- Behind an end of text a sequence goes on from a new random token, which counts neither in RS nor in |c|.
- A repetition penalty multiplies the log-probabilities of tokens that the candidate holds already; tokens that would repeat an n-gram of it
  are left out; both before the probabilities are made to sum to one again. Off in the paper.

Shape suffixes: N sequences, W candidates of each, B = N*W rows, T tokens so far, V vocabulary, K extensions of a candidate, M layers,
E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.calibration.usage import Progress, add_usage, imbalance, no_usage, shares
from moebit.model.decoder import Decoder


@dataclass(frozen=True)
class Rules:
    """What may be written.

    Attributes:
        ends: ids that end a text. banned: ids that are never written.
        repetition_penalty: 1 for none. no_repeat_ngram: length of the n-grams that no sequence may hold twice; 0 for none.
    """

    ends: tuple[int, ...]
    banned: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0


def log_probabilities(logits_BV: Tensor, tokens_BT: Tensor, rules: Rules) -> Tensor:
    """[B, V] log-probabilities of the next token under the rules."""
    likely = logits_BV.log_softmax(-1)
    changed = bool(rules.banned)
    if rules.banned:
        likely[:, list(rules.banned)] = -math.inf
    if rules.repetition_penalty != 1:
        changed = True
        likely.scatter_(1, tokens_BT, likely.gather(1, tokens_BT) * rules.repetition_penalty)
    if rules.no_repeat_ngram:
        changed = True
        row_R, token_R = repeating(tokens_BT, rules.no_repeat_ngram)
        likely[row_R, token_R] = -math.inf
    return likely.log_softmax(-1) if changed else likely


def repeating(tokens_BT: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(rows, tokens): what would complete an n-gram that the row holds already."""
    length = tokens_BT.shape[1]
    if length < n:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    same = torch.ones(len(tokens_BT), length - n + 1, dtype=torch.bool)
    for i in range(n - 1):
        same &= tokens_BT[:, i : length - n + 1 + i] == tokens_BT[:, length - n + 1 + i].unsqueeze(1)
    rows, places = same.nonzero(as_tuple=True)
    return rows, tokens_BT[rows, places + n - 1]


def force(likely_BV: Tensor, ended_B: Tensor, restart_B: Tensor) -> Tensor:
    """Where a row has ended, its random token is the only one possible."""
    if not bool(ended_B.any()):
        return likely_BV
    only = torch.full_like(likely_BV, -math.inf).scatter_(1, restart_B.unsqueeze(1), 0.0)
    return torch.where(ended_B.unsqueeze(1), only, likely_BV)


def extensions(likely_BV: Tensor, count: int, noise: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(log-probabilities, tokens), [B, K] each: the likeliest, or drawn without replacement (the largest with Gumbel noise added)."""
    if noise is None:
        likeliest = likely_BV.topk(count)
        return likeliest.values, likeliest.indices
    drawn = torch.empty(likely_BV.shape, dtype=likely_BV.dtype, device="cpu").exponential_(generator=noise)
    gumbel_BV = -drawn.to(likely_BV.device).log()
    token_BK = (likely_BV + gumbel_BV).topk(count).indices
    return likely_BV.gather(1, token_BK), token_BK


def score(sum_NW: Tensor, length_NW: Tensor, added_NWK: Tensor, counted_NW: Tensor, sigma_NW: Tensor, temperature: float) -> Tensor:
    """[N, W, K] scores of the extensions; smaller is better.

    Args:
        sum_NW: RS. length_NW: |c|. added_NWK: log p(v | c). counted_NW: 1, or 0 where the extension is a random restart.
    """
    mean = (sum_NW.unsqueeze(2) + added_NWK) / (length_NW + counted_NW).unsqueeze(2)
    return -mean + (sigma_NW / temperature).unsqueeze(2)


def judge(counts_NWME: Tensor, best_N: Tensor, done_ME: Tensor, experts: Sequence[int], scope: str) -> Tensor:
    """[N, W] imbalance of the candidates.

    Args:
        best_N: each sequence's best candidate. done_ME: usage of sequences that are finished.
    """
    own = shares(counts_NWME)
    if scope == "sequence":
        return imbalance(own, experts)
    best_NME = counts_NWME[torch.arange(len(best_N)), best_N].long()
    others_NME = best_NME.sum(0) + done_ME - best_NME
    if not bool(others_NME.any()):
        return imbalance(own, experts)
    return imbalance((own + shares(others_NME).unsqueeze(1)) / 2, experts)


def places(parent_NW: Tensor) -> Tensor:
    """int64 [N, W] which child goes to which place: a parent's first child takes its place, so that few rows move.

    Returns:
        `order`: place w gets child order[n, w].
    """
    width = parent_NW.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril(-1)
    first_NW = ~((parent_NW.unsqueeze(2) == parent_NW.unsqueeze(1)) & earlier).any(2)
    taken_NW = torch.zeros_like(first_NW).scatter_(1, parent_NW, True)
    free_NW = taken_NW.long().argsort(dim=1, stable=True)  # places that no child keeps come first
    rank = (~first_NW).long().cumsum(1) - 1
    place_NW = torch.where(first_NW, parent_NW, free_NW.gather(1, rank.clamp(min=0)))
    return place_NW.argsort(1)


@dataclass
class Beam:
    """The candidates of a group of sequences.

    Attributes:
        tokens: int64 [N, W, L], filled up to `length`. sums: float64 [N, W], RS. counted: float64 [N, W], |c|.
        scores: float64 [N, W], that of each candidate when it was chosen; infinite for candidates that are not there yet.
        counts: int32 [B, M, E].
    """

    tokens: Tensor
    sums: Tensor
    counted: Tensor
    scores: Tensor
    counts: Tensor
    length: int = 1

    @classmethod
    def begin(cls, restarts_NL: Tensor, width: int, experts: Sequence[int]) -> Beam:
        """One candidate each, of one random token."""
        n, length = restarts_NL.shape
        scores = torch.full((n, width), math.inf, dtype=torch.float64)
        scores[:, 0] = 0
        tokens = torch.zeros(n, width, length, dtype=torch.int64)
        tokens[:, :, 0] = restarts_NL[:, :1]
        ones = torch.ones(n, width, dtype=torch.float64)
        return cls(tokens, ones * 0, ones, scores, no_usage(n * width, experts))

    @property
    def rows(self) -> Tensor:
        """[B, T] tokens so far."""
        return self.tokens.flatten(0, 1)[:, : self.length]

    @property
    def best(self) -> Tensor:
        """int64 [N] each sequence's best candidate."""
        return self.scores.argmin(1)

    def extend(self, score_NWK: Tensor, added_NWK: Tensor, token_NWK: Tensor, counted_NW: Tensor) -> Tensor:
        """Keep the best extensions; returns [B] which row each row comes from."""
        n, width, k = score_NWK.shape
        kept = score_NWK.flatten(1).topk(width, dim=1, largest=False, sorted=True)
        parent = kept.indices // k
        picked = kept.indices.gather(1, order := places(parent))
        parent = parent.gather(1, order)
        self.scores = kept.values.gather(1, order)
        self.sums = self.sums.gather(1, parent) + added_NWK.flatten(1).gather(1, picked)
        self.counted = (self.counted + counted_NW).gather(1, parent)
        self.tokens[:, :, : self.length] = self.tokens[:, :, : self.length].gather(1, parent.unsqueeze(2).expand(-1, -1, self.length))
        self.tokens[:, :, self.length] = token_NWK.flatten(1).gather(1, picked)
        self.length += 1
        source = (parent + width * torch.arange(n).unsqueeze(1)).flatten()
        moved = (source != torch.arange(len(source))).nonzero().flatten()
        self.counts[moved] = self.counts[source[moved]]
        return source


def ebss(
    decoder: Decoder,
    restarts_NL: Tensor,
    rules: Rules,
    *,
    width: int,
    temperature: float,
    scope: str,
    done_ME: Tensor | None = None,
    noise: torch.Generator | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Write one sequence from each row's first random token; all of them and all their candidates advance together.

    Args:
        decoder: loaded. restarts_NL: random tokens, the first one of a sequence and those that it goes on from behind an end of text.
        temperature: tau, the weight of likelihood against balance. scope: `set` or `sequence`.
        done_ME: usage of sequences written before, which `set` counts in. noise: draws extensions; None takes the likeliest.

    Returns:
        int64 [N, L] tokens and int32 [N, M, E] what experts all but the last of them used.
    """
    report = progress or (lambda what, done, total: None)
    n, length = restarts_NL.shape
    experts, ends = decoder.experts, torch.tensor(rules.ends, dtype=torch.int64)
    beam = Beam.begin(restarts_NL, width, experts)
    done_ME = torch.zeros_like(beam.counts[0], dtype=torch.int64) if done_ME is None else done_ME
    decoder.start(length)
    for t in range(1, length):
        report("tokens", t, length)
        last_B = beam.rows[:, -1]
        logits_BV, routed = decoder.step(last_B)
        add_usage(beam.counts, routed)
        ended_B = torch.isin(last_B, ends)
        likely_BV = force(log_probabilities(logits_BV, beam.rows, rules), ended_B, restarts_NL[:, t].repeat_interleave(width))
        added_BK, token_BK = extensions(likely_BV, min(width, likely_BV.shape[1]), noise)
        sigma_NW = judge(beam.counts.unflatten(0, (n, width)), beam.best, done_ME, experts, scope)
        counted_NW = (~ended_B).view(n, width).double()
        added_NWK = added_BK.double().view(n, width, -1)
        scores = score(beam.sums, beam.counted, added_NWK, counted_NW, sigma_NW, temperature)
        scores = scores.masked_fill(beam.scores.isinf().unsqueeze(2), math.inf)
        source_B = beam.extend(scores, added_NWK, token_BK.view(n, width, -1), counted_NW)
        if t < length - 1:
            decoder.reorder(source_B)
    report("tokens", length, length)
    chosen = torch.arange(n), beam.best
    return beam.tokens[chosen], beam.counts.unflatten(0, (n, width))[chosen]


def ancestral(
    decoder: Decoder,
    restarts_NL: Tensor,
    uniform_NL: Tensor,
    rules: Rules,
    *,
    temperature: float,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain sampling: every token drawn from the model's own distribution.

    Args:
        uniform_NL: float64 in [0, 1), one for every draw: token v is drawn where it lies between the cumulative probabilities of v - 1
            and v.

    Returns:
        As `ebss`.
    """
    report = progress or (lambda what, done, total: None)
    n, length = restarts_NL.shape
    ends = torch.tensor(rules.ends, dtype=torch.int64)
    tokens_NL, counts_NME = restarts_NL.clone(), no_usage(n, decoder.experts)
    decoder.start(length)
    for t in range(1, length):
        report("tokens", t, length)
        logits_NV, routed = decoder.step(tokens_NL[:, t - 1])
        add_usage(counts_NME, routed)
        likely_NV = log_probabilities(logits_NV / temperature, tokens_NL[:, :t], rules)
        drawn_N = draw(likely_NV, uniform_NL[:, t])
        tokens_NL[:, t] = torch.where(torch.isin(tokens_NL[:, t - 1], ends), restarts_NL[:, t], drawn_N)
    report("tokens", length, length)
    return tokens_NL, counts_NME


def draw(likely_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """int64 [N]: inverse of the cumulative distribution; never a token without probability."""
    up_to_NV = likely_NV.double().exp().cumsum(1)
    target_N1 = (uniform_N.double() * up_to_NV[:, -1]).unsqueeze(1)
    return torch.searchsorted(up_to_NV, target_N1, right=True).squeeze(1).clamp(max=likely_NV.shape[1] - 1)
