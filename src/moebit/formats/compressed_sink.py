"""compressed-tensors as a sink: packed matrices under the checkpoint's own names, for engines that know nothing of moebit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moebit.formats import compressed_matrix, compressed_tensors
from moebit.formats.matrix_sink import MatrixSink
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Modules
from moebit.storage.files import TensorSpec
from moebit.storage.weights import Weights
from moebit.tensor import QTensor


class CompressedTensorsSink(MatrixSink):
    """Codes, scales and zero points for every matrix (formats/compressed_matrix.py), described in config.json."""

    format_name = compressed_tensors.METHOD

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        compressed_tensors.check(weights, modules)

    @classmethod
    def matrix_specs(cls, spec: PackedSpec, bits: int) -> dict[str, TensorSpec]:
        return compressed_matrix.matrix_specs(spec, bits)

    @classmethod
    def matrix_tensors(cls, spec: PackedSpec, q: QTensor, number: int) -> dict[str, Tensor]:
        return compressed_matrix.matrix_tensors(spec, q, number)

    @classmethod
    def nbytes(cls, spec: PackedSpec, dtype: torch.dtype) -> int:
        return compressed_matrix.nbytes(spec)

    @classmethod
    def average_bits(cls, modules: Modules) -> float:
        return compressed_matrix.average_bits(modules)

    @classmethod
    def input_bits(cls, bits: int) -> int:
        return bits

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "quantization_config": compressed_tensors.quantization_config(self.weights, self.modules, self._names)}
