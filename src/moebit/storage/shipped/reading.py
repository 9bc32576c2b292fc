"""Which adapter reads a checkpoint that is shipped quantized, by what its config.json declares.

An adapter finds the tensors that belong together by the stored tensors, not by lists of modules that are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moebit.errors import BadInputError
from moebit.recipe.reading import read_object
from moebit.storage.config import read_config
from moebit.storage.files import TensorEntry
from moebit.storage.shipped import auto_round, awq, bitsandbytes, compressed_tensors, fp8, gptq, mlx, modelopt, mxfp4
from moebit.storage.shipped.decode import FLOAT8
from moebit.storage.shipped.entries import Shipped, UnreadableError, short


class Adapter(Protocol):
    """Reads one format: stored tensors in, the same tensors under their plain names out."""

    def __call__(self, stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
        """The tensors of a checkpoint.

        Args:
            quantization: what config.json declares.

        Raises:
            UnreadableError: a variant of the format that moebit does not read. BadInputError: tensors that are missing or do not fit.
        """


ADAPTERS: dict[str, Adapter] = {
    "fp8": fp8.read,
    "mxfp4": mxfp4.read,
    "compressed-tensors": compressed_tensors.read,
    "modelopt": modelopt.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "auto-round": auto_round.read,
    "bitsandbytes": bitsandbytes.read,
    "mlx": mlx.read,
}
OTHER_NAMES = {"intel/auto-round": "auto-round", "modelopt_fp4": "modelopt", "modelopt_mxfp8": "modelopt", "modelopt_mixed": "modelopt"}
KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json; mlx-lm's is the last
MODELOPT_FILE = "hf_quant_config.json"  # where older versions of ModelOpt declare what they did


def declared(path: Path) -> Mapping[str, Any] | None:
    """The quantization that a checkpoint declares: in its config.json, or in ModelOpt's own file; None where there is none.

    Raises:
        BadInputError: documents that cannot be read.
    """
    found = shipped_config(read_config(path))
    if found is None and (path / MODELOPT_FILE).is_file():
        said = read_object(path / MODELOPT_FILE, remedy="copy it again").get("quantization")
        return {**said, "quant_method": "modelopt"} if said and isinstance(said, Mapping) else None
    return found


def shipped_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization that config.json declares: at the top, or inside the text part of a larger model; None where there is none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in KEYS:
                if part.get(key):
                    found = dict(part[key]) if isinstance(part[key], Mapping) else {"quant_method": part[key]}
                    return {**found, "quant_method": mlx.METHOD} if mlx.is_declared(found) else found
    return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same checkpoint stored plain."""
    result = {key: value for key, value in config.items() if key not in KEYS}
    if isinstance(result.get("text_config"), Mapping):
        result["text_config"] = plain_config(result["text_config"])
    return result


def read_shipped(path: object, stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """The tensors of a checkpoint that is shipped quantized, under their plain names.

    Args:
        path: the checkpoint, for messages. quantization: what `shipped_config` found.

    Raises:
        BadInputError: a scheme that moebit does not read, a tensor that is missing or does not fit.
    """
    named = str(quantization.get("quant_method"))
    method = OTHER_NAMES.get(named, named)
    try:
        if method not in ADAPTERS:
            raise UnreadableError(f"of what is shipped quantized, moebit reads {', '.join(ADAPTERS)}")
        shipped = ADAPTERS[method](stored, quantization)
        if not shipped.quantized:
            raise UnreadableError("config.json says so, but no tensor here is; if this is it, take quantization_config out of config.json")
    except UnreadableError as reason:
        raise BadInputError(f"{path}: already quantized ({method}); give the full-precision checkpoint: {reason}") from reason
    return shipped


def check_plain(path: object, stored: Mapping[str, TensorEntry]) -> None:
    """Refuse 8-bit floats that no configuration explains: without their scales they are other numbers.

    Raises:
        BadInputError: naming the tensor.
    """
    for entry in stored.values():
        if entry.dtype in FLOAT8:
            raise BadInputError(
                f"{path}: tensor {entry.name!r} is {short(entry.dtype)}, but config.json has no quantization_config that says how to read "
                "it; copy the checkpoint's own config.json again"
            )
