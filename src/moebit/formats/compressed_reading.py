"""Reading a compressed-tensors output of moebit: every matrix as the weight that engines make of it.

Source: the compressed-tensors package 0.20.0 and its documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.compressed_matrix import (
    FLOAT,
    FP4_KINDS,
    FP4_VALUES,
    INT,
    MXFP4,
    NVFP4,
    PACKED,
    matrix_specs,
    matrix_value,
    stored_zero_points,
)
from moebit.formats.compressed_tensors import METHOD, stored_modules
from moebit.formats.native import PackedSpec
from moebit.model.experts import layout_of
from moebit.model.seam import is_experts
from moebit.storage.files import Entry, TensorEntry, TensorSpec
from moebit.storage.hub import HubWeights
from moebit.storage.weights import Weights
from moebit.tensor.row_rounding import Rounding

# Suffixes of what is stored beside a matrix.
BESIDE = ("weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


@dataclass(frozen=True)
class Scheme:
    """What config.json says of matrices.

    Attributes:
        storage: one of formats/compressed_matrix.py. block_rows: rows that share a scale.
        inputs: how engines round what they are multiplied with.
    """

    storage: str
    bits: int
    group_size: int
    symmetric: bool = True
    block_rows: int = 1
    inputs: Rounding | None = None

    def spec(self, shape: tuple[int, int], scale_dtype: torch.dtype) -> PackedSpec:
        """How one matrix of this shape is stored."""
        float8 = self.inputs is not None and self.inputs.float8
        return PackedSpec(
            (self.bits,), shape, self.group_size, self.symmetric, scale_dtype, stacked=False, float8=self.storage == FLOAT,
            input_bits=8 if self.inputs else 16, ggml=FP4_KINDS.get(self.storage, ""), input_float8=float8, block_rows=self.block_rows,
        )  # fmt: skip


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """A quantized matrix, read as the dequantized weight X.weight in the type of its scales: what an engine makes of it.

    Attributes:
        parts: its tensors by suffix. scheme: its grid, and what happens to its inputs.
    """

    parts: Mapping[str, TensorEntry]
    scheme: Scheme

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return tuple(self.parts.values())

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop, step, zeros = self.shape[0] if stop is None else stop, self.scheme.block_rows, None
        if "weight_zero_point" in self.parts:  # packed along the rows
            zeros = stored_zero_points(self.parts["weight_zero_point"].read(), self.scheme.bits, self.shape[0])[start:stop]
        begin = start // step * step  # whole blocks of rows

        def read(suffix: str) -> Tensor:
            if suffix == "weight_global_scale":
                return self.parts[suffix].read()
            scale = suffix == "weight_scale"
            return self.parts[suffix].read(begin // step if scale else begin, -(-stop // step) if scale else stop)

        shape = (stop - begin, self.shape[1])
        value = matrix_value(self.scheme.storage, self.scheme.bits, shape, read, zeros, step)
        return value[start - begin :]

    @property
    def packed_spec(self) -> PackedSpec:
        return self.scheme.spec((self.shape[0], self.shape[1]), self.dtype)


def virtual_entries(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The entries of an output with every quantized matrix as one `PackedEntry`.

    Raises:
        BadInputError: a grid that moebit does not write, tensors that do not fit together.
    """
    schemes = [(group["targets"], _scheme(group, config)) for group in config["config_groups"].values()]
    result: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and f"{module}.weight_scale" in entries):
            scheme = next((scheme for targets, scheme in schemes if _matches(module, targets)), None)
            if scheme is None:
                raise BadInputError(f"{module}: quantized, but no group of config.json has it for a target; the output is damaged")
            result[f"{module}.weight"] = _packed_entry(entries, module, leaf, scheme)
        elif leaf not in BESIDE:
            result[name] = entry
    return result


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    weights, storage = group["weights"], str(group.get("format") or config.get("format"))
    strategy, whole = weights["strategy"], weights["strategy"] == "channel"
    known = {PACKED: ("group", "channel"), INT: ("channel",), FLOAT: ("channel", "block"), NVFP4: ("tensor_group",), MXFP4: ("group",)}
    if strategy not in known.get(storage, ()) or not (weights["symmetric"] or storage == PACKED):
        raise BadInputError(f"compressed-tensors {storage!r} with weights {dict(weights)}: moebit reads the grids that it writes")
    rows, size = weights["block_structure"] if strategy == "block" else (1, -1 if whole else int(weights["group_size"]))
    return Scheme(storage, int(weights["num_bits"]), size, weights["symmetric"], rows, _inputs(group))


def _inputs(group: Mapping[str, Any]) -> Rounding | None:
    """What vLLM's kernels do: int8 with the largest magnitude of a token on 127, or float8 with it on 448, ties to even."""
    said = group.get("input_activations")
    if said is None:
        return None
    if not said["symmetric"] or said["strategy"] not in ("token", "group") or said["dynamic"] is not True or said["num_bits"] != 8:
        raise BadInputError(f"compressed-tensors activations {dict(said)}: moebit reads the 8 bits per token that it writes")
    group_size = int(said["group_size"]) if said["strategy"] == "group" else -1
    return Rounding(8, symmetric=True, float8=said["type"] == "float", group_size=group_size)


