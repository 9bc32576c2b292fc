"""The block types of ggml (llama.cpp, GGUF) as grids: uniform levels and tables, plain blocks and super-blocks.

A plain block of 32 or 64 columns stores a float16 scale d (and, in some types, a float16 offset m). A super-block of 256 columns stores d
(and dmin), and for each of its 8 or 16 groups an integer scale (and an integer min): value = d sc (q - zero) - dmin m.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebit.tensor.grids.base import Affine
from moebit.tensor.grids.ggml_blocks import Fields
from moebit.tensor.grids.ggml_fit import Effort, half, scale_and_offset, scale_only, super_pairs, super_scales
from moebit.tensor.grids.ggml_fp4 import Mxfp4Grid, Nvfp4Grid
from moebit.tensor.grids.ggml_grid import GgmlGrid, rows_first
from moebit.tensor.grids.ggml_moments import Piece, moments

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl in ggml-common.h


@dataclass(frozen=True)
class BlockParams:
    """What plain blocks store beside codes: d and, in types with an offset, m; float16 [E, O, blocks]."""

    d: Tensor
    m: Tensor | None = None


@dataclass(frozen=True)
class SuperParams:
    """What super-blocks store beside codes.

    Attributes:
        d: float16 [E, O, S]. scale: uint8 [E, O, G], unsigned as `GgmlGrid.scale_zero` says.
        dmin, minimum: the same for offsets, in types that have them.
    """

    d: Tensor
    scale: Tensor
    dmin: Tensor | None = None
    minimum: Tensor | None = None


@dataclass(frozen=True)
class BlockGrid(GgmlGrid[BlockParams]):
    """Plain blocks: one d per block, and one offset m where `offset`."""

    offset: bool = field(default=False, kw_only=True)

    @property
    def factored(self) -> tuple[str, ...]:
        return ("d", "m")

    def _fitted(self, piece: Piece, effort: Effort, shared_E: Tensor | None) -> tuple[Tensor | None, ...]:
        if not self.offset:
            return rows_first(half(scale_only(piece, effort)), torch.float16), None
        scale, offset = scale_and_offset(piece, effort, nonpositive=False)
        d = half(scale)
        offset = offset + moments(piece, d, offset).r / piece.total
        return rows_first(d, torch.float16), rows_first(half(offset), torch.float16)

    def _params(self, *stored: Tensor | None, shared: Tensor | None) -> BlockParams:
        d, m = stored
        assert d is not None
        return BlockParams(d, m)

    def _fields(self, params: BlockParams) -> Fields:
        return {"d": params.d} if params.m is None else {"d": params.d, "m": params.m}

    def _read(self, fields: Fields) -> BlockParams:
        return BlockParams(**fields)

    def columns(self, params: BlockParams) -> Affine:
        scale = params.d.to(torch.float32)
        offset = None if params.m is None else params.m.to(torch.float32)
        return Affine(scale, torch.full_like(scale, self.zero), offset)


@dataclass(frozen=True)
class SuperBlockGrid(GgmlGrid[SuperParams]):
    """Super-blocks of 256 columns.

    Attributes:
        scale_bits: bits of an integer scale (and of an integer min). scale_zero: the integer that means scale 0.
        offset: the type has dmin and mins; then scales are not negative.
    """

    scale_bits: int = field(kw_only=True)
    scale_zero: int = field(default=0, kw_only=True)
    offset: bool = field(default=False, kw_only=True)

    @property
    def factored(self) -> tuple[str, ...]:
        return ("d", "dmin")

    def _fitted(self, piece: Piece, effort: Effort, shared_E: Tensor | None) -> tuple[Tensor | None, ...]:
        n, top = self.block // self.group, 2**self.scale_bits - 1
        if self.offset:
            found = super_pairs(piece, effort, n, top)
        else:
            found = super_scales(piece, effort, n, -self.scale_zero, top - self.scale_zero)
        result: list[Tensor | None] = []
        for d, integers, zero in ((found.d, found.scale, self.scale_zero), (found.dmin, found.minimum, 0)):
            result.append(None if d is None else rows_first(d[:, :, 0], torch.float16))
            result.append(None if integers is None else rows_first(integers.flatten(1, 2) + zero, torch.uint8))
        return tuple(result)

    def _params(self, *stored: Tensor | None, shared: Tensor | None) -> SuperParams:
        d, scale, dmin, minimum = stored
        assert d is not None
        assert scale is not None
        return SuperParams(d, scale, dmin, minimum)

    def _fields(self, params: SuperParams) -> Fields:
        fields = {"d": params.d, "scale": params.scale}
        if params.dmin is not None and params.minimum is not None:
            fields |= {"dmin": params.dmin, "minimum": params.minimum}
        return fields

    def _read(self, fields: Fields) -> SuperParams:
        return SuperParams(**fields)

    def columns(self, params: SuperParams) -> Affine:
        scale = _product(params.d, params.scale, self.scale_zero)
        offset = None
        if params.dmin is not None and params.minimum is not None:
            offset = -_product(params.dmin, params.minimum, 0)
        return Affine(scale, torch.full_like(scale, self.zero), offset)


def _product(d_EOS: Tensor, integers_EOG: Tensor, zero: int) -> Tensor:
    """d times the integers of its super-block, float32 [E, O, G]."""
    apart = integers_EOG.unflatten(-1, (d_EOS.shape[-1], -1)).to(torch.float32) - zero
    product: Tensor = d_EOS.to(torch.float32).unsqueeze(-1) * apart
    return product.flatten(-2)


GRIDS: dict[str, GgmlGrid[Any]] = {
    grid.name: grid
    for grid in (
        BlockGrid("q4_0", 2, 32, 4, 8),
        BlockGrid("q4_1", 3, 32, 4, offset=True),
        BlockGrid("q5_0", 6, 32, 5, 16),
        BlockGrid("q5_1", 7, 32, 5, offset=True),
        BlockGrid("q8_0", 8, 32, 8, 128),
        BlockGrid("q2_0", 42, 64, 2, 1),
        BlockGrid("iq4_nl", 20, 32, 4, table=IQ4_LEVELS),
        SuperBlockGrid("q2_k", 10, 16, 2, scale_bits=4, offset=True),
        SuperBlockGrid("q3_k", 11, 16, 3, 4, scale_bits=6, scale_zero=32),
        SuperBlockGrid("q4_k", 12, 32, 4, scale_bits=6, offset=True),
        SuperBlockGrid("q5_k", 13, 32, 5, scale_bits=6, offset=True),
        SuperBlockGrid("q6_k", 14, 16, 6, 32, scale_bits=8, scale_zero=128),
        SuperBlockGrid("iq4_xs", 23, 32, 4, table=IQ4_LEVELS, scale_bits=6, scale_zero=32),
        Mxfp4Grid(),
        Nvfp4Grid(),
    )
}
