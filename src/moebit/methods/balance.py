"""Calibration data balance: experts that the calibration text leaves short get further tokens of their own.

Source: EAQuant (arXiv 2506.13329), its section on calibration data balance. An expert with fewer than

    r k L / E

tokens in the calibration set (L tokens in one window, k of E experts per token, r = 2 in the paper) draws further windows, one after
the other, until it has as many or the pool ends. What it draws calibrates this expert alone; all others keep the calibration set.

Departures: the pool is a fixed number of further windows of the same texts (`calibration.pool` times the calibration set), so that the
work is bounded and the same seed gives the same tokens. It runs through the quantized layers beside the calibration set. Windows of
different texts alternate in it.

Shape suffixes: P windows of the pool, L tokens of a window, k experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor


def further_windows(texts: Sequence[Tensor], samples: int, length: int, seed: int, times: int) -> Tensor:
    """int64 [P, length]: windows that `calibration_windows` with the same arguments leaves, at most `times` as many as it takes.

    They are in the order in which they are drawn: one of every text in turn.

    Args:
        texts: int64 token ids of each text.
    """
    generator = torch.Generator().manual_seed(seed)
    columns: list[list[Tensor]] = []
    for number, text in enumerate(texts):
        share = samples // len(texts) + (number < samples % len(texts))
        available = len(text) // length
        windows = text[: available * length].view(available, length)
        order = torch.randperm(available, generator=generator)
        columns.append(list(windows[order[share : (1 + times) * share]]))
    drawn = [window for row in zip_longest(*columns) for window in row if window is not None]
    return torch.stack(drawn) if drawn else torch.empty(0, length, dtype=torch.int64)


@dataclass(frozen=True)
class Drawn:
    """What the experts of a layer drew from the pool.

    Attributes:
        wanted: tokens that an expert should have. before, after: int64 [E] tokens that it has.
        ids: int64 [P L, k] the pool's chosen experts, E in place of those that do not take this token.
    """

    wanted: float
    before: Tensor
    after: Tensor
    ids: Tensor

    def describe(self) -> dict[str, object]:
        """What the report says of it."""
        return {
            "wanted": self.wanted,
            "short_before": int((self.before < self.wanted).sum()),
            "short_after": int((self.after < self.wanted).sum()),
            "drawn": (self.after - self.before).tolist(),
        }


def draw(counts_E: Tensor, pool_ids: Tensor, length: int, ratio: float) -> Drawn:
    """Which tokens of the pool each expert takes.

    Args:
        counts_E: int64, tokens per expert in the calibration set. pool_ids: int64 [P L, k]. ratio: r.
    """
    experts, top_k = len(counts_E), pool_ids.shape[1]
    wanted = ratio * top_k * length / experts
    windows = pool_ids.view(-1, length * top_k)
    counted = [torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts) for ids in windows]
    per_window = torch.stack(counted) if counted else torch.zeros(0, experts, dtype=torch.int64)  # [P, E]
    have = counts_E + torch.cat([torch.zeros(1, experts, dtype=torch.int64), per_window.cumsum(0)])  # after 0 ... P windows
    windows_drawn = (have[:-1] < wanted).sum(0)  # it draws the next one as long as it has too few
    after = have.gather(0, windows_drawn[None])[0]
    number = torch.arange(len(pool_ids)) // length
    inside = pool_ids.clamp(0, experts - 1)
    takes = (number[:, None] < windows_drawn[inside]) & (pool_ids == inside)
    return Drawn(wanted, counts_E, after, pool_ids.masked_fill(~takes, experts))
