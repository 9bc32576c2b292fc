"""`activations` and `rotation`: what happens to the inputs of quantized matrices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from moebit.recipe.section import Section

ACTIVATION_WIDTHS = (3, 4, 5, 6, 7, 8, 16)


class ActivationsSection(Section):
    """What the inputs of quantized matrices are rounded to as the model runs, every token on a grid of its own.

    bits: of the inputs of quantized linears and experts and of the experts' down projections; 16 for not at all.
    symmetric: without a zero point. clip: share of a token's range that the grid covers.
    type: `int`, or `fp8`, float8 e4m3 numbers with 8 bits, which compressed-tensors has; `auto` is fp8 beside fp8 weights, else int.
    qkv_bits: of query, key and value, per token and head, where the architecture's attention allows it; the plan says where not.

    The native format carries it: moebit's runtime and `moebit evaluate` do it. compressed-tensors has 8 bits, symmetric, which engines do,
    and `moebit evaluate` as vLLM does.
    Calibration runs on unrounded activations.
    """

    named_if_on = frozenset({"type"})

    bits: int = 16
    type: Literal["auto", "int", "fp8"] = "auto"
    symmetric: bool = False
    clip: float = Field(1.0, gt=0.0, le=1.0)
    qkv_bits: int = 16

    @field_validator("bits", "qkv_bits")
    @classmethod
    def _known_width(cls, bits: int) -> int:
        if bits not in ACTIVATION_WIDTHS:
            raise ValueError(f"{bits} bits: choose one of {', '.join(map(str, ACTIVATION_WIDTHS))} (16: not rounded)")
        return bits

    @property
    def rounded(self) -> bool:
        return min(self.bits, self.qkv_bits) < 16


class RotationSection(Section):
    """Orthogonal transforms.

    absorbed: in the weights, at no run-time cost (`methods/rotation.py`): `r1` of the hidden states, `r1r2` of attention's values too.
    online: of the inputs of quantized matrices, applied as the model runs and merged into the weights (`methods/online.py`): `hadamard`,
        random signs and Hadamard blocks, or `duquant`, rotations found on the calibration tokens. The native format carries it.
    down: whether the experts of a layer share one in front of their down projections, or have one each.
    """

    absorbed: Literal["none", "r1", "r1r2"] = "none"
    online: Literal["none", "hadamard", "duquant"] = "none"
    down: Literal["shared", "expert"] = "shared"
