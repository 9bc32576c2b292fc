"""moebit's own format: any mixture of widths, packed tightly. Specified in docs/format.md.

A quantized linear NAME is stored as NAME.codes (+ .scale, .zero_point), an experts module as NAME.PROJECTION.codes
(+ .scale, .zero_point, .bits); everything else keeps the name and value it has in the transformers module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.inputs_config import activations_config
from moebit.formats.names import ACTIVATIONS, METHOD
from moebit.model.experts import ExpertsLayout
from moebit.model.inputs import Activations
from moebit.storage.conversion import tied_names
from moebit.storage.files import Shard, TensorEntry, TensorSpec
from moebit.storage.weights import OwnNames
from moebit.tensor import QTensor, UniformGrid, pack, packed_row_bytes, unpack
from moebit.tensor.grids.uniform import dequantize

FORMAT_VERSION = 1
WITH_ACTIVATIONS = 2  # the version of outputs whose inputs are transformed or rounded: who reads version 1 would leave that out


@dataclass(frozen=True)
class PackedSpec:
    """A stack of E quantized matrices as it is stored.

    Attributes:
        bits: width of each matrix.
        shape: (out, in) features.
        stacked: whether codes are flat over experts (an experts module) or [out, row bytes] (a linear).
        float8: float8 e4m3 numbers instead of integer codes. block_rows: rows that share a scale, 128 for FP8 in blocks.
        input_bits: what an engine rounds the inputs to, 16 for not at all. input_float8: to float8 e4m3 numbers.
        ggml: the block type: of ggml where a GGUF file holds the matrices, `nvfp4` or `mxfp4` in other formats.
            (The native format has none of these: it says what happens to inputs apart from the weights.)
    """

    bits: tuple[int, ...]
    shape: tuple[int, int]
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    stacked: bool
    float8: bool = False
    input_bits: int = 16
    ggml: str = ""
    input_float8: bool = False
    block_rows: int = 1

    @property
    def groups(self) -> int:
        return UniformGrid(self.group_size, self.symmetric).groups(self.shape[1])

    def code_offsets(self) -> list[int]:
        """Byte at which each matrix's codes begin, and the total."""
        return _offsets([self.shape[0] * packed_row_bytes(self.shape[1], b) for b in self.bits])

    def zero_offsets(self) -> list[int]:
        """Byte at which each matrix's zero points begin, and the total. All zero points of a matrix are packed as one row."""
        return _offsets([packed_row_bytes(self.shape[0] * self.groups, b) for b in self.bits])

    def specs(self, name: str) -> dict[str, TensorSpec]:
        """The stored tensors, in the order in which they lie in the file."""
        out, experts = self.shape[0], len(self.bits)
        codes = self.code_offsets()[-1]
        result = {
            f"{name}.codes": TensorSpec(torch.uint8, (codes,) if self.stacked else (out, codes // out)),
            f"{name}.scale": TensorSpec(self.scale_dtype, (experts, out, self.groups) if self.stacked else (out, self.groups)),
        }
        if not self.symmetric:
            result[f"{name}.zero_point"] = TensorSpec(torch.uint8, (self.zero_offsets()[-1],))
        if self.stacked:
            result[f"{name}.bits"] = TensorSpec(torch.uint8, (experts,))
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points: what `average_bits` counts."""
        return sum(spec.nbytes for name, spec in self.specs("").items() if name != ".bits")

    @property
    def weights(self) -> int:
        return len(self.bits) * self.shape[0] * self.shape[1]


def _offsets(sizes: list[int]) -> list[int]:
    result = [0]
    for size in sizes:
        result.append(result[-1] + size)
    return result


def put(shard: Shard, name: str, spec: PackedSpec, q: QTensor, start: int = 0) -> None:
    """Write matrices [start, start + E) of the stack `name`."""
    code_offsets, zero_offsets = spec.code_offsets(), spec.zero_offsets()
    experts = q.codes.shape[0]
    if q.bits.tolist() != list(spec.bits[start : start + experts]):
        raise ValueError(f"{name}: matrices of {q.bits.tolist()} bits where {spec.bits[start : start + experts]} were announced")
    codes, zeros = pack_stack(q)
    shard.write(f"{name}.codes", codes, skip=code_offsets[start])
    row = spec.shape[0] * spec.groups * spec.scale_dtype.itemsize
    shard.write(f"{name}.scale", q.params.scale.to(spec.scale_dtype), skip=start * row)
    if not spec.symmetric:
        shard.write(f"{name}.zero_point", zeros, skip=zero_offsets[start])
    if spec.stacked:
        shard.write(f"{name}.bits", q.bits.to(torch.uint8), skip=start)


def pack_stack(q: QTensor) -> tuple[Tensor, Tensor]:
    """(codes, zero points) of a stack as flat bytes, matrix after matrix; all matrices of one width are packed in one call."""
    code_parts: dict[int, Tensor] = {}
    zero_parts: dict[int, Tensor] = {}
    for width in sorted(set(q.bits.tolist())):
        chosen = (q.bits == width).nonzero()[:, 0]
        codes = pack(q.codes[chosen].flatten(0, 1), width).view(len(chosen), -1)
        zeros = pack(q.params.zero_point[chosen].flatten(1), width)
        for position, index in enumerate(chosen.tolist()):
            code_parts[index], zero_parts[index] = codes[position], zeros[position]
    order = range(len(q.bits))
    return torch.cat([code_parts[i] for i in order]), torch.cat([zero_parts[i] for i in order])


def unpack_matrices(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: list[int], shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """[C, out, in] weights of C stored matrices.

    Args:
        codes: flat uint8 bytes of these C matrices; scale: [C, out, groups]; zeros: their flat packed zero points, None if symmetric.
    """
    out, inputs = shape
    groups = scale.shape[-1]
    code_sizes = [out * packed_row_bytes(inputs, b) for b in bits]
    zero_sizes = [packed_row_bytes(out * groups, b) for b in bits]
    if len(set(bits)) == 1:
        width = bits[0]
        unpacked = unpack(codes.view(len(bits) * out, -1), width, inputs).view(len(bits), out, inputs)
        middle = scale.new_full(scale.shape, 2 ** (width - 1), dtype=torch.uint8)
        zero = middle if zeros is None else unpack(zeros.view(len(bits), -1), width, out * groups).view(len(bits), out, groups)
        return dequantize(unpacked, scale, zero, dtype)
    code_parts = codes.split(code_sizes)
    zero_parts = [None] * len(bits) if zeros is None else list(zeros.split(zero_sizes))
    return torch.cat(
        [
            unpack_matrices(c, scale[i : i + 1], z, [bits[i]], shape, dtype)
            for i, (c, z) in enumerate(zip(code_parts, zero_parts, strict=True))
        ]
    )


def quantization_config(modules: Mapping[str, Mapping[str, PackedSpec]], activations: Activations | None = None) -> dict[str, Any]:
    """What goes into config.json: every quantized module with its grid, and what happens to their inputs.

    Args:
        modules: linear name -> {"": spec}, or experts name -> {projection: spec}.
    """
    described: dict[str, Any] = {}
    for name, parts in modules.items():
        spec = next(iter(parts.values()))
        entry: dict[str, Any] = {
            "group_size": spec.group_size,
            "symmetric": spec.symmetric,
            "scale_dtype": str(spec.scale_dtype).removeprefix("torch."),
        }
        if spec.stacked:
            entry["experts"] = len(spec.bits)
            entry["projections"] = {projection: {"shape": list(p.shape), "bits": _short(p.bits)} for projection, p in parts.items()}
        else:
            entry.update(shape=list(spec.shape), bits=spec.bits[0])
        described[name] = entry
    if activations:
        return {
            "quant_method": METHOD,
            "format_version": WITH_ACTIVATIONS,
            "modules": described,
            ACTIVATIONS: activations_config(activations),
        }
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": described}


def _short(bits: tuple[int, ...]) -> int | list[int]:
    return bits[0] if len(set(bits)) == 1 else list(bits)


def packed_specs(config: Mapping[str, Any]) -> dict[str, dict[str, PackedSpec]]:
    """The inverse of `quantization_config`.

    Raises:
        BadInputError: a later format version.
    """
    if config.get("format_version") not in (FORMAT_VERSION, WITH_ACTIVATIONS):
        raise BadInputError(
            f"moebit format version {config.get('format_version')}: this moebit reads versions {FORMAT_VERSION} and {WITH_ACTIVATIONS}; "
            "install a newer one"
        )
    result: dict[str, dict[str, PackedSpec]] = {}
    for name, entry in config["modules"].items():
        common = (entry["group_size"], entry["symmetric"], getattr(torch, entry["scale_dtype"]))
        if "projections" in entry:
            result[name] = {
                projection: PackedSpec(_long(p["bits"], entry["experts"]), (p["shape"][0], p["shape"][1]), *common, stacked=True)
                for projection, p in entry["projections"].items()
            }
        else:
            result[name] = {"": PackedSpec((entry["bits"],), (entry["shape"][0], entry["shape"][1]), *common, stacked=False)}
    return result


def _long(bits: int | list[int], experts: int) -> tuple[int, ...]:
    return (bits,) * experts if isinstance(bits, int) else tuple(bits)


def average_bits(specs: Mapping[str, Mapping[str, PackedSpec]]) -> float:
    """8 x bytes of codes, scales and zero points / number of weights they stand for."""
    parts = [spec for group in specs.values() for spec in group.values()]
    return 8 * sum(p.nbytes for p in parts) / sum(p.weights for p in parts)


class ChannelOverlay(Protocol):
    """Channels of a projection that stand in for the stored ones (formats/overlay.py)."""

    def put(self, projection: str, start: int, w_COI: Tensor) -> None: ...


class NativeWeights(OwnNames):
    """The weights of a native output, dequantized as they are read."""

    def __init__(
        self,
        model: Any,
        entries: Mapping[str, TensorEntry],
        specs: Mapping[str, Mapping[str, PackedSpec]],
        layouts: Mapping[str, ExpertsLayout],
        overlays: Mapping[str, Mapping[str, ChannelOverlay]] | None = None,
    ) -> None:
        self.model, self._entries, self._modules, self._layouts = model, dict(entries), specs, layouts
        self.entries = self._entries
        self._overlays = overlays or {}
        for name, parts in specs.items():
            for projection, spec in parts.items():
                for stored, wanted in spec.specs(f"{name}.{projection}" if projection else name).items():
                    if stored not in self._entries:
                        raise BadInputError(f"tensor {stored!r} is missing; the output is damaged")
                    if self._entries[stored].spec != wanted:
                        raise BadInputError(
                            f"tensor {stored!r} is {self._entries[stored].spec}, config.json says {wanted}; the output is damaged"
                        )
        there = self._stored = self._names()
        tied = {name for name, other in tied_names(model).items() if other in there}
        missing = sorted(set(model.state_dict()) - there - tied)
        if missing:
            raise BadInputError(f"{len(missing)} tensors are missing, first {missing[0]!r}; the output is damaged")

    @property
    def modules(self) -> Mapping[str, Mapping[str, PackedSpec]]:
        """What is quantized: {"": spec} for a linear, {projection: spec} for experts."""
        return self._modules

    def available(self) -> set[str]:
        return set(self._stored)

    def _names(self) -> set[str]:
        names = set(self._entries)
        for name in self._modules:
            if name in self._layouts:
                names |= {f"{name}.{self._layouts[name].first}", f"{name}.down_proj"}
            else:
                names.add(f"{name}.weight")
        return names

    def spec(self, name: str) -> TensorSpec:
        name = self._kept(name)
        if name in self._entries:
            return self._entries[name].spec
        owner, _, leaf = name.rpartition(".")
        if owner not in self._layouts:
            return TensorSpec(torch.float32, self._modules[owner][""].shape)
        layout = self._layouts[owner]
        out, inputs = layout.features(leaf if leaf == "down_proj" else "up_proj")
        out = 2 * out if leaf != "down_proj" and layout.gated else out
        return TensorSpec(torch.float32, (layout.experts, inputs, out) if layout.transposed else (layout.experts, out, inputs))

    def _kept(self, name: str) -> str:
        """The one of a tied parameter's two names under which it is stored."""
        return name if name in self._stored else tied_names(self.model)[name]

    def parameter(self, name: str) -> Tensor:
        name = self._kept(name)
        if name in self._entries:
            return self._entries[name].read()
        owner = name.rpartition(".")[0]
        if owner in self._layouts:
            return self.expert_rows(name, 0, self._layouts[owner].experts)
        spec = self._modules[owner][""]
        zeros = None if spec.symmetric else self._entries[f"{owner}.zero_point"].read()
        codes, scale = self._entries[f"{owner}.codes"].read(), self._entries[f"{owner}.scale"].read()
        return unpack_matrices(codes.flatten(), scale.unsqueeze(0), zeros, list(spec.bits), spec.shape)[0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        name = self._kept(name)
        return self.expert_rows(name, start, stop) if self.divisible(name) else self.parameter(name)[start:stop]

    def divisible(self, name: str) -> bool:
        name = self._kept(name)
        return name in self._entries or name.rpartition(".")[0] in self._layouts

    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        """Nothing: packed experts are small, and reading them takes less time than unpacking them."""

    def stored_names(self, name: str) -> list[str]:
        if name in self._entries:
            return [name]
        owner, _, leaf = name.rpartition(".")
        if owner not in self._layouts:
            return list(self._modules[owner][""].specs(owner))
        first = [projection for projection in self._modules[owner] if projection != "down_proj"]
        projections = ["down_proj"] if leaf == "down_proj" else first
        return [stored for p in projections for stored in self._modules[owner][p].specs(f"{owner}.{p}")]

    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if name in self._entries:
            return self._entries[name].read(start, stop)
        layout = self._layouts[owner]
        if leaf == "down_proj":
            stacked = self._projection(owner, leaf, start, stop)
        elif not layout.gated:
            stacked = self._projection(owner, "up_proj", start, stop)
        else:
            stacked = torch.empty(stop - start, 2 * layout.intermediate, layout.hidden)
            for projection in ("gate_proj", "up_proj"):
                stacked[:, layout.rows(projection)] = self._projection(owner, projection, start, stop)
        return stacked.transpose(1, 2) if layout.transposed else stacked

    def _projection(self, owner: str, projection: str, start: int, stop: int) -> Tensor:
        """[stop - start, out, in] float32."""
        spec, name = self._modules[owner][projection], f"{owner}.{projection}"
        codes, zeros = spec.code_offsets(), spec.zero_offsets()
        stored_codes = self._entries[f"{name}.codes"].read(codes[start], codes[stop])
        stored_zeros = None if spec.symmetric else self._entries[f"{name}.zero_point"].read(zeros[start], zeros[stop])
        scale = self._entries[f"{name}.scale"].read(start, stop)
        result = unpack_matrices(stored_codes, scale, stored_zeros, list(spec.bits[start:stop]), spec.shape)
        overlay = self._overlays.get(owner, {}).get(projection)
        if overlay is not None:
            overlay.put(projection, start, result)
        return result
