"""MLX's format, which mlx-lm and LM Studio read on Apple silicon: affine grids of 2 to 8 bits, MXFP4 and NVFP4.

The experts of a layer are stacked under `switch_mlp.{gate,up,down}_proj`, linears have their own names; each has weight, scales and, on
affine grids, biases (tensor/layouts/mlx.py). A symmetric grid is an affine one whose bias is -scale * 2^(bits-1), exactly. config.json says
the grid of every quantized module under `quantization`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.compressed_tensors import stored_modules
from moebit.formats.matrix_sink import OwnNamesSink
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Modules
from moebit.model.experts import ExpertsLayout
from moebit.model.inputs import Activations
from moebit.storage.edits import EditedWeights
from moebit.storage.files import Shard, TensorSpec
from moebit.storage.weights import Weights
from moebit.tensor import QTensor
from moebit.tensor.grids.ggml_fp4 import FP4_LEVELS, Mxfp4Params, Nvfp4Params
from moebit.tensor.grids.offset import OffsetParams
from moebit.tensor.layouts import fp4, mlx

FORMAT = "mlx"
FIRST_EXPERT = re.compile(r"^(.*)\.experts\.0\.[^.]+$")
NVFP4_RANGE = 448.0 * 6.0  # MLX's global scale is the largest magnitude that block scales times levels reach
assert len(FP4_LEVELS) == len(fp4.NIBBLES)


class MlxSink(OwnNamesSink):
    """Weights, scales and biases under MLX's names."""

    @classmethod
    def check(cls, weights: Weights, modules: Modules) -> None:
        for name, parts in modules.items():
            stored_modules(weights, name, FORMAT)
            for projection, spec in parts.items():
                _check(f"{name}.{projection}" if projection else name, spec)

    @classmethod
    def nbytes(cls, spec: PackedSpec, dtype: torch.dtype) -> int:
        return sum(tensor.nbytes for tensor in matrix_specs(spec).values())

    def __init__(self, weights: EditedWeights, modules: Modules, activations: Activations | None = None) -> None:
        super().__init__(weights, modules, activations)
        self._names = {name: mlx_names(stored_modules(weights, name, FORMAT)) for name in modules}

    def module_specs(self, name: str) -> dict[str, TensorSpec]:
        parts, names = self.modules[name], self._names[name]
        return {f"{names[p]}.{leaf}": s for p, spec in parts.items() for leaf, s in matrix_specs(spec).items()}

    def put_linear(self, shard: Shard, name: str, q: QTensor) -> None:
        self._put(shard, self._names[name][""], q, None)

    def put_experts(self, shard: Shard, name: str, layout: ExpertsLayout, start: int, quantized: Mapping[str, QTensor]) -> None:
        for projection, q in quantized.items():
            self._put(shard, self._names[name][projection], q, start)

    def _put(self, shard: Shard, stored: str, q: QTensor, start: int | None) -> None:
        """Write experts from `start` on; None writes a linear."""
        for leaf, value in matrix_tensors(q).items():
            name = f"{stored}.{leaf}"
            shard.write(name, value, skip=(start or 0) * value[0].nbytes)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        described = {self._names[name][p]: _grid(spec) for name, parts in self.modules.items() for p, spec in parts.items()}
        most = next(iter(described.values()))
        quantization = {**most, **described}
        return {**config, "quantization": quantization, "quantization_config": quantization}


def _check(where: str, spec: PackedSpec) -> None:
    if len(set(spec.bits)) > 1:
        raise BadInputError(f"format mlx: the experts of {where} have different widths; it takes one for a stack of experts")
    if spec.ggml:
        return
    if spec.group_size not in mlx.GROUPS:
        sizes = ", ".join(map(str, mlx.GROUPS))
        raise BadInputError(f"format mlx: {where} has one scale a row; set weights.group_size (or group_size_fallback) to one of {sizes}")
    if spec.bits[0] not in mlx.BITS or spec.shape[1] * spec.bits[0] % 32:
        raise BadInputError(f"format mlx: {where} has rows of {spec.shape[1]} codes of {spec.bits[0]} bits, which do not fill 32-bit words")


def mlx_names(stored: Mapping[str, list[str]]) -> dict[str, str]:
    """MLX's names by projection: a linear's own, or one stack for all experts.

    Raises:
        BadInputError: experts that the checkpoint names in another way than `BLOCK.experts.N.NAME`.
    """
    if "" in stored:
        return {"": stored[""][0]}
    result = {}
    for projection, names in stored.items():
        block = FIRST_EXPERT.match(names[0])
        if block is None:
            raise BadInputError(f"format mlx: the checkpoint calls its first expert {names[0]}, where mlx-lm knows BLOCK.experts.0.NAME")
        result[projection] = f"{block[1]}.switch_mlp.{projection}"
    return result


def matrix_specs(spec: PackedSpec) -> dict[str, TensorSpec]:
    """What is stored for a stack of matrices, or for a linear, by its last name."""
    (out, inputs), count = spec.shape, (len(spec.bits),) if spec.stacked else ()
    weight = {"weight": TensorSpec(torch.uint32, (*count, out, inputs * spec.bits[0] // 32))}
    if spec.ggml:
        scales = {**weight, "scales": TensorSpec(torch.uint8, (*count, out, spec.groups))}
        return {**scales, "global_scale": TensorSpec(torch.float32, count)} if spec.ggml == "nvfp4" else scales
    grid = TensorSpec(spec.scale_dtype, (*count, out, spec.groups))
    return {**weight, "scales": grid, "biases": grid}


def matrix_tensors(q: QTensor) -> dict[str, Tensor]:
    """What is stored of these matrices, by last name, [C, ...]; a linear is a stack of one."""
    params, codes = q.params, q.codes.cpu()
    if isinstance(params, Mxfp4Params | Nvfp4Params):
        weight = fp4.pack_codes(codes).view(torch.uint32)
        if isinstance(params, Mxfp4Params):
            return {"weight": weight, "scales": params.exponent.cpu()}
        return {"weight": weight, "scales": params.scale.cpu(), "global_scale": params.tensor_scale.cpu() * NVFP4_RANGE}
    scale = params.scale.cpu()
    bias = params.offset.cpu() if isinstance(params, OffsetParams) else -(scale.float() * params.zero_point.cpu().float())
    return {"weight": mlx.pack_codes(codes, int(q.bits[0])), "scales": scale, "biases": bias.to(scale.dtype)}


def _grid(spec: PackedSpec) -> dict[str, Any]:
    grid: dict[str, Any] = {"group_size": spec.group_size, "bits": spec.bits[0]}
    if not spec.ggml:
        return grid
    return {**grid, "mode": spec.ggml, **({"global_scale": True} if spec.ggml == "nvfp4" else {})}
