"""Triton kernels over packed codes, for CUDA devices: products that never unpack a matrix into memory.

A stack of matrices is what docs/format.md describes. Whatever the width, eight neighbouring codes (a unit) fill `bits` whole bytes: they
are read as one word, and code p of it lies `p * bits` bits up. Stacks of several widths run in the same launch.

Experts with few rows of input take `_few`, one program per row and tile of outputs, which reads the codes once for each of its rows and
multiplies in float32 throughout. The others take `_many`, one program per tile of rows and outputs: it rounds weights to the type of the
input, as dequantizing does, and multiplies tiles with float32 sums.

Imported only where it is used: moebit runs without Triton. In Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the
kernels also take tensors on the CPU, which is how the tests without a device run them.

Shape suffixes: T rows of input, S products wanted (slots), O outputs, I inputs, U units of eight inputs.
"""

# mypy: disable-error-code="no-untyped-def"
# (Kernels are not annotated: Triton reads annotations as types of its own.)

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebit.runtime.kernels import Stack

FEW = 8  # rows of input up to which an expert takes `_few`
FEW_TILE = {"OUTPUTS": 16, "UNITS": 32}
# The interpreter takes the bits of bfloat16 for integers where it multiplies tiles: there they are widened first.
MANY_TILE = {"ROWS": 64, "OUTPUTS": 64, "UNITS": 16, "WIDEN": bool(triton.knobs.runtime.interpret)}


@triton.jit
def _words(codes, row_at, unit, inside, bits, WIDEST: tl.constexpr):
    """One word per row of codes and unit; rows begin at the bytes `row_at`."""
    word = tl.zeros(inside.shape, tl.uint32 if WIDEST <= 4 else tl.uint64)
    for byte in tl.static_range(WIDEST):
        part = tl.load(codes + row_at + unit * bits + byte, mask=inside & (byte < bits), other=0)
        word |= part.to(word.dtype) << (8 * byte)
    return word


@triton.jit
def _grid(scale, zeros, e, zero_at, zero_bytes, bits, row, column, inside, outs, groups, group, SYMMETRIC: tl.constexpr):
    """(scale, zero point) in float32 of rows at columns. Zero points of a matrix are one stream of codes over rows and groups."""
    place = row * groups + column // group
    s = tl.load(scale + e * outs * groups + place, mask=inside, other=0).to(tl.float32)
    if SYMMETRIC:
        return s, tl.zeros_like(s) + (1 << (bits - 1)).to(tl.float32)
    first = zero_at + (place * bits) // 8  # a zero point lies in one byte or in two
    low = tl.load(zeros + first, mask=inside, other=0).to(tl.int32)
    high = tl.load(zeros + first + 1, mask=inside & (first + 1 < zero_bytes), other=0).to(tl.int32)
    z = ((low | (high << 8)) >> (place * bits) % 8) & ((1 << bits) - 1)
    return s, z.to(tl.float32)


