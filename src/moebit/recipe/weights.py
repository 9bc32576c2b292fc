"""`weights`: the grid that weights are rounded to."""

from __future__ import annotations

import fnmatch
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moebit.recipe.section import BIT_WIDTHS, Section

GROUP_SIZES = (-1, 32, 64, 128)
# ggml's block types that can be solved and stored: bits of a code, columns that share a scale, whether there is no offset.
GGML_TYPES = {
    "q4_0": (4, 32, True),
    "q4_1": (4, 32, False),
    "q5_0": (5, 32, True),
    "q5_1": (5, 32, False),
    "q8_0": (8, 32, True),
    "q2_0": (2, 64, True),
    "q2_k": (2, 16, False),
    "q3_k": (3, 16, True),
    "q4_k": (4, 32, False),
    "q5_k": (5, 32, False),
    "q6_k": (6, 16, True),
    "iq4_nl": (4, 32, True),
    "iq4_xs": (4, 32, True),
    "mxfp4": (4, 32, True),
}
# FP4 numbers that other engines read as well: what a type has in the same places.
FP4_TYPES = {"nvfp4": (4, 16, True), "mxfp4": (4, 32, True)}
FLOAT_TYPES = ("fp8", "fp8-block")
BLOCK_TYPES = {**GGML_TYPES, **FP4_TYPES, "fp8-block": (8, 128, True)}  # from which the grid follows
WEIGHT_TYPES = ("int", "fp8", "fp8-block", *GGML_TYPES, "nvfp4")
MIXTURES = ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs")


