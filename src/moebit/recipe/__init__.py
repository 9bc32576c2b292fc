"""Recipes: what to do, as data. A recipe is a YAML file or a dict; an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from moebit.errors import BadInputError
from moebit.recipe.reading import is_there, parse_yaml, read_text

GROUP_SIZES = (-1, 32, 64, 128)
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
ACTIVATION_WIDTHS = (3, 4, 5, 6, 7, 8, 16)


class _Section(BaseModel):
    """A part of a recipe.

    Attributes:
        named_if_on: fields that are left out where they have their default, so that a recipe without them keeps its text and digest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    named_if_on: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {key: value for key, value in handler(self).items() if key not in self.named_if_on or value != fields[key].default}


class WeightsSection(_Section):
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
    ignore: list[str] = []

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


class ActivationsSection(_Section):
    """What the inputs of quantized matrices are rounded to as the model runs, every token on a grid of its own.

    bits: of the inputs of quantized linears and experts and of the experts' down projections; 16 for not at all.
    symmetric: without a zero point. clip: share of a token's range that the grid covers.
    qkv_bits: of query, key and value, per token and head, where the architecture's attention allows it; the plan says where not.

    The native format carries it: moebit's runtime and `moebit evaluate` do it. compressed-tensors has 8 bits, symmetric, which engines do,
    and `moebit evaluate` as vLLM does.
    Calibration runs on unrounded activations.
    """

    bits: int = 16
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


class RotationSection(_Section):
    """Orthogonal transforms.

    absorbed: in the weights, at no run-time cost (`methods/rotation.py`): `r1` of the hidden states, `r1r2` of attention's values too.
    online: of the inputs of quantized matrices, applied as the model runs and merged into the weights (`methods/online.py`): `hadamard`,
        random signs and Hadamard blocks, or `duquant`, rotations found on the calibration tokens. The native format carries it.
    down: whether the experts of a layer share one in front of their down projections, or have one each.
    """

    absorbed: Literal["none", "r1", "r1r2"] = "none"
    online: Literal["none", "hadamard", "duquant"] = "none"
    down: Literal["shared", "expert"] = "shared"


class SolverSection(_Section):
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
    affinity_power: float = Field(0.0, ge=0.0)
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


class SmoothingSection(_Section):
    """Scales between activations and weights that leave the function as it is, absorbed in both (methods/smoothing.py).

    kind: `smoothquant` behind norms, from all tokens of a layer; `expert_aware` from every expert's own, and behind values and up as well.
    alpha: how much of an activation's extremes moves into the weights.
    aggregate: how experts' scales become the one of their norm; `none` does not ask them.
    """

    kind: Literal["none", "smoothquant", "expert_aware"] = "none"
    alpha: float = Field(0.6, ge=0.0, le=1.0)
    aggregate: Literal["max", "frequency", "router", "none"] = "max"


class RouterSection(_Section):
    """What is done to the routers (methods/router.py, methods/realign.py). They are stored as plain values whatever their bits.

    bits: of the grid that a router's values lie on, 3 to 8; 16 leaves them.
    align: `kl` chooses the clipping ratios so that the same experts stay chosen, else by the rounding error of the weight.
    top_share: `kl` looks at `k + top_share (E - k)` experts one by one and at the others together. kl_weight: lambda.
    realign: `ridge` corrects routers for the drift of their inputs; with any recipe and any bits.
    realign_weight: of a token in it: `one`, or `margin` for more where the choice is close.
    """

    bits: int = 16
    align: Literal["none", "kl"] = "none"
    top_share: float = Field(0.0, ge=0.0, le=1.0)
    kl_weight: float = Field(1.0, ge=0.0)
    realign: Literal["none", "ridge"] = "none"
    realign_weight: Literal["one", "margin"] = "one"

    @field_validator("bits")
    @classmethod
    def _known_width(cls, bits: int) -> int:
        if bits not in (3, 4, 5, 6, 7, 8, 16):
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


