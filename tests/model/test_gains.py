"""Norms that multiply by their weight, and those that do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebit.model.gains import shifted_gain


class PlainNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight


class ShiftedNorm(PlainNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class GatedNorm(PlainNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


def test_shifted_gain() -> None:
    with torch.device("meta"):
        plain = nn.ModuleDict({"a": PlainNorm(8), "b": GatedNorm(8), "c": nn.RMSNorm(8), "d": nn.Linear(4, 4)})
        shifted = nn.ModuleDict({"a": PlainNorm(8), "inner": nn.ModuleDict({"b": ShiftedNorm(8)})})
    assert shifted_gain(plain) is None
    assert shifted_gain(shifted) == "inner.b"
