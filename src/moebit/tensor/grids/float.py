"""Grids of floating-point numbers: their levels are a table, denser near zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moebit.tensor.grids.base import Affine, Grid, divided

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class FloatParams:
    """Attributes:
    scale: [E, O, G], what 1 stands for.
    """

    scale: Tensor


@dataclass(frozen=True)
class Float8Grid(Grid):
    """Float8 e4m3 numbers times a scale: 8 bits. Codes count the finite numbers from the least to the largest.

    Attributes:
        group_size: input channels that share a scale; -1 for the whole row.
        scale_dtype: scales are rounded to this type before the weights are rounded.
        rows: output channels that share a scale as well, counted from the first; the parameters repeat it for each of them.
    """

    group_size: int
    scale_dtype: torch.dtype = torch.float32
    rows: int = 1

    @property
    def value_dtype(self) -> torch.dtype:
        return self.scale_dtype

    def group_width(self, in_features: int) -> int:
        return divided(self.group_size, in_features)

    @property
    def levels(self) -> Tensor | None:
        return _ascending().view(FLOAT8).float()

    def qmax(self, bits_E: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.full(bits_E.shape, float(len(_ascending()) - 1), dtype=dtype, device=bits_E.device)

    @property
    def factored(self) -> tuple[str, ...]:
        return ("scale",)

    def fit(self, w_EOI: Tensor, bits_E: Tensor, importance_EI: Tensor | None = None, search: bool = True) -> FloatParams:
        """Put every group's largest magnitude on the largest number, 448; an all-zero group gets scale 1.

        A float's steps grow with its size, so that clipping the range gains nothing and is not searched for.
        """
        if bool((bits_E != 8).any()):
            raise ValueError(f"float8 has 8 bits, asked for {sorted(set(bits_E.tolist()))}")
        largest = w_EOI.unflatten(-1, (-1, self.group_width(w_EOI.shape[-1]))).abs().amax(-1)
        scale = (_of_blocks(largest, self.rows) / LARGEST).to(self.scale_dtype)
        return FloatParams(torch.where(scale == 0, torch.ones_like(scale), scale))

    def columns(self, params: FloatParams) -> Affine:
        return Affine(params.scale, torch.zeros_like(params.scale))

    def round(self, w_EOI: Tensor, params: FloatParams, bits_E: Tensor) -> Tensor:
        groups = w_EOI.unflatten(-1, (params.scale.shape[-1], -1))
        numbers = (groups / params.scale.to(w_EOI.dtype).unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(FLOAT8)
        codes: Tensor = _places().to(w_EOI.device)[numbers.view(torch.uint8).flatten(-2).long()]
        return codes

    def dequantize(self, codes_EOI: Tensor, params: FloatParams, dtype: torch.dtype = torch.float32) -> Tensor:
        work = torch.float64 if dtype == torch.float64 else torch.float32
        numbers = self.numbers(codes_EOI).to(work).unflatten(-1, (params.scale.shape[-1], -1))
        value: Tensor = numbers * params.scale.to(work).unsqueeze(-1)
        return value.flatten(-2).to(dtype)

    def numbers(self, codes_EOI: Tensor) -> Tensor:
        """Return the codes as float8 numbers, the form in which formats store them."""
        return _ascending().to(codes_EOI.device)[codes_EOI.long()].view(FLOAT8)


def _of_blocks(largest_EOG: Tensor, rows: int) -> Tensor:
    """[E, O, G]: the largest of every block of `rows` rows, repeated for each of them; the last block may have fewer."""
    if rows == 1:
        return largest_EOG
    out = largest_EOG.shape[1]
    blocks = torch.nn.functional.pad(largest_EOG, (0, 0, 0, -out % rows)).unflatten(1, (-1, rows)).amax(2)
    repeated: Tensor = blocks.repeat_interleave(rows, 1)[:, :out]
    return repeated.contiguous()


@cache
def _ascending() -> Tensor:
    """uint8 [254]: the bytes of all finite float8 numbers, rising; minus zero stands before zero."""
    every = torch.arange(256, dtype=torch.uint8, device="cpu")
    numbers = every.view(FLOAT8).float()
    order = torch.where(every >= 128, numbers - 1e-9, numbers)  # only the two zeros are told apart by this
    finite = numbers.isfinite().nonzero()[:, 0]
    return every[finite[order[finite].argsort(stable=True)]]


@cache
def _places() -> Tensor:
    """uint8 [256]: the inverse of `_ascending`; 0 for the two bytes that are no numbers."""
    places = torch.zeros(256, dtype=torch.uint8, device="cpu")
    places[_ascending().long()] = torch.arange(len(_ascending()), dtype=torch.uint8, device="cpu")
    return places
