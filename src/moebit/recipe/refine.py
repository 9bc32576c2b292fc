"""`refine`: rounding that is learned on the layer's output, behind the solver."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moebit.recipe.section import Section

RATES = (0.002, 0.006)  # of a code step: what `rate: auto` tries with straight_through and gumbel


class RefineSection(Section):
    """How codes and scales are tuned once they are solved (methods/learned_rounding.py).

    kind: `straight_through` with Adam; `sign`, SignRound's descent; `gumbel`, GSQ's relaxation; `none` leaves the solver's rounding.
    steps: of every try. rate: of a code step, and relative for scales; `auto` tries those of `RATES`, or 1 / steps for `sign`.
    tune: `codes`, `scales` or both. holdout: share of the calibration windows that decide what is kept, and are not learned from.
    tokens: of the calibration set in a batch; every chunk of experts learns from those of them that are routed to it.
    """

    kind: Literal["none", "straight_through", "sign", "gumbel"] = "none"
    steps: int = Field(300, ge=1, le=100_000)
    rate: float | Literal["auto"] = "auto"
    tune: tuple[Literal["codes", "scales"], ...] = ("codes", "scales")
    holdout: float = Field(0.1, gt=0.0, le=0.5)
    tokens: int = Field(2048, ge=1, le=2**24)

    @model_validator(mode="after")
    def _something_moves(self) -> RefineSection:
        if not self.tune or len(set(self.tune)) < len(self.tune):
            raise ValueError(f"tune: {list(self.tune)}: name codes, scales, or both once")
        if self.rate != "auto" and not 0 <= self.rate <= 1:
            raise ValueError(f"rate: {self.rate}: a share of a code step between 0 and 1, or auto")
        return self

    @property
    def active(self) -> bool:
        return self.kind != "none"

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates that are tried."""
        if self.rate != "auto":
            return (self.rate,)
        return (1 / self.steps,) if self.kind == "sign" else RATES

    @property
    def held_out_every(self) -> int:
        """One window in so many is held back."""
        return max(2, round(1 / self.holdout))
