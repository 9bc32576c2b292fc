"""Tokens on which a regression is judged, because it did not see them."""

from __future__ import annotations

import torch
from torch import Tensor

HELD_OUT = 4  # every fourth window


def held_out_rows(tokens: int, length: int, every: int = HELD_OUT) -> Tensor:
    """bool [T]: one window of `length` tokens in `every`; the last tokens, as many as that share, where there are fewer windows."""
    number = torch.arange(tokens) // length
    if tokens // length >= every:
        return number % every == every - 1
    return torch.arange(tokens) >= tokens - tokens // every
