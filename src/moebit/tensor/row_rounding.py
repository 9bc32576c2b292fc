"""Dynamic rounding of activations: every token's row is put on a grid of its own, as it comes.

The rounding is simulated: its result is a floating-point tensor that holds grid points. The grids are those of the weights
(`tensor/grids/uniform.py`), over the whole row instead of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """How a row of activations is rounded.

    Attributes:
        bits: 2 to 8. symmetric: no zero point, codes in [-2^(b-1), 2^(b-1) - 1].
        clip: share of the row's range that the grid covers; what lies beyond goes to its ends.
        float8: float8 e4m3 numbers instead of integers; 8 bits, symmetric.
        group_size: channels of a row that share a grid, -1 for all of them.
    """

    bits: int
    symmetric: bool
    clip: float = 1.0
    float8: bool = False
    group_size: int = -1

    def __call__(self, x: Tensor) -> Tensor:
        """[..., N], rounded. Gradients pass as if nothing were rounded (straight through): those of the steps are zero."""
        if x.requires_grad and torch.is_grad_enabled():
            passed: Tensor = _StraightThrough.apply(x, self.rounded)  # type: ignore[no-untyped-call]
            return passed
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        """[..., N], rounded, without a gradient that is of use."""
        if self.group_size != -1 and self.group_size != x.shape[-1]:
            groups = x.unflatten(-1, (-1, self.group_size))
            return replace(self, group_size=-1).rounded(groups).flatten(-2)
        if self.float8:
            return round_rows_to_float8(x)
        return round_rows(x, self.bits, symmetric=self.symmetric, clip=self.clip)


class _StraightThrough(torch.autograd.Function):
    """A step whose gradient is that of doing nothing (Bengio, Leonard & Courville 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
        return step(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def round_rows(x: Tensor, bits: int, *, symmetric: bool, clip: float = 1.0) -> Tensor:
    """Round the rows of [..., N] to the nearest points of their grids, in float32 (float64 for float64), and back in the type of `x`.

        asymmetric: low = clip min(min x, 0), high = clip max(max x, 0), s = (high - low) / (2^b - 1), z = round(-low / s),
                    s (clamp(round(x / s) + z, 0, 2^b - 1) - z)
        symmetric:  s = clip max|x| / (2^(b-1) - 1), s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)

    Ties go to the even code. A row of zeros, or one too small to have a scale, becomes zeros; a row with a NaN or an infinity becomes NaN.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if symmetric:
        half = 2.0 ** (bits - 1)
        scale = clip * wide.abs().amax(-1, keepdim=True) / (half - 1)
        least, most, zero = -half, half - 1, torch.zeros_like(scale)
    else:
        least, most = 0.0, 2.0**bits - 1
        low, high = clip * wide.amin(-1, keepdim=True).clamp(max=0), clip * wide.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / most
        zero = low.neg().div_(scale).round_()
    # A scale may be too small to divide by before it is zero.
    tiny = scale < torch.finfo(wide.dtype).tiny
    scale, zero = scale.masked_fill(tiny, 1.0), zero.masked_fill(tiny, 0.0)
    codes = wide.div(scale).round_().add_(zero).clamp_(least, most).sub_(zero)
    return codes.mul_(scale).masked_fill_(tiny, 0.0).to(x.dtype)


def round_rows_to_float8(x: Tensor) -> Tensor:
    """Round the rows of [..., N] to float8 e4m3, the row's largest magnitude on its largest number (448), and back in the type of `x`.

        s = max(max|x| / 448, 1 / (448 * 512)),  s float8(clamp(x / s, -448, 448))

    In float32. The least scale is vLLM's, whose FP8 products these are. A row with a NaN or an infinity becomes NaN.
    """
    wide, largest = x.float(), torch.finfo(torch.float8_e4m3fn).max
    scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_(min=1 / (largest * 512))
    return wide.div(scale).clamp_(-largest, largest).to(torch.float8_e4m3fn).float().mul_(scale).to(x.dtype)
