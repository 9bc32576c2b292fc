"""What NVIDIA's ModelOpt writes: NVFP4 and MXFP4 in bytes, 8-bit floats per tensor, channel or block, told apart by the stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import E2M1, FLOAT8, Decode, e2m1_rows, e8m0, floats
from moebit.storage.shipped.entries import Shipped, UnreadableError, gathered, missing, short, unfit
from moebit.storage.shipped.grids import Grid, RowsEntry, Shared, activation_parts, derived_block, plain_entry, shared_of

NVFP4, MX = 16, 32  # values that share a scale


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME uint8 or float8 with NAME_scale and, for NVFP4, NAME_scale_2, a float32 by which the scales are multiplied."""
    made, kinds = [], set()
    for name, codes in stored.items():
        scale = stored.get(f"{name}_scale")
        if codes.dtype not in (torch.uint8, *FLOAT8) or name.endswith(("_scale", "_scale_2")):
            continue
        if scale is None:
            raise missing(codes, f"{name}_scale")
        before = f"{name.removesuffix('weight')}pre_quant_scale"
        if before in stored:
            raise UnreadableError(f"what comes into {name} is scaled ({before}), which moebit does not fold into the weights")
        kind, entry = _bytes(name, codes, scale, stored) if codes.dtype == torch.uint8 else _floats(name, codes, scale, stored)
        kinds.add(kind)
        made.append(entry)
    return gathered("modelopt", " and ".join(sorted(kinds)), stored, made)


def _floats(name: str, codes: TensorEntry, scale: TensorEntry, stored: Mapping[str, TensorEntry]) -> tuple[str, RowsEntry]:
    further = activation_parts(name, stored)
    if scale.dtype == torch.uint8:
        return "mxfp8 groups of 32", plain_entry(name, codes, scale, (1, MX), further=further)
    # Blocks [rows / 128, 1, columns / 128, 1] are a matrix of scales with axes of one number between.
    shape = scale.shape[::2] if len(scale.shape) == 4 and scale.shape[1] == scale.shape[3] == 1 else scale.shape
    seen = TensorEntry(scale.file, scale.name, scale.dtype, shape, scale.offset)
    return "fp8", plain_entry(name, codes, seen, derived_block(codes, seen), further=further)


def _bytes(name: str, codes: TensorEntry, scale: TensorEntry, stored: Mapping[str, TensorEntry]) -> tuple[str, RowsEntry]:
    """Two e2m1 numbers in a byte; experts that transformers has as [E, in, out] lie as [E, in / 2, out]."""
    if len(codes.shape) not in (2, 3):
        raise unfit(codes, "a matrix of bytes or a stack of them")
    if scale.dtype == torch.float8_e4m3fn:
        kind, size, shared = "nvfp4 groups of 16", NVFP4, shared_of(codes, f"{name}_scale_2", stored, divides=False)
        decode: Decode = floats
    elif scale.dtype == torch.uint8:
        kind, size, shared, decode = "mxfp4 groups of 32", MX, None, e8m0
    else:
        raise UnreadableError(f"moebit reads ModelOpt's 4-bit floats and 8 bits, {name} is bytes with scales in {short(scale.dtype)}")
    (*stack, out, packed), further = codes.shape, activation_parts(name, stored)
    if scale.shape == (*stack, out, packed * 2 // size):
        grid = Grid(scale, (out, packed * 2 // size), (1, size), decode, shared=shared)
        return kind, RowsEntry(name, torch.bfloat16, (*stack, out, packed * 2), codes, e2m1_rows, grid, E2M1[-1], beside=further)
    if stack and scale.shape == (*stack, out * 2 // size, packed):
        return kind, _turned(name, codes, scale, size, decode, shared, further)
    raise unfit(scale, f"scales {[*stack, out, packed * 2 // size]}")


def _turned(
    name: str,
    codes: TensorEntry,
    scale: TensorEntry,
    size: int,
    decode: Decode,
    shared: Shared | None,
    further: tuple[TensorEntry, ...],
) -> RowsEntry:
    experts, half, out = codes.shape
    grid = Grid(scale, (out, half * 2 // size), (1, size), partial(_then, decode), shared=shared)
    shape = (experts, half * 2, out)
    return RowsEntry(name, torch.bfloat16, shape, codes, partial(_then, e2m1_rows), grid, E2M1[-1], turned=True, beside=further)


def _then(decode: Decode, stored: Tensor) -> Tensor:
    """Decode [E, n, out] along the second axis."""
    return decode(stored.view(torch.uint8).transpose(1, 2).contiguous().view(stored.dtype))
