"""A whole recipe, and what its sections must agree on."""

from __future__ import annotations

import hashlib
import json
from typing import ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from moebit.recipe.allocation import AllocationSection, SwitchingSection
from moebit.recipe.calibration import CalibrationSection
from moebit.recipe.inputs import ActivationsSection, RotationSection
from moebit.recipe.refine import RefineSection
from moebit.recipe.router import RouterSection
from moebit.recipe.section import Section
from moebit.recipe.smoothing import SmoothingSection
from moebit.recipe.solver import SolverSection
from moebit.recipe.weights import WeightsSection

FP4_FORMATS = ("compressed-tensors", "mlx")


class Recipe(Section):
    """One complete description of a quantization."""

    named_if_on: ClassVar[frozenset[str]] = frozenset({"refine"})

    version: Literal[1] = 1
    weights: WeightsSection = Field(default_factory=WeightsSection)
    solver: SolverSection = Field(default_factory=SolverSection)
    refine: RefineSection = Field(default_factory=RefineSection)
    activations: ActivationsSection = Field(default_factory=ActivationsSection)
    rotation: RotationSection = Field(default_factory=RotationSection)
    smoothing: SmoothingSection = Field(default_factory=SmoothingSection)
    router: RouterSection = Field(default_factory=RouterSection)
    calibration: CalibrationSection = Field(default_factory=CalibrationSection)
    allocation: AllocationSection = Field(default_factory=AllocationSection)
    switching: SwitchingSection = Field(default_factory=SwitchingSection)
    format: Literal["native", "compressed-tensors", "dense", "gguf", "gptq", "awq", "mlx"] = "native"

    @model_validator(mode="after")
    def _fp8_is_for_engines(self) -> Recipe:
        kind = self.weights.type
        if self.weights.float8 and self.solver.method != "rtn":
            raise ValueError(f"weights.type: {kind} is rounded to nearest; set solver.method: rtn")
        if self.weights.float8 and self.activations.bits != 8:
            raise ValueError(f"weights.type: {kind} is written for engines that multiply in fp8; set activations.bits: 8")
        if self.weights.float8 and self.format != "compressed-tensors":
            raise ValueError(f"weights.type: {kind}: format {self.format} does not hold it; set format: compressed-tensors")
        return self

    @model_validator(mode="after")
    def _blocks_have_their_formats(self) -> Recipe:
        kind = self.weights.type
        if self.format == "gguf" and not self.weights.ggml:
            also = ": a GGUF file keeps the scale of the whole tensor in a tensor of its own, which is not written yet"
            raise ValueError(
                f"format: gguf holds ggml's block types and not weights.type: {kind}{also if kind == 'nvfp4' else ''}; "
                "set it to q4_k, q3_k, ..., or take a preset gguf-*"
            )
        if self.weights.fp4 and self.format not in ("gguf", *FP4_FORMATS):
            raise ValueError(f"weights.type: {kind}: format {self.format} does not hold it; set format: {' or '.join(FP4_FORMATS)}")
        if self.format != "gguf" and self.weights.ggml and not self.weights.fp4:
            raise ValueError(f"weights.type: {kind} is a block type of ggml; set format: gguf, or weights.type: int")
        blocks = self.weights.ggml or self.weights.fp4
        if blocks and self.solver.scales == "dynamic":
            raise ValueError(f"solver.scales: dynamic: blocks of {kind} are fixed before the solve; set solver.scales: static")
        budgeted = self.allocation.kind == "budget" and not self.switching.share
        if blocks and self.needs_profile and not budgeted:
            raise ValueError(
                f"allocation and switching choose integer widths, not types like {kind}; set allocation.kind: budget, or use "
                "weights.overrides"
            )
        return self

    @model_validator(mode="after")
    def _the_format_says_what_happens_to_inputs(self) -> Recipe:
        a = self.activations
        if a.type == "fp8" and (self.format != "compressed-tensors" or a.bits != 8):
            raise ValueError(
                "activations.type: fp8 has 8 bits and is written for engines; set activations.bits: 8, format: compressed-tensors"
            )
        if self.format == "native" or not (a.rounded or self.rotation.online != "none"):
            return self
        if self.rotation.online != "none":
            raise ValueError(f"rotation.online: {self.rotation.online}: format {self.format} has no place to say so; set format: native")
        if self.format != "compressed-tensors":
            raise ValueError(
                f"activations.bits: {a.bits}: format {self.format} has no place to say so; "
                "set format: native, or compressed-tensors for 8 bits"
            )
        if (a.bits, a.clip, a.qkv_bits) != (8, 1.0, 16):
            raise ValueError(
                f"activations of {a.bits} bits (query, key and value {a.qkv_bits}, clip {a.clip}): format compressed-tensors is written "
                "with 8 bits, clip 1.0 and whole query, key and value; set those, or format: native"
            )
        if not a.symmetric:
            raise ValueError("activations.bits: 8 is written for engines with symmetric activations; set activations.symmetric: true")
        return self._checked_inputs()

    def _checked_inputs(self) -> Recipe:
        """Weights beside which engines round inputs to 8 bits."""
        w = self.weights
        if w.float8:
            if not self.input_float8:
                raise ValueError(
                    f"activations.type: int: engines multiply weights.type: {w.type} with fp8 inputs; set activations.type: fp8"
                )
            return self
        grid = (w.type, w.bits, w.group_size, w.symmetric, w.signed)
        if self.input_float8 and grid != ("int", 4, 128, True, False):
            raise ValueError(
                "activations.type: fp8 needs fp8 weights, or symmetric integers of 4 bits in groups of 128; "
                "set weights.type: fp8, or weights.bits: 4, weights.group_size: 128, weights.symmetric: true, weights.signed: false"
            )
        if not self.input_float8 and grid != ("int", 8, -1, True, False):
            raise ValueError(
                "activations.bits: 8 needs 8-bit symmetric weights with one scale per output channel; "
                "set weights.bits: 8, weights.group_size: -1, weights.symmetric: true, weights.signed: false"
            )
        return self

    @model_validator(mode="after")
    def _channels_are_scaled_once(self) -> Recipe:
        if self.solver.method == "awq" and self.smoothing.kind != "none":
            raise ValueError(f"smoothing.kind: {self.smoothing.kind} and solver.method: awq scale the same channels; set one of the two")
        return self

    @model_validator(mode="after")
    def _balance_has_something_to_calibrate(self) -> Recipe:
        if self.calibration.balance != "none" and not self.needs_hessians and self.smoothing.kind != "expert_aware":
            raise ValueError(
                "calibration.balance: rounding to nearest looks at no tokens of an expert; "
                "set solver.method: gptq, or smoothing.kind: expert_aware"
            )
        return self

    @model_validator(mode="after")
    def _refining_knows_what_arrives(self) -> Recipe:
        if not self.refine.active:
            return self
        if self.rotation.online != "none":
            raise ValueError(
                f"refine.kind: {self.refine.kind} does not learn behind rotation.online: {self.rotation.online} yet; "
                "set rotation.online: none, or refine.kind: none"
            )
        if self.weights.type == "fp8":
            raise ValueError(
                f"refine.kind: {self.refine.kind}: weights.type: fp8 is rounded to nearest and nothing else; "
                "set weights.type: int, or refine.kind: none"
            )
        return self

    @model_validator(mode="after")
    def _coverage_has_hessians(self) -> Recipe:
        if self.calibration.coverage == "soft" and self.solver.method != "gptq":
            raise ValueError("calibration.coverage: soft is about gptq's Hessians; set solver.method: gptq, or calibration.coverage: layer")
        return self

    @model_validator(mode="after")
    def _widths_and_channels_belong_to_integers(self) -> Recipe:
        if self.needs_profile and self.weights.float8:
            raise ValueError("allocation and switching choose integer widths; set weights.type: int")
        if self.allocation.kind != "uniform" and self.activations.bits != 16:
            raise ValueError("allocation: engines that round activations take one width; set activations.bits: 16")
        if self.switching.share and self.format != "native":
            raise ValueError(f"switching: format {self.format} has no place for channels apart; set format: native")
        changed = {
            "activations.bits": self.activations.bits != 16,
            "rotation.absorbed": self.rotation.absorbed != "none",
            "rotation.online": self.rotation.online != "none",
            "smoothing.kind": self.smoothing.kind != "none",
            "solver.method: awq": self.solver.method == "awq",
        }
        if self.switching.share and any(changed.values()):
            named = ", ".join(key for key, on in changed.items() if on)
            raise ValueError(
                f"switching: channels apart are kept as the checkpoint has them, but {named} changes what they meet; leave it out"
            )
        return self

    @property
    def input_float8(self) -> bool:
        """Whether inputs are rounded to float8 numbers."""
        kind = self.activations.type
        return self.activations.bits == 8 and (kind == "fp8" or (kind == "auto" and self.weights.float8))

    @property
    def needs_profile(self) -> bool:
        """Whether widths or channels are chosen from what texts say about the experts."""
        return self.allocation.kind != "uniform" or self.switching.share > 0

    @property
    def needs_calibration(self) -> bool:
        looks = self.scales_channels or self.router.align != "none" or self.router.realign != "none" or self.rotation.online == "duquant"
        return self.needs_hessians or looks or self.refine.active

    @property
    def needs_hessians(self) -> bool:
        """Whether weights are rounded by the second moments of what arrives at them."""
        return self.solver.method != "rtn"

    @property
    def needs_reference(self) -> bool:
        """Whether something is compared with what the full-precision model makes of the calibration windows."""
        return self.router.realign != "none" or self.compares_inputs

    @property
    def compares_inputs(self) -> bool:
        """Whether inputs of modules are compared with what full precision delivers there."""
        return self.solver.drift != "none" or self.refine.active

    @property
    def scales_channels(self) -> bool:
        """Whether channels are scaled, layer by layer, before weights are rounded."""
        return self.solver.method == "awq" or self.smoothing.kind != "none"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def digest(self) -> str:
        """sha256 of the recipe's content, independent of how its YAML is written."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()
