"""`solver`: how weights are rounded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moebit.recipe.section import Section


class SolverSection(Section):
    """How weights are rounded.

    method: `rtn` to nearest; `gptq`; `awq` to nearest after channels were scaled (`methods/awq.py`).
    scales: `static` from the original weights, `dynamic` from the columns as updated when a group begins (not with act_order).
    affinity_power: power p of the routing weight in the Hessians, `sum g^p x x^T`; 0 weighs all routed tokens alike.
    output_aware: weigh routed tokens by what an error costs in the layer's output instead (gptq).
    refit: fit the scales to the codes once more when these are known (tensor/refit.py; gptq).
    drift: `ridge` corrects weights, before they are rounded, for the drift of their inputs (methods/drift.py; gptq).
    """

    named_if_on = frozenset({"refit", "drift"})

    method: Literal["rtn", "gptq", "awq"] = "gptq"
    scales: Literal["static", "dynamic"] = "static"
    act_order: bool = True
    damping: float = Field(0.01, ge=0.0, le=1.0)
    clip_search: bool = True
    affinity_power: float = Field(0.0, ge=0.0, le=64.0)
    output_aware: bool = False
    refit: bool = False
    drift: Literal["none", "ridge"] = "none"

    @model_validator(mode="after")
    def _one_weighting(self) -> SolverSection:
        if self.output_aware and (self.affinity_power or self.method != "gptq"):
            raise ValueError("output_aware: true has the affinity in it and is gptq's; set affinity_power: 0, method: gptq")
        return self

    @model_validator(mode="after")
    def _refit_has_moments(self) -> SolverSection:
        if self.refit and self.method != "gptq":
            raise ValueError(f"refit: true fits scales to what gptq chose; set method: gptq instead of {self.method}, or refit: false")
        return self

    @model_validator(mode="after")
    def _drift_is_gptqs(self) -> SolverSection:
        if self.drift != "none" and self.method != "gptq":
            raise ValueError(f"drift: {self.drift} corrects what gptq rounds; set method: gptq instead of {self.method}, or drift: none")
        return self

    @model_validator(mode="after")
    def _static_for_act_order(self) -> SolverSection:
        if self.method == "gptq" and self.scales == "dynamic" and self.act_order:
            raise ValueError("scales: dynamic needs act_order: false (columns would need a group index each); set one of the two")
        return self
