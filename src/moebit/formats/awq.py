"""The AWQ format of AutoAWQ, `version: gemm`: 4 bits with zero points; tensor/layouts/awq.py has the layout.

A symmetric grid is one whose zero points are all 8. What stays in full precision is named in `modules_to_not_convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.compressed_tensors import ignored
from moebit.formats.matrix_sink import OlderSink
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Modules
from moebit.storage.files import TensorSpec
from moebit.storage.weights import Weights
from moebit.tensor import QTensor
from moebit.tensor.layouts import awq

METHOD = "awq"


class AwqSink(OlderSink):
    """qweight, qzeros and scales for every matrix."""

    format_name = METHOD

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        super().check(weights, modules)
        sizes: dict[int, str] = {}
        for name, parts in modules.items():
            for projection, spec in parts.items():
                where = f"{name}.{projection}" if projection else name
                odd = next((bits for bits in spec.bits if bits != awq.BITS), None)
                if odd:
                    raise BadInputError(f"format awq: {where} has {odd} bits; the format has {awq.BITS} only")
                if spec.shape[0] % len(awq.ORDER):
                    raise BadInputError(
                        f"format awq: {where} has {spec.shape[0]} output channels, which {len(awq.ORDER)} does not divide; "
                        "keep it in full precision with weights.ignore"
                    )
                sizes.setdefault(spec.group_size, where)
        if len(sizes) > 1:
            told = ", ".join(f"{size} ({where})" for size, where in sizes.items())
            raise BadInputError(f"format awq: it has one group size, these have {told}; set weights.group_size to one that divides all")

    @classmethod
    def matrix_specs(cls, spec: PackedSpec, bits: int) -> dict[str, TensorSpec]:
        out, inputs = spec.shape
        return {
            "qweight": TensorSpec(torch.int32, (inputs, out // len(awq.ORDER))),
            "qzeros": TensorSpec(torch.int32, (spec.groups, out // len(awq.ORDER))),
            "scales": TensorSpec(torch.float16, (spec.groups, out)),
        }

    @classmethod
    def matrix_tensors(cls, spec: PackedSpec, q: QTensor, number: int) -> dict[str, Tensor]:
        return {
            "qweight": awq.pack_outputs(q.codes[number].cpu()),
            "qzeros": awq.pack_outputs(q.params.zero_point[number].cpu()),
            "scales": q.params.scale[number].cpu().mT.contiguous(),
        }

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        first = next(iter(next(iter(self.modules.values())).values()))
        plain = [name for name in ignored(self.weights, self.modules) if not name.startswith("re:")]
        quantization = {
            "quant_method": METHOD,
            "bits": awq.BITS,
            "group_size": first.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*plain, *self._left_experts()],
        }
        return {**config, "quantization_config": quantization}

    def _left_experts(self) -> list[str]:
        """Blocks of experts that stay in full precision, by their names in the checkpoint, and layers that the model does not have."""
        expressions = (name[3:] for name in ignored(self.weights, self.modules) if name.startswith("re:"))
        return [expression.partition(r"\d+")[0].removesuffix(".*").replace("\\", "").removesuffix(".") for expression in expressions]
