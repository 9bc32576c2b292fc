"""Samples that are spread evenly, so that they need no generator and are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(total: int, most: int) -> Tensor:
    """int64 [min(total, most)] rising indices of a range of `total`, as evenly spaced as whole numbers allow."""
    count = min(total, most)
    return (torch.arange(count) * total) // count
