"""Dynamic rounding of activations: every token's row is put on a grid of its own, as it comes.

Simulated: the result is a floating-point tensor that holds grid points. The grids are those of the weights (METHODS' quantizers), over the
whole row instead of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """How a row of activations is rounded.

    Attributes:
        bits: 2 to 8. symmetric: no zero point, codes in [-2^(b-1), 2^(b-1) - 1].
        clip: share of the row's range that the grid covers; what lies beyond goes to its ends.
    """

    bits: int
    symmetric: bool
    clip: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return round_rows(x, self.bits, symmetric=self.symmetric, clip=self.clip)


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
