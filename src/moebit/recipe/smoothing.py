"""`smoothing`: scales between activations and weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moebit.recipe.section import Section


class SmoothingSection(Section):
    """Scales between activations and weights that leave the function as it is, absorbed in both (methods/smoothing.py).

    kind: `smoothquant` behind norms, from all tokens of a layer; `expert_aware` from every expert's own, and behind values and up as well.
    alpha: how much of an activation's extremes moves into the weights.
    aggregate: how experts' scales become the one of their norm; `none` does not ask them.
    """

    kind: Literal["none", "smoothquant", "expert_aware"] = "none"
    alpha: float = Field(0.6, ge=0.0, le=1.0)
    aggregate: Literal["max", "frequency", "router", "none"] = "max"
