"""The GPTQ format, version 1, as AutoGPTQ and GPTQModel write it: what most older engines read.

tensor/layouts/gptq.py has the layout. Scales are fixed before the solve, so that columns stay in their groups whatever the order in which
they are solved: `desc_act` is false. Version 1 has no zero point 0, which the grid avoids. What stays in full precision is named in
`dynamic`, GPTQModel's expressions that vLLM reads, too.
"""

from __future__ import annotations

import re
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
from moebit.tensor.layouts import gptq

METHOD = "gptq"


class GptqSink(OlderSink):
    """qweight, qzeros, scales and g_idx for every matrix."""

    format_name = METHOD

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        super().check(weights, modules)
        for name, parts in modules.items():
            for projection, spec in parts.items():
                where = f"{name}.{projection}" if projection else name
                for bits in sorted(set(spec.bits)):
                    if bits not in gptq.BITS:
                        raise BadInputError(f"format gptq: {where} has {bits} bits; choose of {', '.join(map(str, gptq.BITS))}")
                    odd = next((n for n in spec.shape if n * bits % 32), None)
                    if odd:
                        raise BadInputError(
                            f"format gptq: {where} has {odd} channels, whose {bits}-bit codes do not fill 32-bit words; "
                            "keep it in full precision with weights.ignore"
                        )

    @classmethod
    def matrix_specs(cls, spec: PackedSpec, bits: int) -> dict[str, TensorSpec]:
        out, inputs = spec.shape
        return {
            "qweight": TensorSpec(torch.int32, (inputs * bits // 32, out)),
            "qzeros": TensorSpec(torch.int32, (spec.groups, out * bits // 32)),
            "scales": TensorSpec(torch.float16, (spec.groups, out)),
            "g_idx": TensorSpec(torch.int32, (inputs,)),
        }

    @classmethod
    def matrix_tensors(cls, spec: PackedSpec, q: QTensor, number: int) -> dict[str, Tensor]:
        bits, params = int(q.bits[number]), q.params
        return {
            "qweight": gptq.pack_codes(q.codes[number].cpu(), bits),
            "qzeros": gptq.pack_zeros(params.zero_point[number].cpu(), bits),
            "scales": params.scale[number].cpu().mT.contiguous(),
            "g_idx": gptq.group_index(spec.shape[1], spec.group_size),
        }

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        first = next(iter(next(iter(self.modules.values())).values()))
        bits, group_size = first.bits[0], first.group_size
        left: dict[str, dict[str, Any]] = {
            "-:" + (name[3:] if name.startswith("re:") else f"^{re.escape(name)}$"): {} for name in ignored(self.weights, self.modules)
        }
        quantization = {
            "quant_method": METHOD,
            "checkpoint_format": METHOD,
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": first.symmetric,
            "lm_head": False,
            "true_sequential": True,
            "pack_dtype": "int32",
            "dynamic": {**self._others(bits, group_size), **left},
        }
        return {**config, "quantization_config": quantization}

    def _others(self, bits: int, group_size: int) -> dict[str, dict[str, Any]]:
        """What has another grid than most, by an expression for its name."""
        result: dict[str, dict[str, Any]] = {}
        for name, parts in self.modules.items():
            for projection, spec in parts.items():
                for width, stored in zip(spec.bits, self._names[name][projection], strict=True):
                    if (width, spec.group_size) != (bits, group_size):
                        result[f"+:^{re.escape(stored)}$"] = {"bits": width, "group_size": spec.group_size}
        return result
