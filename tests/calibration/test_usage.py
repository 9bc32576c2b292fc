"""Use of experts, its imbalance, and choosing sequences by it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moebit.calibration.usage import add_usage, balanced_subset, describe_windows, distinct_ngrams, imbalance, no_usage, shares
from moebit.model.opening import open_hub_checkpoint
from moebit.model.structure import find_structure
from tests.calibration.naive import naive_imbalance, naive_sigma
from tests.support.models import ARCHITECTURES, EXPERTS, LENGTH, WINDOWS, Checkpoints, windows


def test_sigma_runs_from_nought_to_one() -> None:
    for e in (2, 8, 24):
        even, one = torch.full((1, e), 1 / e), torch.eye(e)[:1]
        assert float(imbalance(even, [e])) == pytest.approx(0, abs=1e-7)
        assert float(imbalance(one, [e])) == pytest.approx(1)


def test_std_is_sigma_by_the_root_of_the_experts() -> None:
    """The paper's tables give the sample standard deviation of the shares."""
    u = shares(torch.tensor([[3, 1, 0, 4, 9, 2]]))
    assert float(imbalance(u, [6])) / math.sqrt(6) == pytest.approx(float(u.std(correction=1)))


def test_layers_with_different_numbers_of_experts() -> None:
    counts = torch.tensor([[5, 1, 2, 2], [7, 3, 0, 0]])
    assert float(imbalance(shares(counts), [4, 2])) == pytest.approx((naive_sigma([0.5, 0.1, 0.2, 0.2]) + naive_sigma([0.7, 0.3])) / 2)


def test_empty_slots_are_not_counted() -> None:
    counts = no_usage(2, [4])
    add_usage(counts, [torch.tensor([[0, 3, 3], [4, -1, 2]])])
    assert counts.tolist() == [[[1, 0, 0, 2]], [[0, 0, 1, 0]]]


def naive_greedy(counts: list[list[list[int]]], size: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(size):
        judged = {}
        for s in range(len(counts)):
            if s not in chosen:
                together = [
                    [sum(values) for values in zip(*layer, strict=True)] for layer in zip(*(counts[i] for i in [*chosen, s]), strict=True)
                ]
                judged[s] = naive_imbalance(together)
        chosen.append(min(judged, key=lambda s: judged[s]))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_subset_is_greedy(seed: int) -> None:
    counts = torch.randint(0, 30, (9, 2, 4), generator=torch.Generator().manual_seed(seed))
    assert balanced_subset(counts, [4, 4], 5).tolist() == naive_greedy(counts.tolist(), 5)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_subset_is_between_the_best_there_is_and_the_middle(seed: int) -> None:
    counts = torch.randint(0, 30, (10, 1, 4), generator=torch.Generator().manual_seed(seed))
    judged = sorted(float(imbalance(shares(counts[list(s)].sum(0)), [4])) for s in itertools.combinations(range(10), 4))
    chosen = float(imbalance(shares(counts[balanced_subset(counts, [4], 4)].sum(0)), [4]))
    assert judged[0] <= chosen <= judged[len(judged) // 2]


def test_balanced_subset_where_greedy_is_best() -> None:
    """Six sequences that each use one expert: only one of each kind is even."""
    counts = torch.eye(3, dtype=torch.int32)[[0, 0, 0, 1, 1, 2]].unsqueeze(1)
    assert balanced_subset(counts, [3], 3).tolist() == [0, 3, 5]


def test_distinct_ngrams() -> None:
    assert distinct_ngrams(torch.tensor([[1, 2, 3, 4, 5]])) == 1
    assert distinct_ngrams(torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 1]])) == 3 / 6


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_windows_against_transformers(checkpoints: Checkpoints, name: str) -> None:
    architecture = ARCHITECTURES[name]
    reference = checkpoints.reference(architecture)
    checkpoint = open_hub_checkpoint(checkpoints.path(architecture))
    found = describe_windows(checkpoint, find_structure(checkpoint.model), windows(), [7], 4 * 2**30)
    counts = {index: [int((routed.ids == e).sum()) for e in range(EXPERTS)] for index, routed in reference.routed.items()}
    assert {row["layer"]: row["sigma"] for row in found["per_layer"]} == {
        index: pytest.approx(naive_imbalance([row])) for index, row in counts.items()
    }
    assert found["sigma"] == pytest.approx(sum(naive_imbalance([row]) for row in counts.values()) / len(counts))
    assert found["std"] == pytest.approx(found["sigma"] / math.sqrt(EXPERTS))
    every = sorted(count for row in counts.values() for count in row)
    middle = (every[len(every) // 2 - 1] + every[len(every) // 2]) / 2
    assert found["tokens_per_expert"] == {"min": every[0], "median": middle, "max": every[-1]}
    assert found["unseen"] == every.count(0)
    assert found["tokens"] == WINDOWS * LENGTH
    nats, tokens = 0.0, 0
    for row, window in enumerate(windows().tolist()):
        for t in range(1, LENGTH):
            if window[t - 1] != 7:
                nats -= float(reference.logits[row, t - 1].double().log_softmax(-1)[window[t]])
                tokens += 1
    assert tokens < WINDOWS * (LENGTH - 1)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
