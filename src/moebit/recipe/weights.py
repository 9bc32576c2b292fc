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
WEIGHT_TYPES = ("int", "fp8", *GGML_TYPES)
MIXTURES = ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs")


class TypeOverride(Section):
    """Another block type for some tensors.

    match: a shell pattern, or a regular expression behind `re:`, of names of GGUF tensors (blk.0.ffn_down_exps.weight).
    """

    match: str
    type: str

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
    def _known_type(cls, kind: str) -> str:
        if kind not in GGML_TYPES:
            raise ValueError(f"{kind!r}: choose one of {', '.join(GGML_TYPES)}")
        return kind

    def matches(self, name: str) -> bool:
        """Whether a GGUF tensor's name matches."""
        if self.match.startswith("re:"):
            return re.search(self.match.removeprefix("re:"), name) is not None
        return fnmatch.fnmatch(name, self.match)


class WeightsSection(Section):
    """The grid of the quantized weights.

    type: `int`; `fp8` (float8 e4m3: 8 bits, one scale per output channel, rounded to nearest); or a block type of ggml (`q4_k`, ...),
        from which bits, group_size, symmetric and signed follow, whatever they are set to.
    mixture: llama.cpp's mixture of ggml types of that name, around `type`. overrides: types of single tensors; the first match counts.
    scope: `experts`, or `all` linears of the decoder layers (attention, dense layers, shared experts, experts).
    ignore: shell patterns of module names that stay in full precision.
    signed: symmetric only; the scale takes the sign of the largest weight, so that all 2^b codes are used.
    """

    named_if_on = frozenset({"mixture", "overrides"})

    type: str = "int"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    signed: bool = False
    scope: Literal["experts", "all"] = "all"
    ignore: list[str] = Field(default_factory=list)
    mixture: Literal["none", "q2_k", "q3_k_m", "q4_k_m", "iq4_xs"] = "none"
    overrides: list[TypeOverride] = Field(default=[])

    @model_validator(mode="before")
    @classmethod
    def _ggml_types_say_the_grid(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("type") not in GGML_TYPES:
            return data
        bits, group, symmetric = GGML_TYPES[data["type"]]
        return {**data, "bits": bits, "group_size": group, "symmetric": symmetric, "signed": False}

    @field_validator("type")
    @classmethod
    def _known_type(cls, kind: str) -> str:
        if kind == "nvfp4":
            raise ValueError("nvfp4: a GGUF file keeps the scale of the whole tensor in a tensor of its own, which is not written yet")
        if kind not in WEIGHT_TYPES:
            raise ValueError(f"{kind!r}: choose one of {', '.join(WEIGHT_TYPES)}")
        return kind

    @property
    def ggml(self) -> bool:
        """Whether the type is one of ggml's."""
        return self.type in GGML_TYPES

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
        if self.group_size == 16 and not self.ggml:
            raise ValueError(f"group size 16: choose one of {', '.join(map(str, GROUP_SIZES))} (-1: one scale per output channel)")
        if (self.overrides or self.mixture != "none") and not self.ggml:
            raise ValueError(f"mixture and overrides choose among ggml's types; set type to one of {', '.join(GGML_TYPES)}")
        return self

    @model_validator(mode="after")
    def _fp8_is_eight_bits_a_row(self) -> WeightsSection:
        if self.type == "fp8" and (self.bits, self.group_size, self.symmetric, self.signed) != (8, -1, True, False):
            raise ValueError("type: fp8 has 8 bits and one scale per output channel; set bits: 8, group_size: -1, symmetric: true")
        return self
