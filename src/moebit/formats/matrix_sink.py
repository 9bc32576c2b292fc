"""Formats that put quantized modules under names of their own, and everything else where the checkpoint has it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moebit.formats.compressed_tensors import stored_modules
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Modules, Sink, put_plain_as_stored
from moebit.model.experts import ExpertsLayout
from moebit.model.inputs import Activations
from moebit.storage.edits import EditedWeights
from moebit.storage.files import Shard, TensorSpec
from moebit.storage.weights import Weights
from moebit.tensor import QTensor


class OwnNamesSink(Sink):
    """What the formats share whose quantized modules have names of their own."""

    @abstractmethod
    def module_specs(self, name: str) -> dict[str, TensorSpec]:
        """Return what is stored for a quantized module, by full name."""

    @classmethod
    def average_bits(cls, modules: Modules) -> float:
        parts = [spec for group in modules.values() for spec in group.values()]
        return 8 * sum(cls.nbytes(spec, spec.scale_dtype) for spec in parts) / sum(spec.weights for spec in parts)

    def specs(self, names: list[str]) -> dict[str, TensorSpec]:
        stored = dict.fromkeys(stored for name in self.plain(names) for stored in self.weights.stored_names(name))
        result = {name: self.weights.entries[name].spec for name in stored}
        owners = {name.rpartition(".")[0] for name in names}
        for name in (name for name in self.modules if name in owners):
            result |= self.module_specs(name)
        return result

    def put_plain(self, shard: Shard, names: list[str]) -> None:
        put_plain_as_stored(shard, self.weights, self.plain(names))

    def used(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        # Engines dequantize to the type of the scales.
        return q.dequantize(q.grid.value_dtype).to(dtype)


class MatrixSink(OwnNamesSink):
    """Experts and linears one by one: what a matrix is stored as is said by two functions.

    Attributes:
        format_name: for messages.
    """

    format_name: ClassVar[str]

    @classmethod
    @abstractmethod
    def matrix_specs(cls, spec: PackedSpec, bits: int) -> dict[str, TensorSpec]:
        """Return what is stored for one matrix of this width, by suffix."""

    @classmethod
    @abstractmethod
    def matrix_tensors(cls, spec: PackedSpec, q: QTensor, number: int) -> dict[str, Tensor]:
        """Return the stored form of matrix `number` of a stack, by suffix."""

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        for name in modules:
            stored_modules(weights, name, cls.format_name)

    @classmethod
    def nbytes(cls, spec: PackedSpec, dtype: torch.dtype) -> int:
        return sum(tensor.nbytes for bits in spec.bits for tensor in cls.matrix_specs(spec, bits).values())

    def __init__(self, weights: EditedWeights, modules: Modules, activations: Activations | None = None) -> None:
        super().__init__(weights, modules, activations)
        self._names = {name: stored_modules(weights, name, self.format_name) for name in modules}

    def module_specs(self, name: str) -> dict[str, TensorSpec]:
        result: dict[str, TensorSpec] = {}
        for projection, spec in self.modules[name].items():
            for bits, module in zip(spec.bits, self._names[name][projection], strict=True):
                result |= {f"{module}.{suffix}": s for suffix, s in self.matrix_specs(spec, bits).items()}
        return result

    def put_linear(self, shard: Shard, name: str, q: QTensor) -> None:
        self._put(shard, self._names[name][""], self.modules[name][""], q)

    def put_experts(self, shard: Shard, name: str, layout: ExpertsLayout, start: int, quantized: Mapping[str, QTensor]) -> None:
        for projection, q in quantized.items():
            self._put(shard, self._names[name][projection][start : start + len(q.codes)], self.modules[name][projection], q)

    def _put(self, shard: Shard, stored: list[str], spec: PackedSpec, q: QTensor) -> None:
        for number, module in enumerate(stored):
            for suffix, tensor in self.matrix_tensors(spec, q, number).items():
                shard.write(f"{module}.{suffix}", tensor)


class OlderSink(MatrixSink):
    """The layouts of GPTQ and AWQ, whose scales are float16 whatever the checkpoint's type is."""

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        return torch.float16
