"""Where quantized layers go: one interface over the formats, so that the pipeline does not ask which it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats import native
from moebit.formats.names import EXPERTS_IMPLEMENTATION
from moebit.model.experts import ExpertsLayout
from moebit.model.inputs import Activations
from moebit.storage.edits import EditedWeights
from moebit.storage.files import Entry, Shard, TensorSpec, pieces
from moebit.storage.weights import Weights
from moebit.tensor import QTensor
from moebit.tensor.blocks import BlockTransform

Modules = Mapping[str, Mapping[str, native.PackedSpec]]


class Sink(ABC):
    """How a format stores a model: what a plan asks before the work (on the class), and how tensors are written (on an instance).

    Attributes:
        holds_activations: whether the output says itself how inputs are rounded and transformed (plan/inputs.py).
        weights: the checkpoint. modules: what is quantized, {"": spec} for a linear, {projection: spec} for experts.
        activations: what happens to the inputs of that; only formats that hold activations have any.
    """

    holds_activations: ClassVar[bool] = False

    def __init__(self, weights: EditedWeights, modules: Modules, activations: Activations | None = None) -> None:
        self.weights, self.modules, self.activations = weights, modules, activations or Activations()

    @classmethod  # noqa: B027 - most formats hold everything
    def check(cls, weights: Weights, modules: Modules) -> None:
        """Refuse what the format cannot hold.

        Raises:
            BadInputError: naming the module and the reason.
        """

    @classmethod
    @abstractmethod
    def nbytes(cls, spec: native.PackedSpec, dtype: torch.dtype) -> int:
        """Bytes of the stored tensors of a stack of matrices whose weights are of type `dtype` in the checkpoint."""

    @classmethod
    def average_bits(cls, modules: Modules) -> float:
        """8 x bytes of codes, scales and zero points / number of weights that they stand for."""
        return native.average_bits(modules)

    @classmethod
    def input_bits(cls, bits: int) -> int:
        """What an engine rounds the inputs of a matrix to, as a part of how the matrix is stored, where a recipe asks for `bits`."""
        return 16

    @classmethod
    def scale_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """The type in which scales are stored, of matrices that the checkpoint has in type `dtype`."""
        return dtype

    def parameters(self, prefix: str) -> list[str]:
        """Stored parameters below a module name, in a stable order."""
        return sorted(name for name in self.weights.available() if name.startswith(prefix))

    def plain(self, names: list[str]) -> list[str]:
        """Those of them that are written as they are."""
        quantized = set()
        for name, parts in self.modules.items():
            leaves = ("weight",) if "" in parts else ("gate_up_proj", "up_proj", "down_proj")
            quantized |= {f"{name}.{leaf}" for leaf in leaves}
        return [name for name in names if name not in quantized]

    @abstractmethod
    def specs(self, names: list[str]) -> dict[str, TensorSpec]:
        """What will be stored for these parameters."""

    @abstractmethod
    def put_plain(self, shard: Shard, names: list[str]) -> None:
        """Write those of these parameters that are not quantized."""

    @abstractmethod
    def put_linear(self, shard: Shard, name: str, q: QTensor) -> None:
        """Write a linear's quantized weight."""

    @abstractmethod
    def put_experts(self, shard: Shard, name: str, layout: ExpertsLayout, start: int, quantized: Mapping[str, QTensor]) -> None:
        """Write experts [start, start + C) of an experts module: all projections."""

    def put_transform(self, shard: Shard, name: str, transform: BlockTransform, start: int = 0) -> None:
        """Write an online transform, or those of experts from `start` on, for a format that has a place for it."""
        raise NotImplementedError(f"{type(self).__name__} holds no transforms; recipes that have them are refused for it")

    @abstractmethod
    def used(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E, out, in] in `dtype`: the weights as who loads this format will have them."""

    @abstractmethod
    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The output's config.json, from the checkpoint's."""


