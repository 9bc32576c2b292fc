"""`router`: what is done to the routers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from moebit.recipe.section import Section

ROUTER_WIDTHS = (3, 4, 5, 6, 7, 8, 16)


class RouterSection(Section):
    """What is done to the routers (methods/router.py, methods/realign.py). They are stored as plain values whatever their bits.

    bits: of the grid that a router's values lie on, 3 to 8; 16 leaves them.
    align: `kl` chooses the clipping ratios so that the same experts stay chosen, else by the rounding error of the weight.
    ratios: how many clipping ratios from 1 to 0.35 are tried for every row.
    top_share: `kl` looks at `k + top_share (E - k)` experts one by one and at the others together. kl_weight: lambda.
    realign: `ridge` corrects routers for the drift of their inputs; with any recipe and any bits.
    realign_weight: of a token in it: `one`, or `margin` for more where the choice is close.
    """

    bits: int = 16
    align: Literal["none", "kl"] = "none"
    ratios: int = Field(101, ge=2, le=1001)
    top_share: float = Field(0.0, ge=0.0, le=1.0)
    kl_weight: float = Field(1.0, ge=0.0, le=1e6)
    realign: Literal["none", "ridge"] = "none"
    realign_weight: Literal["one", "margin"] = "one"

    @field_validator("bits")
    @classmethod
    def _known_width(cls, bits: int) -> int:
        if bits not in ROUTER_WIDTHS:
            raise ValueError(f"{bits} bits: choose 3 to 8, or 16 to leave the routers as they are")
        return bits

    @model_validator(mode="after")
    def _alignment_rounds(self) -> RouterSection:
        if self.align != "none" and self.bits == 16:
            raise ValueError(f"align: {self.align} chooses how routers are rounded; set bits: 8 (or less), or align: none")
        return self

    @property
    def active(self) -> bool:
        return bool(self.wanted)

    @property
    def wanted(self) -> tuple[str, ...]:
        """What is to be done to the routers."""
        asked = {"bits": self.bits < 16, "align": self.align != "none", "realign": self.realign != "none"}
        return tuple(name for name, value in asked.items() if value)
