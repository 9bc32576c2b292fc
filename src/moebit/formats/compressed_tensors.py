"""compressed-tensors: what transformers and vLLM read without moebit.

The file is long because writing and reading a layout stand together: every rule of the layout is then written down once.

Every quantized matrix X of the checkpoint, by the checkpoint's own name and one by one for experts, is stored as

    pack-quantized   X.weight_packed int32 [out, ceil(in * bits / 32)], X.weight_scale [out, groups], X.weight_shape int64 [2]
    int-quantized    X.weight int8 [out, in],                           X.weight_scale [out, 1]
    float-quantized  X.weight float8_e4m3fn [out, in],                  X.weight_scale [out, 1]

A packed row is a little-endian stream of codes, the least significant bit first, padded to 32-bit words: the packing of compressed-tensors
0.18.0 and later (before it, 3, 5, 6 and 7 bits were packed otherwise). All grids are symmetric: weight = scale * (code - 2^(bits-1)).
Source: the compressed-tensors package 0.20.0 and its documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.formats.class_names import in_every_class, plain_prediction
from moebit.formats.native import PackedSpec
from moebit.model.experts import ExpertsLayout, layout_of
from moebit.model.seam import is_experts
from moebit.storage.files import Entry, TensorEntry, TensorSpec
from moebit.storage.hub import HubWeights
from moebit.storage.weights import Weights
from moebit.tensor import QTensor
from moebit.tensor.grids import FLOAT8, Float8Grid
from moebit.tensor.grids.uniform import dequantize
from moebit.tensor.layouts.words import pack_words, unpack_words, words
from moebit.tensor.row_rounding import Rounding

METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the package whose packing this is; 0.18.0 and later have the same
PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"

Modules = Mapping[str, Mapping[str, PackedSpec]]
# Module of the transformers class -> {"" or projection: the checkpoint's names (without .weight), one per matrix}.
Names = dict[str, dict[str, list[str]]]


# --- one matrix


def storage(spec: PackedSpec) -> str:
    """Which of the three storages a matrix has."""
    if spec.float8:
        return FLOAT
    return INT if spec.input_bits == 8 else PACKED


def matrix_specs(spec: PackedSpec, bits: int) -> dict[str, TensorSpec]:
    """What is stored for one matrix of this width, by suffix."""
    out, inputs = spec.shape
    scale = TensorSpec(spec.scale_dtype, (out, spec.groups))
    if storage(spec) == PACKED:
        return {
            "weight_packed": TensorSpec(torch.int32, (out, words(inputs, bits))),
            "weight_scale": scale,
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }
    return {"weight": TensorSpec(FLOAT8 if spec.float8 else torch.int8, (out, inputs)), "weight_scale": scale}


def matrix_tensors(spec: PackedSpec, q: QTensor, number: int) -> dict[str, Tensor]:
    """The stored form of matrix `number` of a stack."""
    codes, scale = q.codes[number].cpu(), q.params.scale[number].to(spec.scale_dtype)
    if storage(spec) == PACKED:
        packed = pack_words(codes, int(q.bits[number]))
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(spec.shape)}
    return {"weight": q.grid.numbers(codes) if isinstance(q.grid, Float8Grid) else (codes ^ 128).view(torch.int8), "weight_scale": scale}


def nbytes(spec: PackedSpec) -> int:
    """Bytes of a stack's stored tensors."""
    return sum(tensor.nbytes for bits in spec.bits for tensor in matrix_specs(spec, bits).values())


def average_bits(modules: Modules) -> float:
    """8 x bytes of codes and scales / number of weights they stand for (the shapes, 16 bytes a matrix, left out)."""
    parts = [spec for group in modules.values() for spec in group.values()]
    shapes = sum(16 * len(spec.bits) for spec in parts if storage(spec) == PACKED)
    return 8 * (sum(map(nbytes, parts)) - shapes) / sum(spec.weights for spec in parts)


