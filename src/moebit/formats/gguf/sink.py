"""Quantized layers on their way into a GGUF file.

While the work goes on, shards hold a layer each, as for every other format, so that an interrupted run goes on behind its last whole layer:
packed rows under the model's own parameter names with `.packed` behind, everything else under the checkpoint's names. When all layers are
there, `write` sends what is plain through llama.cpp's converter and puts packed rows where the converter puts rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import GgufData
from moebit.formats.gguf.rows import RowMap
from moebit.formats.gguf.target import GgufPlan, block_bytes
from moebit.formats.gguf.write import write_gguf
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Modules, Sink, put_plain_as_stored
from moebit.model.experts import ExpertsLayout
from moebit.storage.files import Entry, Shard, TensorEntry, TensorSpec, read_header
from moebit.storage.weights import Weights
from moebit.tensor import QTensor, solve_rtn
from moebit.tensor.grids.ggml import GRIDS

PACKED = ".packed"
SLAB_WEIGHTS = 2**24  # of embeddings that are rounded at a time


class GgufSink(Sink):
    """Rows packed by ggml's blocks, in shards until `write` makes the file of them."""

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        for parameter, others in weights.stored_together().items():
            if parameter.rpartition(".")[0] in modules:
                raise BadInputError(
                    f"format gguf: {parameter} is stored in one tensor with {', '.join(others)}; write the native format instead"
                )

    @classmethod
    def nbytes(cls, spec: PackedSpec, dtype: torch.dtype) -> int:
        return block_bytes(spec.ggml, (len(spec.bits), *spec.shape))

    @classmethod
    def average_bits(cls, modules: Modules) -> float:
        specs = [spec for parts in modules.values() for spec in parts.values()]
        return 8 * sum(cls.nbytes(spec, torch.float32) for spec in specs) / sum(spec.weights for spec in specs)

    def specs(self, names: list[str]) -> dict[str, TensorSpec]:
        plain = {stored: self.weights.entries[stored].spec for name in self.plain(names) for stored in self.weights.stored_names(name)}
        return plain | {name + PACKED: spec for name in set(names) for spec in self._packed_spec(name)}

    def _packed_spec(self, name: str) -> list[TensorSpec]:
        """The packed tensor of a parameter, if it is quantized."""
        owner, _, leaf = name.rpartition(".")
        parts = self.modules.get(owner, {})
        if name in self.plain([name]) or not parts:
            return []
        spec = parts.get("" if leaf == "weight" else leaf) or parts["up_proj"]
        rows = spec.shape[0] * (2 if leaf == "gate_up_proj" else 1)
        width = block_bytes(spec.ggml, (spec.shape[1],))
        return [TensorSpec(torch.uint8, (len(spec.bits), rows, width) if spec.stacked else (rows, width))]

    def put_plain(self, shard: Shard, names: list[str]) -> None:
        put_plain_as_stored(shard, self.weights, self.plain(names))

    def put_linear(self, shard: Shard, name: str, q: QTensor) -> None:
        sys.audit("moebit.put", name, 0, {"": q})
        shard.write(f"{name}.weight{PACKED}", _packed(q)[0])

    def put_experts(self, shard: Shard, name: str, layout: ExpertsLayout, start: int, quantized: Mapping[str, QTensor]) -> None:
        sys.audit("moebit.put", name, start, quantized)
        first = {projection: _packed(q) for projection, q in quantized.items() if projection != "down_proj"}
        some = next(iter(first.values()))
        whole = some.new_empty(len(some), layout.intermediate * (2 if layout.gated else 1), some.shape[-1])
        for projection, packed in first.items():
            whole[:, layout.rows(projection)] = packed
        for leaf, value in ((layout.first, whole), ("down_proj", _packed(quantized["down_proj"]))):
            shard.write(f"{name}.{leaf}{PACKED}", value, skip=start * value[0].numel())

    def used(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.dequantize(dtype)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    def write(self, shards: Path, file: Path, plan: GgufPlan, announce: Callable[[list[Path]], None] | None = None) -> list[Path]:
        """Write the file, or the files that it is cut into, from the shards `model-*.safetensors` of a directory; returns them.

        Args:
            announce: called with them before the first is begun.
        """
        entries: dict[str, TensorEntry] = {}
        for shard in sorted(shards.glob("model-*.safetensors")):
            entries |= read_header(shard)
        assembly, target = _Assembly(self.weights, entries, self._owners(entries)), plan.target
        prepared = target.prepare({name: entry.read for name, entry in entries.items()})
        tensors = {name: assembly.data(target.rows.maps[name], kind) for name, kind in plan.types.items()}
        sys.audit("moebit.gguf", str(file))
        return write_gguf(target.converter.gguf, file, prepared, tensors, plan.file_type, target.shard_bytes, announce)

    def _owners(self, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
        """Tensor of the checkpoint -> the quantized parameter that holds it."""
        packed = [name.removesuffix(PACKED) for name in entries if name.endswith(PACKED)]
        return {stored: name for name in packed for stored in self.weights.stored_names(name)}


class _Assembly:
    """The rows of GGUF tensors from those of the shards.

    Attributes:
        owners: tensor of the checkpoint -> the quantized parameter that holds it.
    """

    def __init__(self, weights: Weights, entries: Mapping[str, Entry], owners: Mapping[str, str]) -> None:
        self.weights, self.entries, self.owners = weights, entries, owners

    def data(self, found: RowMap, kind: str) -> GgufData:
        """A quantized tensor, which is put together when it is loaded."""
        quantized = found.sources[0] in self.owners
        return GgufData(kind.upper(), found.shape, lambda: self._gathered(found) if quantized else self._rounded(found, kind))

    def _gathered(self, found: RowMap) -> np.ndarray:
        lines: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(self.owners[source] for source in found.sources):
            packed = self.entries[parameter + PACKED].read()
            # What the checkpoint has transposed stands here in rows, as the map counts them.
            stored = {found.sources[0]: packed} if found.transposed else self.weights.stored_form(parameter, packed)
            lines |= {name: value.reshape(-1, packed.shape[-1]) for name, value in stored.items() if name in found.sources}
        return found.gather(lines).numpy()

    def _rounded(self, found: RowMap, kind: str) -> np.ndarray:
        """Embeddings and head, rounded to nearest."""
        rows, grid = found.gather({one: self.entries[one].read().reshape(-1, found.shape[-1]) for one in found.sources}), GRIDS[kind]
        step, bits = max(1, SLAB_WEIGHTS // rows.shape[-1]), torch.tensor([grid.bits])
        slabs = [_packed(solve_rtn(some.float().unsqueeze(0), bits, grid))[0] for some in rows.split(step)]
        return torch.cat(slabs).numpy()


def _packed(q: QTensor) -> Tensor:
    """uint8 [E, O, bytes per row]."""
    grid = q.grid
    assert grid in GRIDS.values()
    packed: Tensor = grid.pack(q.codes, q.params)  # type: ignore[attr-defined]
    return packed.cpu()
