"""One quantized matrix as compressed-tensors stores it: which tensors there are, how they are made, and what they stand for.

Every quantized matrix X of the checkpoint is stored as one of

    pack-quantized   weight_packed int32 [out, ceil(in * bits / 32)], weight_scale [out, groups], weight_shape int64 [2];
                     asymmetric: weight_zero_point int32 [ceil(out * bits / 32), groups]
    int-quantized    weight int8 [out, in],           weight_scale [out, 1]
    float-quantized  weight float8_e4m3fn [out, in],  weight_scale [out, 1], of blocks [out / 128, in / 128]
    nvfp4-pack-quantized  weight_packed uint8 [out, in / 2], weight_scale float8_e4m3fn [out, in / 16], weight_global_scale float32 [1],
                     which scales are divided by
    mxfp4-pack-quantized  weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32], exponents e8m0

A packed row is a little-endian stream of codes, the least significant bit first, padded to 32-bit words: the packing of compressed-tensors
0.18.0 and later (before it, 3, 5, 6 and 7 bits were packed otherwise). weight = scale * (code - zero point), and 2^(bits-1) is the zero
point of symmetric grids. Source: the compressed-tensors package 0.20.0 and its documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moebit.formats.native import PackedSpec
from moebit.storage.files import TensorSpec
from moebit.tensor import QTensor
from moebit.tensor.grids import FLOAT8, Float8Grid
from moebit.tensor.grids.fp4 import FP4_GRIDS
from moebit.tensor.grids.ggml_fp4 import Mxfp4Params, Nvfp4Params
from moebit.tensor.grids.uniform import dequantize
from moebit.tensor.layouts import fp4
from moebit.tensor.layouts.words import pack_words, pack_zero_points, unpack_words, unpack_zero_points, words

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FP4 = {"nvfp4": NVFP4, "mxfp4": MXFP4}  # by the name of the grid
FP4_KINDS = {storage: kind for kind, storage in FP4.items()}
FP4_VALUES = torch.bfloat16  # holds every FP4 number times an e4m3 or e8m0 scale exactly

Read = Callable[[str], Tensor]


def storage(spec: PackedSpec) -> str:
    """Return which of the storages a matrix has."""
    if spec.ggml:
        return FP4[spec.ggml]
    if spec.float8:
        return FLOAT
    return INT if spec.input_bits == 8 and not spec.input_float8 else PACKED


def matrix_specs(spec: PackedSpec, bits: int) -> dict[str, TensorSpec]:
    """Return what is stored for one matrix of this width, by suffix."""
    (out, inputs), kind = spec.shape, storage(spec)
    scale = TensorSpec(spec.scale_dtype, (-(-out // spec.block_rows), spec.groups))
    if kind in FP4_KINDS:
        half = {"weight_packed": TensorSpec(torch.uint8, (out, inputs // 2))}
        if kind == MXFP4:
            return {**half, "weight_scale": TensorSpec(torch.uint8, scale.shape)}
        whole = TensorSpec(torch.float32, (1,))
        return {**half, "weight_scale": TensorSpec(FLOAT8, scale.shape), "weight_global_scale": whole}
    if kind == PACKED:
        found = {
            "weight_packed": TensorSpec(torch.int32, (out, words(inputs, bits))),
            "weight_scale": scale,
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }
        return found if spec.symmetric else {**found, "weight_zero_point": TensorSpec(torch.int32, (words(out, bits), spec.groups))}
    return {"weight": TensorSpec(FLOAT8 if spec.float8 else torch.int8, (out, inputs)), "weight_scale": scale}


def matrix_tensors(spec: PackedSpec, q: QTensor, number: int) -> dict[str, Tensor]:
    """Return the stored form of matrix `number` of a stack."""
    codes, kind = q.codes[number].cpu(), storage(spec)
    if kind in FP4_KINDS:
        return {"weight_packed": fp4.pack_codes(codes), **_fp4_scales(q, number)}
    scale = q.params.scale[number, :: spec.block_rows].to(spec.scale_dtype).contiguous()
    if kind == PACKED:
        bits = int(q.bits[number])
        found = {"weight_packed": pack_words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(spec.shape)}
        return found if spec.symmetric else {**found, "weight_zero_point": pack_zero_points(q.params.zero_point[number].cpu(), bits)}
    return {"weight": q.grid.numbers(codes) if isinstance(q.grid, Float8Grid) else (codes ^ 128).view(torch.int8), "weight_scale": scale}


def _fp4_scales(q: QTensor, number: int) -> dict[str, Tensor]:
    if isinstance(q.params, Mxfp4Params):
        return {"weight_scale": q.params.exponent[number].cpu()}
    scale = q.params.scale[number].cpu().view(FLOAT8)
    return {"weight_scale": scale, "weight_global_scale": 1 / q.params.tensor_scale[number].cpu().view(1)}


def matrix_value(kind: str, bits: int, shape: tuple[int, int], read: Read, zeros: Tensor | None, block_rows: int = 1) -> Tensor:
    """Return the weights [out, in] of stored rows, as engines dequantize them.

    Args:
        kind: the storage. shape: (out, in) of these rows.
        read: gives the stored tensors of the rows by their suffix. zeros: uint8 [out, groups] of an asymmetric matrix.
        block_rows: rows that share a scale.
    """
    scale = read("weight_scale")
    if kind in FP4_KINDS:
        grid, codes = FP4_GRIDS[FP4_KINDS[kind]], fp4.unpack_codes(read("weight_packed")).unsqueeze(0)
        if kind == MXFP4:
            params: Mxfp4Params | Nvfp4Params = Mxfp4Params(scale.unsqueeze(0))
        else:
            params = Nvfp4Params(scale.view(torch.uint8).unsqueeze(0), 1 / read("weight_global_scale").float())
        return grid.dequantize(codes, params, FP4_VALUES)[0]
    if kind == PACKED:
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8) if zeros is None else zeros
        return dequantize(unpack_words(read("weight_packed"), bits, shape[1]), scale, zero, scale.dtype)
    scale = scale.repeat_interleave(block_rows, 0)[: shape[0]]
    return dequantize(read("weight").float(), scale, torch.zeros_like(scale, dtype=torch.uint8), scale.dtype)


def stored_zero_points(packed: Tensor, bits: int, out: int) -> Tensor:
    """Return uint8 [out, groups] from a stored `weight_zero_point`."""
    return unpack_zero_points(packed, bits, out)


def nbytes(spec: PackedSpec) -> int:
    """Return the bytes of a stack's stored tensors."""
    return sum(tensor.nbytes for bits in spec.bits for tensor in matrix_specs(spec, bits).values())


def average_bits(modules: Mapping[str, Mapping[str, PackedSpec]]) -> float:
    """Return 8 x bytes of codes, scales and zero points / number of weights (the shapes, 16 bytes a matrix, left out)."""
    parts = [spec for group in modules.values() for spec in group.values()]
    shapes = sum(16 * len(spec.bits) for spec in parts if storage(spec) == PACKED)
    return 8 * (sum(map(nbytes, parts)) - shapes) / sum(spec.weights for spec in parts)
