"""What a native output asks of those who run it, as its config.json says it (docs/format.md, "inputs")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.names import ACTIVATIONS
from moebit.model.inputs import Activations, TransformSpec
from moebit.tensor.row_rounding import Rounding

KINDS = ("hadamard", "duquant")


def activations_config(activations: Activations) -> dict[str, Any]:
    """The value of `activations` in `quantization_config`."""
    result: dict[str, Any] = {}
    if activations.inputs is not None:
        result["inputs"] = _rounding(activations.inputs)
    if activations.transforms:
        result["transforms"] = {
            name: {
                "kind": spec.kind,
                "channels": spec.channels,
                "block": spec.block,
                "count": spec.count,
                "linears": [linear for linear, read in activations.reads.items() if read == name],
            }
            for name, spec in activations.transforms.items()
        }
    if activations.attention is not None:
        result["attention"] = {**_rounding(activations.attention), "modules": list(activations.attention_modules)}
    return result


def read_activations(config: Mapping[str, Any]) -> Activations:
    """From a `quantization_config`; nothing where it says nothing.

    Raises:
        BadInputError: a kind of transform that this moebit does not know, or numbers that do not fit together.
    """
    said = config.get(ACTIVATIONS) or {}
    transforms: dict[str, TransformSpec] = {}
    reads: dict[str, str] = {}
    for name, entry in said.get("transforms", {}).items():
        spec = TransformSpec(entry["kind"], entry["channels"], entry["count"])
        if spec.kind not in KINDS or spec.block != entry["block"]:
            raise BadInputError(
                f"{name}: a transform of kind {spec.kind!r} with blocks of {entry['block']}, which this moebit does not know; "
                "install a newer one"
            )
        transforms[name] = spec
        reads |= dict.fromkeys(entry["linears"], name)
    attention = said.get("attention")
    return Activations(
        Rounding(**said["inputs"]) if "inputs" in said else None,
        transforms,
        reads,
        Rounding(**{key: value for key, value in attention.items() if key != "modules"}) if attention else None,
        tuple(attention["modules"]) if attention else (),
    )


def _rounding(rounding: Rounding) -> dict[str, Any]:
    said = {"bits": rounding.bits, "symmetric": rounding.symmetric, "clip": rounding.clip}
    return {**said, "float8": True} if rounding.float8 else said  # compressed-tensors only: the native format has integers


def describe_activations(activations: Activations) -> dict[str, Any]:
    """For people and JSON: how inputs are rounded, what is transformed, in how many places."""
    kinds = {spec.kind for spec in activations.transforms.values()}
    return {
        "inputs": _rounding(activations.inputs) if activations.inputs else None,
        "attention": {**_rounding(activations.attention), "modules": len(activations.attention_modules)} if activations.attention else None,
        "transforms": {"kind": ", ".join(sorted(kinds)), "count": len(activations.transforms)} if kinds else None,
    }