class NativeSink(Sink):
    """Packed codes under the transformers module's own names (docs/format.md)."""

    holds_activations = True

    @classmethod
    def nbytes(cls, spec: native.PackedSpec, dtype: torch.dtype) -> int:
        return sum(tensor.nbytes for tensor in spec.specs("").values())  # the widths of stacked matrices included

    def specs(self, names: list[str]) -> dict[str, TensorSpec]:
        result = {name: self.weights.spec(name) for name in self.plain(names)}
        owners = {name.rpartition(".")[0] for name in names}
        for name, parts in self.modules.items():
            if name in owners:
                for projection, spec in parts.items():
                    result |= spec.specs(f"{name}.{projection}" if projection else name)
        for name, transform in self.activations.below(owners).items():
            result |= {f"{name}.{leaf}": spec for leaf, spec in transform.specs().items()}
        return result

    def put_plain(self, shard: Shard, names: list[str]) -> None:
        for name in self.plain(names):
            for start, piece in self.weights.pieces(name):
                shard.write(name, piece, skip=start)

    def put_linear(self, shard: Shard, name: str, q: QTensor) -> None:
        native.put(shard, name, self.modules[name][""], q)

    def put_experts(self, shard: Shard, name: str, layout: ExpertsLayout, start: int, quantized: Mapping[str, QTensor]) -> None:
        for projection, q in quantized.items():
            native.put(shard, f"{name}.{projection}", self.modules[name][projection], q, start)

    def put_transform(self, shard: Shard, name: str, transform: BlockTransform, start: int = 0) -> None:
        spec = self.activations.transforms[name]
        for leaf, value in spec.tensors(transform).items():
            shard.write(f"{name}.{leaf}", value, skip=start * (spec.specs()[leaf].nbytes // spec.count))

    def used(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.dequantize(dtype)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # The second key makes a transformers without moebit refuse: an unknown quant_method alone is only a warning there.
        quantization = native.quantization_config(self.modules, self.activations)
        return {**config, "quantization_config": quantization, "experts_implementation": EXPERTS_IMPLEMENTATION}


class DenseSink(Sink):
    """Dequantized weights in the checkpoint's own types, names and shapes, for programs that know no packed format."""

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        # The checkpoint's own tensors are written, so that each must stand for one parameter.
        for parameter, others in weights.stored_together().items():
            if parameter.rpartition(".")[0] in modules:
                raise BadInputError(
                    f"format dense: {parameter} is stored in one tensor with {', '.join(others)}; write the native format instead"
                )

    @classmethod
    def nbytes(cls, spec: native.PackedSpec, dtype: torch.dtype) -> int:
        return spec.weights * dtype.itemsize

    def specs(self, names: list[str]) -> dict[str, TensorSpec]:
        return {stored: self.weights.entries[stored].spec for name in names for stored in self.weights.stored_names(name)}

    def put_plain(self, shard: Shard, names: list[str]) -> None:
        put_plain_as_stored(shard, self.weights, self.plain(names))

    def put_linear(self, shard: Shard, name: str, q: QTensor) -> None:
        self._put(shard, f"{name}.weight", q.dequantize()[0])

    def put_experts(self, shard: Shard, name: str, layout: ExpertsLayout, start: int, quantized: Mapping[str, QTensor]) -> None:
        codes = quantized["down_proj"].codes
        first = torch.empty(len(codes), layout.intermediate * (2 if layout.gated else 1), layout.hidden, device=codes.device)
        for projection, q in quantized.items():
            if projection != "down_proj":
                first[:, layout.rows(projection)] = q.dequantize()
        down = quantized["down_proj"].dequantize()
        for leaf, value in ((layout.first, first), ("down_proj", down)):
            self._put(shard, f"{name}.{leaf}", layout.stacked(value), start)

    def _put(self, shard: Shard, name: str, tensor: Tensor, start: int = 0) -> None:
        put_under_stored_names(shard, self.weights, name, tensor, start)

    def used(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.dequantize(q.grid.value_dtype).to(dtype)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)


def put_under_stored_names(shard: Shard, weights: EditedWeights, name: str, tensor: Tensor, start: int = 0) -> None:
    """Write a parameter, or its rows (experts) from `start` on, under the checkpoint's own names."""
    for stored, value in weights.stored_form(name, tensor, start).items():
        spec = shard.specs[stored]
        some = value.shape != spec.shape  # some of the rows of a tensor that is stored whole
        shard.write(stored, value.to(spec.dtype), skip=start * (spec.nbytes // spec.shape[0]) if some else 0)


def put_plain_as_stored(shard: Shard, weights: EditedWeights, names: list[str]) -> None:
    """Parameters that are not quantized, under the checkpoint's own names: copied, or written anew where they were edited."""
    copied = [name for name in names if not weights.edited(name)]
    for stored in dict.fromkeys(stored for name in copied for stored in weights.stored_names(name)):
        put_stored(shard, weights.entries[stored])
    for name in (name for name in names if weights.edited(name)):
        spec = weights.spec(name)
        for begin, piece in weights.pieces(name):
            put_under_stored_names(shard, weights, name, piece, begin // (spec.nbytes // spec.shape[0]))


def put_stored(shard: Shard, entry: Entry) -> None:
    """Copy a stored tensor as it is, piece by piece."""
    for start, piece in pieces(entry):
        shard.write(entry.name, piece, skip=start)
