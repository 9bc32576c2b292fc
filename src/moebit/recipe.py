"""Recipes: what to do, as data. A recipe is a YAML file or a dict; an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moebit.errors import BadInputError

GROUP_SIZES = (-1, 32, 64, 128)
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """What the engine rounds the inputs of quantized matrices to, per token and as it runs: 16 not at all, 8 to the weights' type.

    It concerns the engine: calibration and `moebit evaluate` run with unrounded activations.
    """

    bits: Literal[16, 8] = 16
    symmetric: bool = False


class SolverSection(_Section):
    """How weights are rounded.

    method: `rtn` to nearest; `gptq`; `awq` to nearest after channels were scaled (`methods/awq.py`).
    scales: `static` from the original weights, `dynamic` from the columns as updated when a group begins (not with act_order).
    affinity_power: power p of the routing weight in the Hessians, `sum g^p x x^T`; 0 weighs all routed tokens alike.
    output_aware: weigh routed tokens by what an error costs in the layer's output instead (gptq).
    """

    method: Literal["rtn", "gptq", "awq"] = "gptq"
    scales: Literal["static", "dynamic"] = "static"
    act_order: bool = True
    damping: float = Field(0.01, ge=0.0, le=1.0)
    clip_search: bool = True
    affinity_power: float = Field(0.0, ge=0.0)
    output_aware: bool = False

    @model_validator(mode="after")
    def _one_weighting(self) -> SolverSection:
        if self.output_aware and (self.affinity_power or self.method != "gptq"):
            raise ValueError("output_aware: true has the affinity in it and is gptq's; set affinity_power: 0, method: gptq")
        return self

    @model_validator(mode="after")
    def _static_for_act_order(self) -> SolverSection:
        if self.method == "gptq" and self.scales == "dynamic" and self.act_order:
            raise ValueError("scales: dynamic needs act_order: false (columns would need a group index each); set one of the two")
        return self


class RotationSection(_Section):
    """Orthogonal transforms.

    absorbed: in the weights, at no run-time cost (`methods/rotation.py`): `r1` of the hidden states, `r1r2` of attention's values too.
    """

    absorbed: Literal["none", "r1", "r1r2"] = "none"


class CalibrationSection(_Section):
    """What the model is calibrated on: `samples` windows of `seq_len` tokens, spread evenly over the given texts, or sampled by itself.

    kind: `text`; or what the model writes (calibration/sampling.py): `ebss`, `self`, `self-balanced`. Text that is given all the same
        takes its place, unless `text_share` says how much of the set it is to be.
    width, temperature, scope, extend, oversample, repetition_penalty, no_repeat_ngram: of the sampling; null is the kind's own value.
    """

    kind: Literal["text", "ebss", "self", "self-balanced"] = "text"
    samples: int = Field(128, ge=1)
    seq_len: int = Field(512, ge=8)
    text_share: float = Field(0.0, ge=0.0, lt=1.0)
    width: int = Field(4, ge=1)
    temperature: float | None = Field(None, gt=0.0)
    scope: Literal["set", "sequence"] = "set"
    extend: Literal["likeliest", "sampled"] = "likeliest"
    oversample: int = Field(3, ge=1)
    repetition_penalty: float | None = Field(None, ge=1.0)
    no_repeat_ngram: int | None = Field(None, ge=0)

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


class Recipe(_Section):
    """One complete description of a quantization."""

    version: Literal[1] = 1
    weights: WeightsSection = WeightsSection()
    solver: SolverSection = SolverSection()
    activations: ActivationsSection = ActivationsSection()
    rotation: RotationSection = RotationSection()
    calibration: CalibrationSection = CalibrationSection()
    format: Literal["native", "compressed-tensors", "dense"] = "native"

    @model_validator(mode="after")
    def _eight_bit_activations_belong_to_eight_bit_weights(self) -> Recipe:
        if self.weights.type == "fp8" and self.solver.method != "rtn":
            raise ValueError("weights.type: fp8 is rounded to nearest; set solver.method: rtn")
        if self.weights.type == "fp8" and self.activations.bits != 8:
            raise ValueError("weights.type: fp8 is written for engines that multiply in fp8; set activations.bits: 8")
        if self.activations.bits == 16:
            return self
        if self.format != "compressed-tensors":
            raise ValueError(
                f"activations.bits: 8: format {self.format} has no place to say so and moebit does not run it; "
                "set format: compressed-tensors"
            )
        if not self.activations.symmetric:
            raise ValueError("activations.bits: 8 is written for engines with symmetric activations; set activations.symmetric: true")
        w = self.weights
        if (w.bits, w.group_size, w.symmetric, w.signed) != (8, -1, True, False):
            raise ValueError(
                "activations.bits: 8 needs 8-bit symmetric weights with one scale per output channel; "
                "set weights.bits: 8, weights.group_size: -1, weights.symmetric: true, weights.signed: false"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        return self.solver.method != "rtn"

    @property
    def scales_channels(self) -> bool:
        """Whether channels are scaled, layer by layer, before weights are rounded."""
        return self.solver.method == "awq"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def digest(self) -> str:
        """sha256 of the recipe's content, independent of how its YAML is written."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