def check(weights: Weights, modules: Modules) -> None:
    """Refuse what cannot be written.

    Raises:
        BadInputError: naming the module and the reason.
    """
    for name, parts in modules.items():
        for projection, spec in parts.items():
            where = f"{name}.{projection}" if projection else name
            if not spec.symmetric:
                raise BadInputError(
                    f"format compressed-tensors: {where} is asymmetric, engines read packed experts with symmetric grids only; "
                    "set weights.symmetric: true, or write the native or dense format"
                )
            odd = sorted(set(spec.bits) - {8})
            if storage(spec) != PACKED and odd:
                raise BadInputError(
                    f"plan: {where} has {odd[0]} bits; a recipe with 8-bit activations or fp8 weights has 8-bit weights only"
                )
        stored_modules(weights, name)


# --- the checkpoint's names


def stored_modules(weights: Weights, name: str) -> dict[str, list[str]]:
    """The checkpoint's names of a linear's or an experts module's matrices: {"": [name]} or {projection: [name per expert]}.

    Raises:
        BadInputError: they are not stored one by one, each as [out, in].
    """
    module = weights.model.get_submodule(name)
    if not is_experts(module):
        parameter = f"{name}.weight"
        stored = weights.stored_names(parameter)
        form = weights.stored_form(parameter, torch.empty(weights.spec(parameter).shape, device="meta"))
        shared = weights.stored_together().get(parameter, [])
        if len(stored) != 1 or shared or form[stored[0]].shape != weights.spec(parameter).shape:
            raise BadInputError(
                f"format compressed-tensors: {name} is stored in another form than its module's ({', '.join(stored)}); "
                "keep it in full precision with weights.ignore, or write the native format"
            )
        return {"": [_module(stored[0])]}
    layout = layout_of(module, name)
    result: dict[str, list[str]] = {}
    for leaf in (layout.first, "down_proj"):
        result |= _expert_modules(weights, name, leaf, layout)
    return {projection: result[projection] for projection in layout.projections}


def _expert_modules(weights: Weights, name: str, leaf: str, layout: ExpertsLayout) -> dict[str, list[str]]:
    """Names by projection, found by sending a first expert with marked rows back through the checkpoint's own conversion."""
    parameter = f"{name}.{leaf}"
    by_pattern = weights.stored_by_pattern(parameter)
    projections = ["down_proj"] if leaf == "down_proj" else [p for p in layout.projections if p != "down_proj"]
    if any(len(stored) != layout.experts for stored in by_pattern.values()) or len(by_pattern) != len(projections):
        raise BadInputError(
            f"format compressed-tensors: {parameter} is stored stacked ({', '.join(s[0] for s in by_pattern.values())}); engines read "
            "packed experts only where the checkpoint has them one by one; write the native or dense format"
        )
    out, inputs = layout.features(projections[0])
    probe = torch.empty(1, out * len(projections), inputs, dtype=torch.uint8)
    for mark, projection in enumerate(projections):
        probe[:, layout.rows(projection) if leaf != "down_proj" else slice(None)] = mark
    result = {}
    for stored, value in weights.stored_form(parameter, layout.stacked(probe)).items():
        mark = int(value.flatten()[0])
        numbered = next((every for every in by_pattern.values() if every[0] == stored), None)
        if numbered is None or value.shape != (out, inputs) or not bool((value == mark).all()) or not stored.endswith(".weight"):
            raise BadInputError(
                f"format compressed-tensors: {parameter} is stored in another form than [out, in] per expert and projection ({stored}); "
                "write the native or dense format"
            )
        result[projections[mark]] = [_module(every) for every in numbered]
    return result


def _module(stored: str) -> str:
    return stored.removesuffix(".weight")


# --- config.json


def quantization_config(weights: Weights, modules: Modules, names: Names) -> dict[str, Any]:
    """The `quantization_config` of these modules.

    One kind of grid over linears and experts is said of all `Linear`s, and what stays in full precision is named in `ignore`: engines
    rename modules, classes keep their names. Several kinds are one group each with the names of what they are for; the group that experts
    belong to comes first, since transformers takes the experts' grid from the first group that fits.
    """
    kinds: dict[tuple[int, int], list[str]] = {}
    for name in sorted(modules, key=lambda n: not is_experts(weights.model.get_submodule(n))):
        for projection, spec in modules[name].items():
            kinds.setdefault((spec.bits[0], spec.group_size), []).extend(_targets(name, names[name][projection], spec))
    spec = next(iter(next(iter(modules.values())).values()))
    of_all = len(kinds) == 1 and any("" in parts for parts in modules.values())
    groups = {
        f"group_{number}": _group(spec, bits, group_size, ["Linear"] if of_all else list(dict.fromkeys(targets)))
        for number, ((bits, group_size), targets) in enumerate(kinds.items())
    }
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": storage(spec),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(weights, modules),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(name: str, stored: list[str], spec: PackedSpec) -> list[str]:
    """A linear under both of its names; all experts of a module, whose grids engines want alike, by one expression."""
    if spec.stacked:
        return [_numbered(each) + r"\..*" for each in in_every_class(stored[0])]
    return [other for each in (name, *stored) for other in in_every_class(each)]