class GridOverride(Section):
    """Another grid for some matrices; the first override that matches counts.

    match: a shell pattern, or a regular expression behind `re:`, of full names of linears and experts modules
        (model.layers.0.mlp.experts); in a GGUF file, of names of its tensors (blk.0.ffn_down_exps.weight).
    bits, group_size: what these have in the place of the section's. type: of GGUF tensors, a block type of ggml.
    """

    named_if_on = frozenset({"bits", "group_size", "type"})

    match: str
    type: str | None = None
    bits: int | None = None
    group_size: int | None = None

    @field_validator("match")
    @classmethod
    def _a_pattern(cls, match: str) -> str:
        try:
            re.compile(match.removeprefix("re:") if match.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{match!r} is no regular expression ({error})") from error
        return match

    @field_validator("type")
    @classmethod
    def _known_type(cls, kind: str | None) -> str | None:
        if kind is not None and kind not in GGML_TYPES:
            raise ValueError(f"{kind!r}: choose one of {', '.join(GGML_TYPES)}")
        return kind

    @model_validator(mode="after")
    def _known_grid(self) -> GridOverride:
        if self.bits is not None and self.bits not in BIT_WIDTHS:
            raise ValueError(f"{self.bits} bits: choose one of {', '.join(map(str, BIT_WIDTHS))}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size}: choose one of {', '.join(map(str, GROUP_SIZES))}")
        if (self.type is None) == (self.bits is None and self.group_size is None):
            raise ValueError(f"{self.match!r}: say bits or group_size, or, for a GGUF file, a type")
        return self

    def matches(self, name: str) -> bool:
        """Whether a name matches."""
        if self.match.startswith("re:"):
            return re.search(self.match.removeprefix("re:"), name) is not None
        return fnmatch.fnmatch(name, self.match)


class WeightsSection(Section):
    """The grid of the quantized weights.

    type: `int`; `fp8` (float8 e4m3: 8 bits, one scale per output channel, rounded to nearest); or a type from which bits, group_size,
        symmetric and signed follow, whatever they are set to: `fp8-block` (float8 e4m3 with a scale per 128 x 128 weights, rounded to
        nearest), `nvfp4` (FP4 with an e4m3 scale per 16 weights and a float32 scale per matrix), `mxfp4` (FP4 with a power of two per 32
        weights), or a block type of ggml (`q4_k`, ...).
    mixture: llama.cpp's mixture of ggml types of that name, around `type`.
    overrides: other widths, group sizes or, in a GGUF file, types of single modules; the first match counts.
    group_size_fallback: what a module gets whose rows `group_size` does not divide: `auto` the largest smaller size that does (or the whole
        row), 32 that size or the whole row, `row` one scale per row, `keep` full precision. The plan says of which modules this is so.
    scope: `experts`, or `all` linears of the decoder layers (attention, dense layers, shared experts, experts).
    ignore: shell patterns of module names that stay in full precision.
    signed: symmetric only; the scale takes the sign of the largest weight, so that all 2^b codes are used.
    """

    named_if_on = frozenset({"mixture", "overrides", "group_size_fallback"})

    type: str = "int"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    signed: bool = False
    scope: Literal["experts", "all"] = "all"
    ignore: list[str] = Field(default_factory=list)
    mixture: Literal["none", "q2_k", "q3_k_m", "q4_k_m", "iq4_xs"] = "none"
    overrides: list[GridOverride] = Field(default=[])
    group_size_fallback: Literal["auto", 32, "row", "keep"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _block_types_say_the_grid(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("type") not in BLOCK_TYPES:
            return data
        bits, group, symmetric = BLOCK_TYPES[data["type"]]
        return {**data, "bits": bits, "group_size": group, "symmetric": symmetric, "signed": False}

    @field_validator("type")
    @classmethod
    def _known_type(cls, kind: str) -> str:
        if kind not in WEIGHT_TYPES:
            raise ValueError(f"{kind!r}: choose one of {', '.join(WEIGHT_TYPES)}")
        return kind

    @property
    def ggml(self) -> bool:
        """Whether the type is one of ggml's."""
        return self.type in GGML_TYPES

    @property
    def fp4(self) -> bool:
        """Whether the type is one of FP4 numbers."""
        return self.type in FP4_TYPES

    @property
    def float8(self) -> bool:
        """Whether weights are float8 numbers."""
        return self.type in FLOAT_TYPES

    @field_validator("bits")
    @classmethod
    def _known_width(cls, bits: int) -> int:
        if bits not in BIT_WIDTHS:
            raise ValueError(f"{bits} bits: choose one of {', '.join(map(str, BIT_WIDTHS))}")
        return bits

    @field_validator("group_size")
    @classmethod
    def _known_group(cls, size: int) -> int:
        if size not in GROUP_SIZES and size != 16:
            raise ValueError(f"group size {size}: choose one of {', '.join(map(str, GROUP_SIZES))} (-1: one scale per output channel)")
        return size

    @model_validator(mode="after")
    def _signed_is_symmetric(self) -> WeightsSection:
        if self.signed and not self.symmetric:
            raise ValueError("signed scales belong to symmetric grids; set symmetric: true or signed: false")
        return self

    @model_validator(mode="after")
    def _sixteen_and_mixtures_are_ggmls(self) -> WeightsSection:
        if self.group_size == 16 and self.type not in BLOCK_TYPES:
            raise ValueError(f"group size 16: choose one of {', '.join(map(str, GROUP_SIZES))} (-1: one scale per output channel)")
        if self.mixture != "none" and not self.ggml:
            raise ValueError(f"mixture chooses among ggml's types; set type to one of {', '.join(GGML_TYPES)}")
        return self

    @model_validator(mode="after")
    def _overrides_fit_the_type(self) -> WeightsSection:
        for one in self.overrides:
            if one.type is not None and not self.ggml:
                raise ValueError(f"overrides: {one.match!r} says a type of ggml; set type to one of {', '.join(GGML_TYPES)}")
            if one.type is None and self.type != "int":
                raise ValueError(f"overrides: {one.match!r} says bits or group_size, which type: {self.type} has fixed; set type: int")
        return self

    @model_validator(mode="after")
    def _fp8_is_eight_bits_a_row(self) -> WeightsSection:
        if self.type == "fp8" and (self.bits, self.group_size, self.symmetric, self.signed) != (8, -1, True, False):
            raise ValueError("type: fp8 has 8 bits and one scale per output channel; set bits: 8, group_size: -1, symmetric: true")
        return self
