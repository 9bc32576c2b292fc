"""FP4 blocks of ggml: MXFP4 (a power of two per 32 columns) and NVFP4 (an e4m3 number per 16 columns, times one float32 per expert).

The levels of e2m1 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 with either sign. As in ggml they are held doubled, as whole numbers, and scales halved.
Codes are positions in the sorted table of 15 levels; the format has a negative zero, too, which is read as zero and never written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moebit.tensor.grids.base import Affine
from moebit.tensor.grids.ggml_blocks import Fields
from moebit.tensor.grids.ggml_fit import Effort
from moebit.tensor.grids.ggml_grid import GgmlGrid, rows_first
from moebit.tensor.grids.ggml_moments import Piece, moments

FP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)  # kvalues_mxfp4 in ggml-common.h, sorted
NIBBLES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)  # of the sorted levels
CODES = (7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0)  # of the nibbles; 8 is the negative zero
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
LARGEST_E4M3_BYTE, LARGEST_E8M0_BYTE = 0x7E, 0xFE
EXPONENTS_TRIED, BYTES_TRIED = (0, -1, 1), (0, -2, -1, 1, 2, 3, 4, 5)  # beside the one that puts the largest weight on level 6

P = TypeVar("P")


@dataclass(frozen=True)
class Mxfp4Params:
    """uint8 [E, O, blocks]: exponents e8m0; a block's scale is 2^(e - 127)."""

    exponent: Tensor


@dataclass(frozen=True)
class Nvfp4Params:
    """What NVFP4 stores beside codes.

    Attributes:
        scale: uint8 [E, O, G], the bytes of unsigned e4m3 numbers.
        tensor_scale: float32 [E]. It is no part of the blocks: GGUF has it as a tensor of its own, named like the weight with `.scale`.
    """

    scale: Tensor
    tensor_scale: Tensor


@dataclass(frozen=True)
class _Fp4Grid(GgmlGrid[P]):
    table: tuple[int, ...] = FP4_LEVELS

    def _stored_codes(self, codes: Tensor) -> Tensor:
        return torch.tensor(NIBBLES, dtype=torch.uint8, device=codes.device)[codes.long()]

    def _codes(self, stored: Tensor) -> Tensor:
        return torch.tensor(CODES, dtype=torch.uint8, device=stored.device)[stored.long()]


@dataclass(frozen=True)
class Mxfp4Grid(_Fp4Grid[Mxfp4Params]):
    """MXFP4 (OCP Microscaling Formats 1.0): the exponent is searched next to the one that the specification says."""

    name: str = "mxfp4"
    type_id: int = 39
    group: int = 32
    bits: int = 4

    def _fitted(self, piece: Piece, effort: Effort, shared_E: Tensor | None) -> tuple[Tensor | None, ...]:
        start = torch.log2(piece.x.abs().amax(2)).floor().clamp(-125, 128) + 125  # the largest weight of a block between levels 4 and 8
        tried = EXPONENTS_TRIED if effort.rounds else (0,)
        found = _least(piece, [(start + step).clamp(0, LARGEST_E8M0_BYTE) for step in tried], _e8m0_half)
        return (rows_first(found, torch.uint8),)

    def _params(self, *stored: Tensor | None, shared: Tensor | None) -> Mxfp4Params:
        (exponent,) = stored
        assert exponent is not None
        return Mxfp4Params(exponent)

    def _fields(self, params: Mxfp4Params) -> Fields:
        return {"exponent": params.exponent}

    def _read(self, fields: Fields) -> Mxfp4Params:
        return Mxfp4Params(**fields)

    def columns(self, params: Mxfp4Params) -> Affine:
        scale = _e8m0_half(params.exponent)
        return Affine(scale, torch.zeros_like(scale))


@dataclass(frozen=True)
class Nvfp4Grid(_Fp4Grid[Nvfp4Params]):
    """NVFP4: block scales are searched from the largest weight on level 6 to the largest on level 4 ("four over six") and beside.

    The float32 scale of an expert is a power of two, so that multiplying by it, before or after a product, rounds nothing. It puts the
    largest block scale into the upper octave of e4m3; smaller block scales are at least the smallest positive number and never 0.
    """

    name: str = "nvfp4"
    type_id: int = 40
    group: int = 16
    bits: int = 4

    def _shared(self, w_EOI: Tensor) -> Tensor | None:
        largest = w_EOI.abs().amax((1, 2)).to(torch.float32)
        exponent = torch.log2(largest / (LARGEST_E4M3 * LARGEST_E2M1)).ceil().clamp(-100, 100)
        return torch.where(largest > 0, torch.exp2(exponent), 1.0)

    def _fitted(self, piece: Piece, effort: Effort, shared_E: Tensor | None) -> tuple[Tensor | None, ...]:
        assert shared_E is not None
        scaled = Piece(piece.x / shared_E[:, None, None, None], piece.weight, piece.low, piece.high, piece.table)
        start = _nearest_e4m3(scaled.x.abs().amax(2) / LARGEST_E2M1)
        tried = BYTES_TRIED if effort.rounds else (0,)
        found = _least(scaled, [(start + step).clamp(1, LARGEST_E4M3_BYTE) for step in tried], _e4m3_half)
        return (rows_first(found, torch.uint8),)

    def _params(self, *stored: Tensor | None, shared: Tensor | None) -> Nvfp4Params:
        (scale,) = stored
        assert scale is not None
        assert shared is not None
        return Nvfp4Params(scale, shared)

    def _fields(self, params: Nvfp4Params) -> Fields:
        return {"scale": params.scale}

    def _read(self, fields: Fields) -> Nvfp4Params:
        """Blocks do not hold the scale of an expert: it is 1 until the caller replaces it."""
        return Nvfp4Params(fields["scale"], torch.ones(fields["scale"].shape[0], device=fields["scale"].device))

    def columns(self, params: Nvfp4Params) -> Affine:
        scale = _e4m3_half(params.scale) * params.tensor_scale[:, None, None]
        return Affine(scale, torch.zeros_like(scale))


def _least(piece: Piece, candidates: list[Tensor], meaning: Callable[[Tensor], Tensor]) -> Tensor:
    """Group by group, the stored number whose scale has the least error; the first wins ties."""
    errors = torch.stack([moments(piece, meaning(stored.to(torch.uint8)), None).rr for stored in candidates])
    return torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]


def _e8m0_half(stored: Tensor) -> Tensor:
    """2^(e - 128), float32: made from bits, because the smallest two are not normal numbers."""
    e = stored.to(torch.int32)
    return torch.where(e < 2, 0x200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def _e4m3_half(stored: Tensor) -> Tensor:
    """Half of the unsigned e4m3 number with these bytes, float32; ggml reads the pattern of NaN as 0."""
    number = (stored & 0x7F).view(torch.float8_e4m3fn).to(torch.float32) / 2
    return number.nan_to_num(nan=0.0)


def _nearest_e4m3(value: Tensor) -> Tensor:
    """The byte, as float32, of the nearest e4m3 number to values that are not negative."""
    return value.clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.float32)