@triton.jit
def _few(
    codes, scale, zeros, bits_of, code_at, zero_at, zero_bytes, x, tokens, table, y,
    outs, inputs, groups, group, x_row, y_row, y_start, y_step,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, WIDEST: tl.constexpr, OUTPUTS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    e = tl.load(table + 2 * tl.program_id(0)).to(tl.int64)
    slot = tl.load(table + 2 * tl.program_id(0) + 1).to(tl.int64)
    token = tl.load(tokens + slot).to(tl.int64)
    bits = tl.load(bits_of + e)
    own_codes, own_zeros = tl.load(code_at + e), tl.load(zero_at + e)
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    units = (inputs + 7) // 8
    row_at = own_codes + row.to(tl.int64) * units * bits
    total = tl.zeros([OUTPUTS, UNITS], tl.float32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)[None, :]
        word = _words(codes, row_at, unit, (row < outs) & (unit < units), bits, WIDEST)
        mask = ((1 << bits) - 1).to(word.dtype)
        for p in tl.static_range(8):
            column = 8 * unit + p
            inside = (row < outs) & (column < inputs)
            if p == 0 or not WHOLE:
                s, z = _grid(scale, zeros, e, own_zeros, zero_bytes, bits, row, column, inside, outs, groups, group, SYMMETRIC)
            code = (word >> (p * bits).to(word.dtype)) & mask
            value = tl.load(x + token * x_row + column, mask=column < inputs, other=0).to(tl.float32)
            total += s * (code.to(tl.float32) - z) * value
    result = tl.sum(total, 1)
    out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(y + slot * y_row + y_start + out * y_step, result, mask=out < outs)


@triton.jit
def _many(
    codes, scale, zeros, bits_of, code_at, zero_at, zero_bytes, x, tokens, table, y,
    outs, inputs, groups, group, x_row, y_row, y_start, y_step,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, WIDEST: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, UNITS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    e = tl.load(table + 3 * tl.program_id(0)).to(tl.int64)
    slot = tl.load(table + 3 * tl.program_id(0) + 1).to(tl.int64) + tl.arange(0, ROWS)
    live = slot < tl.load(table + 3 * tl.program_id(0) + 2)
    x_at = tl.load(tokens + slot, mask=live, other=0).to(tl.int64)[:, None] * x_row
    bits = tl.load(bits_of + e)
    own_codes, own_zeros = tl.load(code_at + e), tl.load(zero_at + e)
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    units = (inputs + 7) // 8
    row_at = own_codes + row.to(tl.int64) * units * bits
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)[:, None]
        word = _words(codes, row_at, unit, (row < outs) & (unit < units), bits, WIDEST)
        mask = ((1 << bits) - 1).to(word.dtype)
        for p in tl.static_range(8):  # a sum over inputs may be taken in any order: those that stand p-th in their units together
            column = 8 * unit + p
            inside = (row < outs) & (column < inputs)
            if p == 0 or not WHOLE:
                s, z = _grid(scale, zeros, e, own_zeros, zero_bytes, bits, row, column, inside, outs, groups, group, SYMMETRIC)
            code = (word >> (p * bits).to(word.dtype)) & mask
            weight = (s * (code.to(tl.float32) - z)).to(x.dtype.element_ty)
            across = 8 * (first + tl.arange(0, UNITS))[None, :] + p
            value = tl.load(x + x_at + across, mask=live[:, None] & (across < inputs), other=0)
            if WIDEN:
                value, weight = value.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(value, weight, total, input_precision="ieee")
    out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    tl.store(y + slot[:, None] * y_row + y_start + out * y_step, total, mask=live[:, None] & (out < outs))


def product(stack: Stack, x_TI: Tensor, chosen: list[int], bounds: list[int], tokens: Tensor, y: Tensor, rows: slice) -> None:
    """`kernels.float_product` for tensors on one CUDA device: two launches at most, whatever the experts and their widths.

    Args:
        x_TI: float32, bfloat16 or float16. y: float32 [S, columns], contiguous along its rows.
    """
    x = x_TI.detach()
    x = x if x.stride(1) == 1 else x.contiguous()
    few = [(e, slot) for e, (low, high) in zip(chosen, pairwise(bounds), strict=True) if high - low <= FEW for slot in range(low, high)]
    step = MANY_TILE["ROWS"]
    many = [
        (e, first, high)
        for e, (low, high) in zip(chosen, pairwise(bounds), strict=True)
        if high - low > FEW
        for first in range(low, high, step)
    ]
    with torch.cuda.device_of(x):
        if few:
            _launch(_few, few, FEW_TILE, stack, x, tokens, y, rows)
        if many:
            _launch(_many, many, MANY_TILE, stack, x, tokens, y, rows)


def _launch(kernel: Any, table: list[Any], tile: dict[str, int], stack: Stack, x: Tensor, tokens: Tensor, y: Tensor, rows: slice) -> None:
    outs, inputs = stack.shape
    groups, zeros = stack.scale.shape[-1], stack.zeros
    kernel[len(table), triton.cdiv(outs, tile["OUTPUTS"])](
        stack.codes, stack.scale, stack.codes if zeros is None else zeros, *stack.tables, 0 if zeros is None else zeros.numel(),
        x, tokens, torch.tensor(table, dtype=torch.int32, device=x.device), y,
        outs, inputs, groups, stack.group, x.stride(0), y.stride(0), rows.start or 0, rows.step or 1,
        SYMMETRIC=zeros is None, WHOLE=groups == 1 or stack.group % 8 == 0, WIDEST=int(stack.bits.max()), **tile,
    )  # fmt: skip
