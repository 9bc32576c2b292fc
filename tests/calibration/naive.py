"""The oracle of sampling: MoEQuant's search and its imbalance as plain loops over single candidates, everything computed anew each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Forward = Callable[[tuple[int, ...]], tuple[list[float], list[list[int]]]]


def naive_sigma(shares: list[float]) -> float:
    e = len(shares)
    return math.sqrt(e / (e - 1) * sum((u - 1 / e) ** 2 for u in shares))


def naive_imbalance(counts: list[list[int]]) -> float:
    """Mean over the layers."""
    return sum(naive_sigma([c / sum(layer) for c in layer]) for layer in counts) / len(counts)


def normalised(values: list[float]) -> list[float]:
    top = max(values)
    total = top + math.log(sum(math.exp(v - top) for v in values))
    return [v - total for v in values]


def naive_log_probabilities(logits: list[float], tokens: list[int], rules: Any) -> list[float]:
    likely = normalised(logits)
    for token in range(len(likely)):
        if token in tokens:
            likely[token] *= rules.repetition_penalty
        if token in rules.banned:
            likely[token] = -math.inf
        n = rules.no_repeat_ngram
        if n:
            gram = [*tokens[len(tokens) - n + 1 :], token] if len(tokens) >= n - 1 else None
            if gram is not None and any(tokens[i : i + n] == gram for i in range(len(tokens) - n + 1)):
                likely[token] = -math.inf
    return normalised(likely)


@dataclass(frozen=True)
class Candidate:
    tokens: tuple[int, ...]
    total: float
    counted: int
    score: float


def naive_ebss(forward: Forward, restarts: list[list[int]], rules: Any, *, width: int, tau: float, scope: str) -> list[list[int]]:
    """The best sequence of each row of restarts.

    Args:
        forward: (logits behind the last token, counts [layers][experts] of all tokens) of a sequence.
    """
    beams = [[Candidate((row[0],), 0.0, 1, 0.0)] for row in restarts]
    for t in range(1, len(restarts[0])):
        best = [min(beam, key=lambda c: c.score) for beam in beams]
        beams = [extended(forward, n, beams[n], best, restarts[n][t], rules, width, tau, scope) for n in range(len(beams))]
    return [list(min(beam, key=lambda c: c.score).tokens) for beam in beams]


def extended(
    forward: Forward, n: int, beam: list[Candidate], best: list[Candidate], restart: int, rules: Any, width: int, tau: float, scope: str
) -> list[Candidate]:
    children = []
    for candidate in beam:
        logits, counts = forward(candidate.tokens)
        sigma = naive_imbalance(counts)
        if scope == "set" and len(best) > 1:
            layers = []
            for layer, mine in enumerate(counts):
                others = [0] * len(mine)
                for m, other in enumerate(best):
                    if m != n:
                        others = [a + b for a, b in zip(others, forward(other.tokens)[1][layer], strict=True)]
                u = [(a / sum(mine) + b / sum(others)) / 2 for a, b in zip(mine, others, strict=True)]
                layers.append(naive_sigma(u))
            sigma = sum(layers) / len(layers)
        if candidate.tokens[-1] in rules.ends:
            mean = candidate.total / candidate.counted
            children.append(Candidate((*candidate.tokens, restart), candidate.total, candidate.counted, -mean + sigma / tau))
            continue
        for token, likely in enumerate(naive_log_probabilities(logits, list(candidate.tokens), rules)):
            total, counted = candidate.total + likely, candidate.counted + 1
            children.append(Candidate((*candidate.tokens, token), total, counted, -total / counted + sigma / tau))
    return sorted(children, key=lambda c: c.score)[:width]