class CalibrationSection(_Section):
    """What the model is calibrated on: `samples` windows of `seq_len` tokens, spread evenly over the given texts, or sampled by itself.

    kind: `text`; or what the model writes (calibration/sampling.py): `ebss`, `self`, `self-balanced`. Text that is given all the same
        takes its place, unless `text_share` says how much of the set it is to be.
    width, temperature, scope, extend, oversample, repetition_penalty, no_repeat_ngram: of the sampling; null is the kind's own value.
    coverage: what the Hessians of experts with few tokens are drawn towards (gptq): `layer`, that of all its tokens, or `soft`, of tokens
        as likely as the router would have sent them there (methods/soft_coverage.py).
    balance: experts with fewer than `balance k seq_len / E` tokens draw further windows for themselves (methods/balance.py); `none`, or
        the ratio. pool: there are at most so many times `samples` of those.
    """

    named_if_on = frozenset({"coverage"})

    kind: Literal["text", "ebss", "self", "self-balanced"] = "text"
    samples: int = Field(128, ge=1)
    seq_len: int = Field(512, ge=8)
    coverage: Literal["layer", "soft"] = "layer"
    balance: float | str = "none"
    pool: int = Field(4, ge=1)

    text_share: float = Field(0.0, ge=0.0, lt=1.0)
    width: int = Field(4, ge=1)
    temperature: float | None = Field(None, gt=0.0)
    scope: Literal["set", "sequence"] = "set"
    extend: Literal["likeliest", "sampled"] | None = None
    oversample: int = Field(3, ge=1)
    repetition_penalty: float | None = Field(None, ge=1.0)
    no_repeat_ngram: int | None = Field(None, ge=0)

    @field_validator("balance", mode="before")
    @classmethod
    def _ratio(cls, balance: Any) -> Any:
        number = isinstance(balance, int | float) and not isinstance(balance, bool) and 0 < balance < float("inf")
        if balance != "none" and not number:
            raise ValueError(f"{balance!r}: a positive ratio like 2, or none")
        return float(balance) if number else balance

    @model_validator(mode="after")
    def _only_what_the_kind_knows(self) -> CalibrationSection:
        sampling = {"text_share", "temperature", "repetition_penalty", "no_repeat_ngram"}
        known = {
            "text": set[str](),
            "self": sampling,
            "self-balanced": sampling | {"oversample"},
            "ebss": sampling | {"width", "scope", "extend"},
        }
        for key in (*sorted(sampling), "width", "scope", "extend", "oversample"):
            if key not in known[self.kind] and getattr(self, key) != type(self).model_fields[key].default:
                kinds = ", ".join(kind for kind, keys in known.items() if key in keys)
                raise ValueError(f"{key} is of no use with kind: {self.kind}; leave it out, or set kind to one of {kinds}")
        return self


class AllocationSection(_Section):
    """Which modules get more bits and which fewer; `uniform` gives all of them `weights.bits`.

    kind: `fuzzy` (MoQa: clusters of significance), `knapsack` (measured errors), `frequency` (tokens alone).
    target_bits: average on disk of everything quantized, scales included. ladder: widths to choose from.
    granularity: what has one width: an expert, a projection, a layer's experts (the last two: knapsack).
    significance: over data sets, for fuzzy. solver: what rounds where errors are measured. engine: `vllm` restricts to what it serves.
    """

    kind: Literal["uniform", "fuzzy", "knapsack", "frequency"] = "uniform"
    target_bits: float | None = Field(None, gt=0)
    ladder: list[int] = [2, 3, 4, 6, 8]
    granularity: Literal["expert", "projection", "layer"] = "expert"
    significance: Literal["mean", "max"] = "mean"
    solver: Literal["rtn", "gptq"] = "rtn"
    engine: Literal["any", "vllm"] = "any"

    @field_validator("ladder")
    @classmethod
    def _known_widths(cls, ladder: list[int]) -> list[int]:
        if not ladder or len(set(ladder)) < len(ladder) or not set(ladder) <= set(BIT_WIDTHS):
            raise ValueError(f"{ladder}: choose some of {', '.join(map(str, BIT_WIDTHS))}, each once")
        return ladder

    @model_validator(mode="after")
    def _target(self) -> AllocationSection:
        if (self.kind == "uniform") != (self.target_bits is None):
            need = "needs target_bits" if self.kind != "uniform" else "takes its width from weights.bits; leave target_bits out"
            raise ValueError(f"kind: {self.kind} {need}")
        if self.kind in ("fuzzy", "frequency") and (self.granularity != "expert" or self.engine != "any"):
            raise ValueError(f"kind: {self.kind} compares the experts of one layer; granularity and engine need kind: knapsack")
        return self


class SwitchingSection(_Section):
    """Channels kept in full precision beside the output, for `moebit adapt`.

    share: of the channels of every expert (or `per` layer), the most dynamic over the texts; 0 keeps none.
    """

    share: float = Field(0.0, ge=0.0, le=0.25)
    per: Literal["expert", "layer"] = "expert"