def _numbered(first: str) -> str:
    """An expression for all experts, from the name of the first: `x.experts.0.w1` -> `re:x\\.experts\\.\\d+`."""
    before = re.split(r"\.0(?=\.)", first)
    return "re:" + re.escape(".0".join(before[:-1])) + r"\.\d+"


def _group(spec: PackedSpec, bits: int, group_size: int, targets: list[str]) -> dict[str, Any]:
    kind = "float" if spec.float8 else "int"
    whole_row = group_size == -1
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True} if spec.input_bits == 8 else None
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": kind,
            "symmetric": True,
            "strategy": "channel" if whole_row else "group",
            "group_size": None if whole_row else group_size,
            "dynamic": False,
        },
        "input_activations": inputs,
        "output_activations": None,
        "format": storage(spec),
    }


def ignored(weights: Weights, modules: Modules) -> list[str]:
    """Every matrix of the model that is not quantized, by its names in transformers and in the checkpoint.

    Routers and gates are among them whatever their class: what is a parameter in transformers is a linear elsewhere.
    """
    result: list[str] = []
    for name, module in weights.model.named_modules():
        weight = getattr(module, "weight", None)
        if is_experts(module) and name not in modules:
            firsts = [other for first in _first_experts(weights, name) for other in in_every_class(first)]
            result += dict.fromkeys(_numbered(first) + r"\..*" for first in firsts)
        elif isinstance(weight, Tensor) and weight.ndim == 2 and name not in modules and not isinstance(module, nn.Embedding):
            stored = weights.stored_names(f"{name}.weight") if f"{name}.weight" in weights.available() else []
            names = [name, *(_module(s) for s in stored if len(stored) == 1)]
            result += [other for each in names for other in in_every_class(each)]
    return list(dict.fromkeys([*result, *plain_prediction(weights)]))


def _first_experts(weights: Weights, name: str) -> Iterator[str]:
    layout = layout_of(weights.model.get_submodule(name), name)
    for leaf in (layout.first, "down_proj"):
        for stored in weights.stored_by_pattern(f"{name}.{leaf}").values():
            if len(stored) == layout.experts > 1:
                yield _module(stored[0])


# --- reading


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """A quantized matrix, read as the dequantized weight X.weight in the type of its scales: what an engine makes of it.

    Attributes:
        parts: its tensors by suffix. bits, group_size: its grid. inputs: how engines round what it is multiplied with.
    """

    parts: Mapping[str, TensorEntry]
    bits: int
    group_size: int
    inputs: Rounding | None = None

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return tuple(self.parts.values())

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        scale = self.parts["weight_scale"].read(start, stop)
        if "weight_packed" in self.parts:
            codes = unpack_words(self.parts["weight_packed"].read(start, stop), self.bits, self.shape[1])
            return dequantize(codes, scale, torch.full_like(scale, 2 ** (self.bits - 1), dtype=torch.uint8), scale.dtype)
        numbers = self.parts["weight"].read(start, stop).float()
        return dequantize(numbers, scale, torch.zeros_like(scale, dtype=torch.uint8), scale.dtype)

    @property
    def packed_spec(self) -> PackedSpec:
        integers = "weight_packed" in self.parts
        float8 = not integers and self.parts["weight"].dtype == FLOAT8
        shape = (self.shape[0], self.shape[1])
        return PackedSpec((self.bits,), shape, self.group_size, True, self.dtype, False, float8, 16 if integers else 8)


