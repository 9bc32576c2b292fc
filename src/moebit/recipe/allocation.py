"""`allocation` and `switching`: who gets more bits, and which channels are kept beside the output."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from moebit.recipe.section import BIT_WIDTHS, Section
from moebit.recipe.weights import GGML_TYPES


class AllocationSection(Section):
    """Which modules get more bits and which fewer; `uniform` gives all of them `weights.bits`.

    kind: `fuzzy` (MoQa: clusters of significance), `knapsack` (measured errors), `frequency` (tokens alone), `budget` (measured
        errors, over whatever the format and the engine can vary: what `--size` and `--bits` set).
    target_bits: average on disk of everything quantized, scales included. target_bytes: of all files that an engine reads (budget).
    ladder: widths to choose from. types: block types of ggml to choose from (budget; none: all that llama.cpp at hand has).
    granularity: what has one width: an expert, a projection, a layer's experts (the last two: knapsack and budget).
    significance: over data sets, for fuzzy. solver: what rounds where errors are measured; `auto` is gptq where the model is rounded with
    it, else rtn. engine: restricts to what it serves.
    """

    named_if_on = frozenset({"target_bytes", "types"})

    kind: Literal["uniform", "fuzzy", "knapsack", "frequency", "budget"] = "uniform"
    target_bits: float | None = Field(None, gt=0, le=16)
    target_bytes: int | None = Field(None, gt=0)
    ladder: list[int] = Field(default_factory=lambda: [2, 3, 4, 6, 8])
    types: list[str] = Field(default_factory=list)
    granularity: Literal["expert", "projection", "layer"] = "expert"
    significance: Literal["mean", "max"] = "mean"
    solver: Literal["auto", "rtn", "gptq"] = "auto"
    engine: Literal["any", "vllm", "sglang", "transformers", "llama.cpp", "mlx"] = "any"

    @field_validator("ladder")
    @classmethod
    def _known_widths(cls, ladder: list[int]) -> list[int]:
        if not ladder or len(set(ladder)) < len(ladder) or not set(ladder) <= set(BIT_WIDTHS):
            raise ValueError(f"{ladder}: choose some of {', '.join(map(str, BIT_WIDTHS))}, each once")
        return ladder

    @field_validator("types")
    @classmethod
    def _known_types(cls, types: list[str]) -> list[str]:
        unknown = [kind for kind in types if kind not in GGML_TYPES]
        if unknown:
            raise ValueError(f"{unknown[0]!r}: choose some of {', '.join(GGML_TYPES)}")
        return types

    @model_validator(mode="after")
    def _target(self) -> AllocationSection:
        if self.kind == "budget":
            if (self.target_bits is None) == (self.target_bytes is None):
                raise ValueError("kind: budget needs one of target_bits and target_bytes")
            return self
        if self.target_bytes is not None or self.types:
            raise ValueError(f"target_bytes and types belong to kind: budget, not {self.kind}")
        if self.engine not in ("any", "vllm"):
            raise ValueError(f"engine: {self.engine} belongs to kind: budget; others know any and vllm")
        if (self.kind == "uniform") != (self.target_bits is None):
            need = "needs target_bits" if self.kind != "uniform" else "takes its width from weights.bits; leave target_bits out"
            raise ValueError(f"kind: {self.kind} {need}")
        if self.kind in ("fuzzy", "frequency") and (self.granularity != "expert" or self.engine != "any"):
            raise ValueError(f"kind: {self.kind} compares the experts of one layer; granularity and engine need kind: knapsack")
        return self


class SwitchingSection(Section):
    """Channels kept in full precision beside the output, for `moebit adapt`.

    share: of the channels of every expert (or `per` layer), the most dynamic over the texts; 0 keeps none.
    """

    share: float = Field(0.0, ge=0.0, le=0.25)
    per: Literal["expert", "layer"] = "expert"
