"""Tokens on which a regression is judged, because it did not see them."""

from __future__ import annotations

import torch
from torch import Tensor

HELD_OUT = 4  # every fourth window


def held_out_rows(tokens: int, length: int) -> Tensor:
    """bool [T]: every fourth window of `length` tokens; the last quarter where there are fewer than four windows."""
    number = torch.arange(tokens) // length
    if tokens // length >= HELD_OUT:
        return number % HELD_OUT == HELD_OUT - 1
    return torch.arange(tokens) >= tokens - tokens // HELD_OUT