def virtual_entries(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The entries of an output with every quantized matrix as one `PackedEntry`.

    Raises:
        BadInputError: a grid that moebit does not write, tensors that do not fit together.
    """
    grids = [(group["targets"], (*_grid(group), _inputs(group))) for group in config["config_groups"].values()]
    result: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and f"{module}.weight_scale" in entries):
            bits, group_size, inputs = next((grid for targets, grid in grids if _matches(module, targets)), (0, 0, None))
            if not bits:
                raise BadInputError(f"{module}: quantized, but no group of config.json has it for a target; the output is damaged")
            result[f"{module}.weight"] = replace(_packed_entry(entries, module, leaf, bits, group_size), inputs=inputs)
        elif leaf not in ("weight_scale", "weight_shape"):
            result[name] = entry
    return result


def _grid(group: Mapping[str, Any]) -> tuple[int, int]:
    weights = group["weights"]
    if not weights["symmetric"] or weights["strategy"] not in ("group", "channel"):
        raise BadInputError(f"compressed-tensors weights {dict(weights)}: moebit reads the symmetric grids that it writes")
    return int(weights["num_bits"]), -1 if weights["strategy"] == "channel" else int(weights["group_size"])


def _inputs(group: Mapping[str, Any]) -> Rounding | None:
    """What vLLM's kernels do: int8 with the largest magnitude of a token on 127, or float8 with it on 448, ties to even."""
    said = group.get("input_activations")
    if said is None:
        return None
    if not said["symmetric"] or said["strategy"] != "token" or not said["dynamic"] or said["num_bits"] != 8:
        raise BadInputError(f"compressed-tensors activations {dict(said)}: moebit reads the 8 bits per token that it writes")
    return Rounding(8, symmetric=True, float8=said["type"] == "float")


def _matches(module: str, targets: Iterable[str]) -> bool:
    return any(re.match(t[3:], module) if t.startswith("re:") else t in (module, "Linear") for t in targets)


def _packed_entry(entries: Mapping[str, TensorEntry], module: str, leaf: str, bits: int, group_size: int) -> PackedEntry:
    suffixes = (leaf, "weight_scale", "weight_shape") if leaf == "weight_packed" else (leaf, "weight_scale")
    missing = [suffix for suffix in suffixes if f"{module}.{suffix}" not in entries]
    if missing:
        raise BadInputError(f"tensor {module}.{missing[0]} is missing; the output is damaged")
    stored = {suffix: entries[f"{module}.{suffix}"] for suffix in suffixes}
    shape = tuple(stored["weight_shape"].read().tolist()) if "weight_shape" in stored else stored[leaf].shape
    scale = stored["weight_scale"]
    spec = PackedSpec((bits,), (shape[0], shape[1]), group_size, True, scale.dtype, False)
    fits = leaf == "weight" or stored[leaf].shape == (shape[0], words(shape[1], bits))
    if not fits or scale.shape != (shape[0], spec.groups):
        raise BadInputError(
            f"{module}: {leaf} {list(stored[leaf].shape)} and weight_scale {list(scale.shape)} are not {bits} bits of {shape}"
        )
    first = stored[leaf]
    return PackedEntry(first.file, f"{module}.weight", scale.dtype, shape, first.offset, stored, bits, group_size)


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
        if not any(entry.inputs for entry in self._packed.values() if isinstance(entry, PackedEntry)):
            return {}
        firsts = {name: next(iter(stored_modules(self._inner, name).values()))[0] for name in self.modules()}
        entries: dict[str, Any] = {name: self._packed[f"{stored}.weight"] for name, stored in firsts.items()}
        return {name: entry.inputs for name, entry in entries.items() if entry.inputs}

    def _all_packed(self, parameter: str) -> bool:
        return all(isinstance(self._packed[stored], PackedEntry) for stored in self._inner.stored_names(parameter))


def _stack(entries: list[Any], stacked: bool) -> PackedSpec:
    return replace(entries[0].packed_spec, bits=tuple(entry.bits for entry in entries), stacked=stacked)


def is_output(path: Path, quantization: Mapping[str, Any]) -> bool:
    """Whether this is a compressed-tensors directory that moebit wrote (others' have storages that moebit does not)."""
    return quantization.get("quant_method") == METHOD and (path / "moebit.json").exists()
