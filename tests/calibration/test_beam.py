"""The parts of the beam against loops over single candidates, and the beam as a whole against the enumeration of all sequences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.calibration.beam import Rules, ancestral, draw, ebss, extensions, judge, log_probabilities, places, repeating, score
from tests.calibration.naive import naive_log_probabilities, naive_sigma

VOCABULARY = 3
EXPERT_OF = [0, 1, 1]  # of every token


class Markov:
    """Stands for a model with one layer of two experts: the last token alone says what comes next and which expert is used."""

    experts = (2,)

    def __init__(self, table: np.ndarray) -> None:
        self.table = torch.tensor(table)  # [V, V] log-probabilities

    def start(self, capacity: int) -> None:
        self.tokens: Tensor | None = None

    def step(self, tokens_B: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.tokens = tokens_B.unsqueeze(1) if self.tokens is None else torch.cat([self.tokens, tokens_B.unsqueeze(1)], 1)
        return self.table[self.tokens[:, -1]], [torch.tensor(EXPERT_OF)[tokens_B].unsqueeze(1)]

    def reorder(self, rows_B: Tensor) -> None:
        assert self.tokens is not None
        self.tokens = self.tokens[rows_B]


def table(seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def value(sequence: tuple[int, ...], likely: np.ndarray, tau: float) -> float:
    """The score of a whole sequence, written out: mean log-probability over all its tokens, imbalance of all but the last."""
    total = sum(likely[a, b] for a, b in itertools.pairwise(sequence))
    first = sum(EXPERT_OF[token] == 0 for token in sequence[:-1]) / (len(sequence) - 1)
    sigma = math.sqrt(2 / 1 * ((first - 0.5) ** 2 + (1 - first - 0.5) ** 2))
    return -total / len(sequence) + sigma / tau


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tau", [0.2, 1.2, 20.0])
def test_a_beam_that_drops_nothing_finds_the_best_sequence(seed: int, tau: float) -> None:
    likely, length = table(seed), 4
    every = {
        start: min(
            ((start, *rest) for rest in itertools.product(range(VOCABULARY), repeat=length - 1)), key=lambda s: value(s, likely, tau)
        )
        for start in range(VOCABULARY)
    }
    restarts = torch.tensor([[start] * length for start in every])
    found, usage = ebss(Markov(likely), restarts, Rules(()), width=VOCABULARY ** (length - 1), temperature=tau, scope="sequence")  # type: ignore[arg-type]
    assert [tuple(row) for row in found.tolist()] == list(every.values())
    for sequence, counts in zip(every.values(), usage.tolist(), strict=True):
        assert counts == [[sum(EXPERT_OF[token] == expert for token in sequence[:-1]) for expert in (0, 1)]]


def test_balance_outweighs_likelihood_as_the_temperature_falls() -> None:
    """Token 0 is by far the likeliest, but it always goes to expert 0."""
    likely = np.log(np.array([[0.9, 0.06, 0.04]] * 3))
    restarts = torch.zeros(1, 9, dtype=torch.int64)
    hot, _ = ebss(Markov(likely), restarts, Rules(()), width=4, temperature=1000.0, scope="sequence")  # type: ignore[arg-type]
    cold, usage = ebss(Markov(likely), restarts, Rules(()), width=4, temperature=0.01, scope="sequence")  # type: ignore[arg-type]
    assert hot.tolist() == [[0] * 9]
    assert usage.tolist() == [[[4, 4]]]
    assert cold.tolist() != hot.tolist()


def test_behind_an_end_comes_the_random_token() -> None:
    likely = np.log(np.array([[0.01, 0.01, 0.98]] * 3))
    restarts = torch.tensor([[0, 1, 0, 1, 0]])
    found, _ = ebss(Markov(likely), restarts, Rules(ends=(2,)), width=2, temperature=1e6, scope="sequence")  # type: ignore[arg-type]
    assert found.tolist() == [[0, 2, 0, 2, 0]]
    drawn, _ = ancestral(Markov(likely), restarts, torch.full((1, 5), 0.5, dtype=torch.float64), Rules(ends=(2,)), temperature=1.0)  # type: ignore[arg-type]
    assert drawn.tolist() == [[0, 2, 0, 2, 0]]


def test_random_restarts_do_not_count_in_the_score() -> None:
    """|c| and RS pass over them: of two candidates that are alike before and behind, the one with a restart is scored by its own tokens."""
    sums, counted = torch.tensor([[-2.0, -2.0]]), torch.tensor([[4.0, 4.0]])
    added, new = torch.tensor([[[-1.0], [0.0]]]), torch.tensor([[1.0, 0.0]])
    found = score(sums.double(), counted.double(), added.double(), new.double(), torch.zeros(1, 2), 1.0)
    assert found.flatten().tolist() == [3 / 5, 2 / 4]


def test_children_stay_in_their_parents_place() -> None:
    for width in (1, 2, 4):
        for parents in itertools.product(range(width), repeat=width):
            order = places(torch.tensor([parents]))[0].tolist()
            assert sorted(order) == list(range(width))
            assert sum(parents[child] == place for place, child in enumerate(order)) == len(set(parents))


def test_what_would_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 4):
        for length in (1, n - 1, n, 30):
            tokens = torch.randint(0, 3, (20, length), generator=generator)
            rows, found = repeating(tokens, n)
            wanted = set()
            for row, sequence in enumerate(tokens.tolist()):
                grams = {tuple(sequence[i : i + n]) for i in range(length - n + 1)}
                wanted |= {(row, token) for token in range(3) if tuple([*sequence[length - n + 1 :], token]) in grams}
            assert set(zip(rows.tolist(), found.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("rules", [Rules(()), Rules((), (1, 4)), Rules((), (), 1.3, 0), Rules((), (2,), 1.12, 3)])
def test_probabilities_under_rules(rules: Rules) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 5, (6, 12), generator=generator)
    found = log_probabilities(logits, tokens, rules).exp()
    for row in range(6):
        wanted = naive_log_probabilities(logits[row].tolist(), tokens[row].tolist(), rules)
        np.testing.assert_allclose(found[row].numpy(), [math.exp(v) for v in wanted], atol=1e-12)


@pytest.mark.parametrize("scope", ["sequence", "set"])
def test_imbalance_of_candidates(scope: str) -> None:
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 7, (3, 2, 2, 5), generator=generator, dtype=torch.int32)  # N, W, M, E
    counts[:, :, 1, 3:] = 0  # the second layer has three experts
    best, done = torch.tensor([1, 0, 1]), torch.randint(0, 9, (2, 5), generator=generator)
    done[1, 3:] = 0
    found = judge(counts, best, done, (5, 3), scope)
    for n, w in itertools.product(range(3), range(2)):
        layers = []
        for layer, experts in enumerate((5, 3)):
            own = counts[n, w, layer, :experts].double().numpy()
            u = own / own.sum()
            if scope == "set":
                others = sum(counts[m, best[m], layer, :experts].double().numpy() for m in range(3) if m != n)
                others = others + done[layer, :experts].double().numpy()
                u = (u + others / others.sum()) / 2
            layers.append(naive_sigma(u.tolist()))
        assert float(found[n, w]) == pytest.approx(sum(layers) / 2, abs=1e-12)


def test_draws_are_the_inverse_of_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64)
    for uniform, token in [(0.0, 1), (0.1999, 1), (0.2001, 3), (0.6999, 3), (0.7001, 4), (1 - 1e-12, 4)]:
        assert draw(p.log(), torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_sampled_extensions_are_drawn_without_replacement() -> None:
    """Of pairs drawn from (.5, .3, .2, 0), {a, b} comes with p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b)."""
    p = [0.5, 0.3, 0.2, 0.0]
    likely = torch.tensor(p, dtype=torch.float64).log().repeat(40000, 1)
    added, tokens = extensions(likely, 2, torch.Generator().manual_seed(0))
    assert torch.equal(added, likely.gather(1, tokens))
    pairs = [tuple(sorted(pair)) for pair in tokens.tolist()]
    for a, b in itertools.combinations(range(4), 2):
        wanted = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert pairs.count((a, b)) / len(pairs) == pytest.approx(wanted, abs=0.01)
    assert torch.equal(extensions(likely, 2, torch.Generator().manual_seed(0))[1], tokens)
