"""Calibration balance: which windows there are to draw from, and who draws how many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebit.calibration.text import TokenText, calibration_windows
from moebit.methods.balance import draw, further_windows


def numbered(windows: int, length: int, first: int) -> Tensor:
    """Tokens of a text, each the number of its window."""
    return torch.arange(first, first + windows).repeat_interleave(length)


def test_the_pool_is_what_the_calibration_set_leaves_texts_in_turn() -> None:
    texts = [numbered(12, 5, 0), numbered(30, 5, 100)]
    for seed in range(3):
        base = calibration_windows([TokenText(name, ids, None) for name, ids in zip("ab", texts, strict=True)], 5, 5, seed)[:, 0].tolist()
        pool = further_windows(texts, 5, 5, seed, times=3)[:, 0].tolist()
        assert not set(base) & set(pool)
        assert len(set(pool)) == len(pool)
        assert [number >= 100 for number in pool] == [False, True] * 6 + [False] * 3  # 3 x 3 of a's shares, 3 x 2 of b's
        assert pool == further_windows(texts, 5, 5, seed, times=3)[:, 0].tolist()
    assert further_windows(texts, 5, 5, 0, 3)[:, 0].tolist() != further_windows(texts, 5, 5, 1, 3)[:, 0].tolist()


def test_a_text_that_is_used_up_leaves_an_empty_pool() -> None:
    assert further_windows([numbered(4, 6, 0)], 4, 6, 0, times=4).shape == (0, 6)
    assert len(further_windows([numbered(7, 6, 0)], 4, 6, 0, times=4)) == 3


def naive_draw(counts: list[int], ids: Tensor, length: int, ratio: float) -> tuple[list[int], list[list[int]]]:
    """Expert by expert, window by window: (tokens that each has in the end, ids with E where the expert does not take the token)."""
    experts, top_k = len(counts), ids.shape[1]
    wanted, have = ratio * top_k * length / experts, list(counts)
    taken = [[experts] * top_k for _ in ids]
    for e in range(experts):
        for start in range(0, len(ids), length):
            if have[e] >= wanted:
                break
            for t in range(start, start + length):
                for slot in range(top_k):
                    if int(ids[t, slot]) == e:
                        have[e] += 1
                        taken[t][slot] = e
    return have, taken


@pytest.mark.parametrize("ratio", [0.5, 2.0, 100.0])
def test_each_expert_draws_until_it_has_enough(ratio: float) -> None:
    g = torch.Generator().manual_seed(0)
    length, experts = 8, 6
    scores = torch.rand(10 * length, experts, generator=g) + torch.tensor([0.0, -0.2, 0.3, -5.0, -0.6, 0.1])  # one is never chosen
    ids = scores.topk(2, 1).indices
    counts = torch.tensor([3, 0, 40, 0, 1, 6])
    have, taken = naive_draw(counts.tolist(), ids, length, ratio)
    result = draw(counts, ids, length, ratio)
    assert result.after.tolist() == have
    assert result.ids.tolist() == taken
    described = result.describe()
    assert described["drawn"] == [a - b for a, b in zip(have, counts.tolist(), strict=True)]
    assert described["short_after"] == sum(value < ratio * 2 * length / experts for value in have)
    assert int(result.after[3]) == 0


def test_unused_slots_belong_to_nobody() -> None:
    ids = torch.tensor([[0, -1], [1, 4], [0, 1], [0, -1]])
    result = draw(torch.zeros(4, dtype=torch.int64), ids, 2, 100.0)
    assert result.after.tolist() == [3, 2, 0, 0]
    assert result.ids.tolist() == [[0, 4], [1, 4], [0, 1], [0, 4]]