class Recipe(_Section):
    """One complete description of a quantization."""

    version: Literal[1] = 1
    weights: WeightsSection = WeightsSection()
    solver: SolverSection = SolverSection()
    activations: ActivationsSection = ActivationsSection()
    rotation: RotationSection = RotationSection()
    smoothing: SmoothingSection = SmoothingSection()
    router: RouterSection = RouterSection()
    calibration: CalibrationSection = CalibrationSection()
    allocation: AllocationSection = AllocationSection()
    switching: SwitchingSection = SwitchingSection()
    format: Literal["native", "compressed-tensors", "dense"] = "native"

    @model_validator(mode="after")
    def _fp8_is_for_engines(self) -> Recipe:
        if self.weights.type == "fp8" and self.solver.method != "rtn":
            raise ValueError("weights.type: fp8 is rounded to nearest; set solver.method: rtn")
        if self.weights.type == "fp8" and self.activations.bits != 8:
            raise ValueError("weights.type: fp8 is written for engines that multiply in fp8; set activations.bits: 8")
        if self.weights.type == "fp8" and self.format != "compressed-tensors":
            raise ValueError(f"weights.type: fp8: format {self.format} does not hold it; set format: compressed-tensors")
        return self

    @model_validator(mode="after")
    def _the_format_says_what_happens_to_inputs(self) -> Recipe:
        a, w = self.activations, self.weights
        if self.format == "native" or not (a.rounded or self.rotation.online != "none"):
            return self
        if self.rotation.online != "none":
            raise ValueError(f"rotation.online: {self.rotation.online}: format {self.format} has no place to say so; set format: native")
        if self.format == "dense":
            raise ValueError(
                f"activations.bits: {a.bits}: format dense has no place to say so; set format: native, or compressed-tensors for 8 bits"
            )
        if (a.bits, a.clip, a.qkv_bits) != (8, 1.0, 16):
            raise ValueError(
                f"activations of {a.bits} bits (query, key and value {a.qkv_bits}, clip {a.clip}): format compressed-tensors is written "
                "with 8 bits, clip 1.0 and whole query, key and value; set those, or format: native"
            )
        if not a.symmetric:
            raise ValueError("activations.bits: 8 is written for engines with symmetric activations; set activations.symmetric: true")
        if (w.bits, w.group_size, w.symmetric, w.signed) != (8, -1, True, False):
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
    def _drift_compares_the_same_channels(self) -> Recipe:
        if self.solver.drift != "none" and self.smoothing.kind != "none":
            raise ValueError(
                f"solver.drift: {self.solver.drift} compares inputs with full precision's, and smoothing.kind: {self.smoothing.kind} "
                "scales them; set one of the two to none"
            )
        return self

    @model_validator(mode="after")
    def _coverage_has_hessians(self) -> Recipe:
        if self.calibration.coverage == "soft" and self.solver.method != "gptq":
            raise ValueError("calibration.coverage: soft is about gptq's Hessians; set solver.method: gptq, or calibration.coverage: layer")
        return self

    @model_validator(mode="after")
    def _widths_and_channels_belong_to_integers(self) -> Recipe:
        if self.needs_profile and self.weights.type == "fp8":
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
    def needs_profile(self) -> bool:
        """Whether widths or channels are chosen from what texts say about the experts."""
        return self.allocation.kind != "uniform" or self.switching.share > 0

    @property
    def needs_calibration(self) -> bool:
        looks = self.scales_channels or self.router.align != "none" or self.router.realign != "none" or self.rotation.online == "duquant"
        return self.needs_hessians or looks

    @property
    def needs_hessians(self) -> bool:
        """Whether weights are rounded by the second moments of what arrives at them."""
        return self.solver.method != "rtn"

    @property
    def needs_reference(self) -> bool:
        """Whether something is compared with what the full-precision model makes of the calibration windows."""
        return self.router.realign != "none" or self.solver.drift != "none"

    @property
    def scales_channels(self) -> bool:
        """Whether channels are scaled, layer by layer, before weights are rounded."""
        return self.solver.method == "awq" or self.smoothing.kind != "none"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def digest(self) -> str:
        """sha256 of the recipe's content, independent of how its YAML is written."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def presets() -> dict[str, str]:
    """The shipped recipes: name -> YAML text."""
    folder = resources.files("moebit") / "recipe" / "presets"
    return {
        item.name.removesuffix(".yaml"): item.read_text()
        for item in sorted(folder.iterdir(), key=lambda i: i.name)
        if item.name.endswith(".yaml")
    }


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a preset's name, a YAML file, a dict, or nothing (the default: `gptq-w4`), with `key.path` overrides on top.

    Raises:
        BadInputError: unknown preset, unreadable file, unknown key (naming the nearest known one), a value that cannot be.
    """
    if isinstance(recipe, Recipe):
        data: dict[str, Any] = recipe.model_dump()
    elif isinstance(recipe, Mapping):
        data = json.loads(json.dumps(recipe))
    else:
        data = _read(recipe if recipe is not None else "gptq-w4")
    for path, value in (overrides or {}).items():
        _set(data, path, value)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise BadInputError("recipe: " + "; ".join(_explain(item) for item in error.errors())) from error


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` of the command line; the value is read as YAML.

    Raises:
        BadInputError: no `=`.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise BadInputError(f"--set {text}: expected key.path=value, for example --set weights.bits=3")
    try:
        return path, parse_yaml(value)
    except ValueError as error:
        raise BadInputError(f"--set {text}: the value is not valid YAML ({error})") from error


def _read(recipe: str | Path) -> dict[str, Any]:
    known = presets()
    path = Path(recipe)
    if str(recipe) in known:
        text = known[str(recipe)]
    elif is_there(path):
        text = read_text(path, "recipe ")
    else:
        near = difflib.get_close_matches(str(recipe), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInputError(f"recipe {str(recipe)!r}: neither a preset nor a file{hint} (presets: {', '.join(known)})")
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise BadInputError(f"recipe {recipe}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise BadInputError(f"recipe {recipe}: expected a mapping of sections, got {type(data).__name__}")
    return data


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise BadInputError(f"--set {path}: {key!r} is a value, not a section")
    data[leaf] = value


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    model: Any = Recipe
    for part in item["loc"][:-1]:
        model = model.model_fields[part].annotation
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
    return f"{path}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f" (known here: {', '.join(known)})")
