"""`weights`: the grid that weights are rounded to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from moebit.recipe.section import BIT_WIDTHS, Section

GROUP_SIZES = (-1, 32, 64, 128)


class WeightsSection(Section):
    """The grid of the quantized weights.

    type: `int`, or `fp8` (float8 e4m3: 8 bits, one scale per output channel, rounded to nearest).
    scope: `experts`, or `all` linears of the decoder layers (attention, dense layers, shared experts, experts).
    ignore: shell patterns of module names that stay in full precision.
    signed: symmetric only; the scale takes the sign of the largest weight, so that all 2^b codes are used.
    """

    type: Literal["int", "fp8"] = "int"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    signed: bool = False
    scope: Literal["experts", "all"] = "all"
    ignore: list[str] = Field(default_factory=list)

    @field_validator("bits")
    @classmethod
    def _known_width(cls, bits: int) -> int:
        if bits not in BIT_WIDTHS:
            raise ValueError(f"{bits} bits: choose one of {', '.join(map(str, BIT_WIDTHS))}")
        return bits

    @field_validator("group_size")
    @classmethod
    def _known_group(cls, size: int) -> int:
        if size not in GROUP_SIZES:
            raise ValueError(f"group size {size}: choose one of {', '.join(map(str, GROUP_SIZES))} (-1: one scale per output channel)")
        return size

    @model_validator(mode="after")
    def _signed_is_symmetric(self) -> WeightsSection:
        if self.signed and not self.symmetric:
            raise ValueError("signed scales belong to symmetric grids; set symmetric: true or signed: false")
        return self

    @model_validator(mode="after")
    def _fp8_is_eight_bits_a_row(self) -> WeightsSection:
        if self.type == "fp8" and (self.bits, self.group_size, self.symmetric, self.signed) != (8, -1, True, False):
            raise ValueError("type: fp8 has 8 bits and one scale per output channel; set bits: 8, group_size: -1, symmetric: true")
        return self