def _matches(module: str, targets: Iterable[str]) -> bool:
    return any(re.match(t[3:], module) if t.startswith("re:") else t in (module, "Linear") for t in targets)


def _packed_entry(entries: Mapping[str, TensorEntry], module: str, leaf: str, scheme: Scheme) -> PackedEntry:
    shape: tuple[int, ...] = entries[f"{module}.{leaf}"].shape
    if scheme.storage == PACKED and f"{module}.weight_shape" in entries:
        shape = tuple(entries[f"{module}.weight_shape"].read().tolist())
    elif scheme.storage in FP4_KINDS:
        shape = (shape[0], 2 * shape[1])
    scale = entries.get(f"{module}.weight_scale")
    dtype = scale.dtype if scale is not None and scheme.storage not in FP4_KINDS else FP4_VALUES
    wanted = matrix_specs(scheme.spec((shape[0], shape[1]), dtype), scheme.bits)
    missing = [suffix for suffix in wanted if f"{module}.{suffix}" not in entries]
    if missing:
        raise BadInputError(f"tensor {module}.{missing[0]} is missing; the output is damaged")
    stored = {suffix: entries[f"{module}.{suffix}"] for suffix in wanted}
    wrong = next((suffix for suffix, spec in wanted.items() if stored[suffix].spec != spec), None)
    if wrong:
        raise BadInputError(
            f"{module}: {leaf} {list(stored[leaf].shape)} and {wrong} {list(stored[wrong].shape)} are not {scheme.bits} bits of {shape}"
        )
    first = stored[leaf]
    return PackedEntry(first.file, f"{module}.weight", dtype, shape, first.offset, stored, scheme)


class CompressedWeights(Weights):
    """The weights of a compressed-tensors output, dequantized as they are read."""

    def __init__(self, model: Any, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> None:
        self._packed = virtual_entries(entries, config)
        self._inner = HubWeights(model, self._packed)
        self.model, self.unused = model, self._inner.unused
        self.entries: Mapping[str, Entry] = self._inner.entries

    def parameter(self, name: str) -> Tensor:
        return self._inner.parameter(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._inner.rows(name, start, stop)

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        self._inner.expect(names, start, stop)

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._inner.expert_rows(name, start, stop)

    def available(self) -> set[str]:
        return self._inner.available()

    def spec(self, name: str) -> TensorSpec:
        return self._inner.spec(name)

    def divisible(self, name: str) -> bool:
        return self._inner.divisible(name)

    def stored_names(self, name: str) -> list[str]:
        return self._inner.stored_names(name)

    def stored_by_pattern(self, name: str) -> dict[str, list[str]]:
        return self._inner.stored_by_pattern(name)

    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        return self._inner.stored_form(name, tensor, start)

    def stored_together(self) -> dict[str, list[str]]:
        return self._inner.stored_together()

    def merged(self) -> set[str]:
        return self._inner.merged()

    def modules(self) -> dict[str, dict[str, PackedSpec]]:
        """What is quantized, as it was planned."""
        result: dict[str, dict[str, PackedSpec]] = {}
        for name, module in self._inner.model.named_modules():
            if is_experts(module):
                parameters = [f"{name}.{layout_of(module, name).first}", f"{name}.down_proj"]
            else:
                parameters = [f"{name}.weight"]
            if all(parameter in self.available() and self._all_packed(parameter) for parameter in parameters):
                parts = stored_modules(self._inner, name)
                entries = {projection: [self._packed[f"{stored}.weight"] for stored in every] for projection, every in parts.items()}
                result[name] = {projection: _stack(every, is_experts(module)) for projection, every in entries.items()}
        return result

    def inputs(self) -> dict[str, Rounding]:
        """How engines round the inputs of quantized modules (experts: those of down, too); those that they leave are not here."""
        if not any(entry.scheme.inputs for entry in self._packed.values() if isinstance(entry, PackedEntry)):
            return {}
        firsts = {name: next(iter(stored_modules(self._inner, name).values()))[0] for name in self.modules()}
        entries: dict[str, Any] = {name: self._packed[f"{stored}.weight"] for name, stored in firsts.items()}
        return {name: entry.scheme.inputs for name, entry in entries.items() if entry.scheme.inputs}

    def _all_packed(self, parameter: str) -> bool:
        return all(isinstance(self._packed[stored], PackedEntry) for stored in self._inner.stored_names(parameter))


def _stack(entries: list[Any], stacked: bool) -> PackedSpec:
    return replace(entries[0].packed_spec, bits=tuple(entry.scheme.bits for entry in entries), stacked=stacked)


def is_output(path: Path, quantization: Mapping[str, Any]) -> bool:
    """Whether this is a compressed-tensors directory that moebit wrote (others' have storages that moebit does not)."""
    return quantization.get("quant_method") == METHOD and (path / "moebit.json").exists()