# Part of the recipe language that names a method this version does not have: said plainly instead of "unknown key".
# Value that means "off", of every key that switches a method on; None for a key that only tunes one.
_NOT_YET: dict[str, dict[str, Any]] = {
    "router": {"bits": 16, "align": "none", "realign": "none"},
    "smoothing": {"kind": "none", "alpha": None, "aggregate": None},
    "allocation": {"kind": "uniform"},
    "switching": {"share": 0.0},
}


def presets() -> dict[str, str]:
    """The shipped recipes: name -> YAML text."""
    folder = resources.files("moebit") / "recipes"
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
    _drop_inactive(data)
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
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise BadInputError(f"--set {text}: the value is not valid YAML ({str(error).splitlines()[0]})") from error


def _read(recipe: str | Path) -> dict[str, Any]:
    known = presets()
    path = Path(recipe)
    if str(recipe) in known:
        text = known[str(recipe)]
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInputError(f"recipe {recipe}: not UTF-8 text ({error})") from error
    else:
        near = difflib.get_close_matches(str(recipe), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadInputError(f"recipe {str(recipe)!r}: neither a preset nor a file{hint} (presets: {', '.join(known)})")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
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


def _drop_inactive(data: dict[str, Any]) -> None:
    """Sections and values of the recipe language that mean "off" are accepted; switched on they are refused by name."""
    for section, off in _NOT_YET.items():
        values = data.pop(section, None) or {}
        if not isinstance(values, dict):
            raise BadInputError(f"recipe: {section}: expected a section with {', '.join(off)}, got {values!r}")
        for key, value in values.items():
            if key not in off:
                near = difflib.get_close_matches(str(key), off, n=1, cutoff=0.4)
                raise BadInputError(f"recipe: {section}.{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
            if off[key] is not None and value != off[key]:
                raise BadInputError(f"recipe: {section}.{key}: {value} is not in this version of moebit (only {off[key]!r} is)")
    calibration = data.get("calibration")
    if isinstance(calibration, dict) and calibration.pop("balance", None) not in (None, "none"):
        raise BadInputError("recipe: calibration.balance is not in this version of moebit (only 'none' is)")
    rotation = data.get("rotation")
    if isinstance(rotation, dict):
        rotation = data["rotation"] = dict(rotation)
        if (online := rotation.pop("online", "none")) != "none":
            raise BadInputError(f"recipe: rotation.online: {online} is not in this version of moebit (only 'none' is)")
    activations = data.get("activations")
    if isinstance(activations, dict):
        activations = data["activations"] = dict(activations)
        if activations.get("bits", 16) not in (16, 8):
            raise BadInputError(f"recipe: activations.bits: {activations['bits']} is not in this version of moebit (16 and 8 are)")
        for key, neutral in {"qkv_bits": 16, "clip": 1.0}.items():
            if activations.pop(key, neutral) != neutral:
                raise BadInputError(f"recipe: activations.{key} is not in this version of moebit (only {neutral!r} is)")


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
