"""Compiled CPU kernels (numba) over packed codes: products that never unpack a matrix into memory, and fast dequantization.

A stack of matrices is what docs/format.md describes: rows of codes as bitstreams, one scale and zero point per row and group.
`integer_product` multiplies in integers: the input is written as 16-bit integers with one scale per 128 (or 64) channels, far finer than
the 8 significant bits of bfloat16. It needs AVX-512 with VBMI and VNNI. `float_product` takes the input as it is and runs anywhere.

Shape suffixes: T rows of input, S products wanted (slots), J chosen matrices, O outputs, I inputs, G groups, U units of input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from moebit.runtime import vectors
from moebit.tensor.kernels import follow_torch

TILE = 32  # rows of a matrix that one thread takes at a time
CHUNK = 64  # codes in a vector
LEVELS = 127 * 256 + 127  # the largest input in integers: its two bytes are signed


@dataclass(frozen=True)
class Stack:
    """Packed matrices, ready for the kernels.

    Attributes:
        codes: uint8, flat; scale: [E, O, G]; zeros: uint8, flat, or None if symmetric.
        bits: int64 [E]; code_at, zero_at: int64 [E], where each matrix's codes and zero points begin.
        shape: (O, I).
    """

    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    bits: np.ndarray
    code_at: np.ndarray
    zero_at: np.ndarray
    shape: tuple[int, int]

    @property
    def group(self) -> int:
        return self.shape[1] // self.scale.shape[-1]

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """bits int32, code_at and zero_at int64 on the device of the codes."""
        bits, *places = (torch.from_numpy(table).to(self.codes.device) for table in (self.bits, self.code_at, self.zero_at))
        return bits.int(), places[0], places[1]

    @cached_property
    def arrays(self) -> tuple[Any, ...]:
        """What every kernel begins with; scales as the integers that hold them, and how far they are shifted to be those of float32."""
        if self.scale.dtype == torch.bfloat16:
            scale, shift = self.scale.view(torch.uint16).numpy(), np.uint32(16)
        else:
            scale, shift = self.scale.float().view(torch.uint32).numpy(), np.uint32(0)
        zeros = np.empty(0, np.uint8) if self.zeros is None else self.zeros.numpy()
        return self.codes.numpy(), scale, shift, zeros, self.bits, self.code_at, self.zero_at, *self.shape


@numba.njit(nogil=True)
def _aligned(size: int) -> Any:
    """uint8 [size] that begins at a cache line: a vector across two lines takes two reads."""
    raw = np.empty(size + CHUNK, np.uint8)
    start = -raw.ctypes.data % CHUNK
    return raw[start : start + size]


@numba.njit(nogil=True)
def _unpack_loops(codes: Any, at: int, bits: int, count: int, row: Any) -> None:
    mask = np.uint64((1 << bits) - 1)
    if bits == 8:
        for i in range(count):
            row[i] = codes[at + i]
    elif bits == 4:
        for i in range((count + 1) // 2):
            row[2 * i], row[2 * i + 1] = codes[at + i] & 15, codes[at + i] >> 4
    elif bits == 2:
        for i in range((count + 3) // 4):
            byte = codes[at + i]
            row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3] = byte & 3, (byte >> 2) & 3, (byte >> 4) & 3, byte >> 6
    else:
        for i in range((count + 7) // 8):
            word = np.uint64(0)
            for byte in range(bits):
                word |= np.uint64(codes[at + i * bits + byte]) << np.uint64(8 * byte)
            for j in range(8):
                row[8 * i + j] = np.uint8((word >> np.uint64(j * bits)) & mask)


@numba.njit(nogil=True, forceinline=True)
def _unpack_vectors(codes: Any, at: int, bits: int, count: int, row: Any) -> None:
    gather, shift = vectors.load_bytes(vectors.GATHER, CHUNK * bits), vectors.load_bytes(vectors.SHIFT, CHUNK * bits)
    mask = vectors.every_byte(np.uint8((1 << bits) - 1))
    chunks = (count + CHUNK - 1) // CHUNK
    source, begin = codes, at
    if at + (chunks - 1) * 8 * bits + CHUNK > codes.size:  # a vector would reach beyond the end
        source, begin = np.zeros(chunks * 8 * bits + CHUNK, np.uint8), 0
        for i in range(min(chunks * 8 * bits, codes.size - at)):
            source[i] = codes[at + i]
    for chunk in range(chunks):
        packed = vectors.load_bytes(source, begin + chunk * 8 * bits)
        vectors.store_bytes(row, chunk * CHUNK, vectors.unpack_bytes(packed, gather, shift, mask))


# Codes of one row into a uint8 buffer whose length is a multiple of CHUNK.
_unpack_row = _unpack_vectors if vectors.AVAILABLE else _unpack_loops


@numba.njit(nogil=True, forceinline=True)
def _read_grid(scale: Any, shift: Any, e: int, r: int, zeros: Any, zero_at: int, bits: int, s: Any, z: Any) -> None:
    """One row's scales (as the bits of float32; stored so, or as bfloat16) and zero points."""
    groups = scale.shape[2]
    for g in range(groups):
        s[g] = np.uint32(np.uint32(scale[e, r, g]) << shift)
    if zeros.size == 0:
        z[:] = np.float32(1 << (bits - 1))
        return
    for g in range(groups):
        place = (r * groups + g) * bits
        byte = zero_at + (place >> 3)
        word = np.uint32(zeros[byte])
        if byte + 1 < zeros.size:
            word |= np.uint32(zeros[byte + 1]) << np.uint32(8)
        z[g] = np.float32((word >> np.uint32(place & 7)) & np.uint32((1 << bits) - 1))


@numba.njit(nogil=True, forceinline=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@numba.njit(nogil=True, error_model="numpy")
def _unit_to_integers(x: Any, high: Any, low: Any) -> Any:
    """Write both planes, and give the scale; NaN where something is not finite."""
    top, total = np.float32(0), np.float32(0)
    for i in range(x.size):
        top = max(top, abs(x[i]))
        total += x[i] * np.float32(0)
    if total != 0 or not np.isfinite(top):
        return np.float32(np.nan)
    if top < np.float32(1e-30):
        return np.float32(1)
    factor = np.float32(LEVELS) / top
    for i in range(x.size):
        q = np.int32(np.rint(x[i] * factor))
        high[i], low[i] = np.uint8(((q + 128) >> 8) & 255), np.uint8(q & 255)
    return top / np.float32(LEVELS)


@numba.njit(nogil=True)
def _sum_planes(high: Any, low: Any) -> Any:
    total = np.int32(0)
    for i in range(high.size):
        total += np.int32(256) * np.int32(np.int8(high[i])) + np.int32(np.int8(low[i]))
    return total


@numba.njit(nogil=True, error_model="numpy")
def _to_integers(x: Any, unit: int, high: Any, low: Any, xs: Any, xsum: Any) -> None:
    """x [T, I] as two flat planes of signed bytes [T, U * unit] with scales xs [T, U]; xsum [T, G]: the sums over groups."""
    tokens, inputs = x.shape
    units, groups = xs.shape[1], xsum.shape[1]
    group = inputs // groups
    segment = min(unit, group)
    for t in range(tokens):
        for u in range(units):
            piece = x[t, u * unit : min(inputs, u * unit + unit)]
            at = (t * units + u) * unit
            xs[t, u] = _unit_to_integers(piece, high[at : at + unit], low[at : at + unit])
        for g in range(groups):
            xsum[t, g] = 0
            for first in range(g * group, g * group + group, segment):
                at, count = t * units * unit + first, min(segment, g * group + group - first)
                xsum[t, g] += xs[t, first // unit] * np.float32(_sum_planes(high[at : at + count], low[at : at + count]))


@numba.njit(nogil=True, forceinline=True)
def _integer_row(row: Any, high: Any, low: Any, at: int, unit: int, halves: bool, sx: Any, parts: int, total: Any) -> Any:
    """total + one row of codes times one input; sx: scale of weight times that of input, for every unit or half of one."""
    if unit == 2 * CHUNK:
        for u in range(parts):
            c = 2 * u * CHUNK
            first, second = vectors.load_bytes(row, c), vectors.load_bytes(row, c + CHUNK)
            h = vectors.add_products(vectors.no_words(), first, vectors.load_bytes(high, at + c))
            lo = vectors.add_products(vectors.no_words(), first, vectors.load_bytes(low, at + c))
            h = vectors.add_products(h, second, vectors.load_bytes(high, at + c + CHUNK))
            lo = vectors.add_products(lo, second, vectors.load_bytes(low, at + c + CHUNK))
            total = vectors.add_scaled(total, vectors.join_planes(h, lo), sx[u])
        return total
    for c in range(parts // 2 if halves else parts):
        codes = vectors.load_bytes(row, c * CHUNK)
        h = vectors.add_products(vectors.no_words(), codes, vectors.load_bytes(high, at + c * CHUNK))
        lo = vectors.add_products(vectors.no_words(), codes, vectors.load_bytes(low, at + c * CHUNK))
        if halves:
            total = vectors.add_scaled_halves(total, vectors.join_planes(h, lo), sx[2 * c], sx[2 * c + 1])
        else:
            total = vectors.add_scaled(total, vectors.join_planes(h, lo), sx[c])
    return total


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _integer_product(
    codes: Any, scale: Any, shift: Any, zeros: Any, bits: Any, code_at: Any, zero_at: Any, outs: int, inputs: int,
    chosen: Any, bounds: Any, tokens: Any, x: Any, y: Any, start: int, step: int,
) -> None:  # fmt: skip
    groups = scale.shape[2]
    group = inputs // groups
    unit = 2 * CHUNK if group % (2 * CHUNK) == 0 or groups == 1 else CHUNK
    halves = group == CHUNK // 2 and groups > 1
    units = (inputs + unit - 1) // unit
    parts = 2 * units if halves else units
    # Rows of 16 scales and more, so that vectors of them can be read; what stands beyond is zero.
    wide, deep = (parts + 15) // 16 * 16, (groups + 15) // 16 * 16
    high, low = _aligned(x.shape[0] * units * unit), _aligned(x.shape[0] * units * unit)
    high[:], low[:] = 0, 0
    unit_scale, xsum = np.empty((x.shape[0], units), np.float32), np.empty((x.shape[0], groups), np.float32)
    _to_integers(x, unit, high, low, unit_scale, xsum)
    xs, xz = np.zeros(x.shape[0] * wide, np.float32), np.zeros(x.shape[0] * deep, np.float32)
    group_of = np.empty(parts, np.int64)
    for part in range(parts):
        group_of[part] = min(part * (group if halves else unit) // group, groups - 1)
        for t in range(x.shape[0]):
            xs[t * wide + part] = unit_scale[t, part // 2 if halves else part]
    for t in range(x.shape[0]):
        xz[t * deep : t * deep + groups] = xsum[t]
    tiles = (outs + TILE - 1) // TILE
    for flat in numba.prange(chosen.size * tiles):
        j, first = flat // tiles, (flat % tiles) * TILE
        e = chosen[j]
        row, s, z = _aligned(units * unit), np.empty(groups, np.uint32), np.empty(groups, np.float32)
        values = s.view(np.float32)
        spread, sx = _aligned(4 * wide).view(np.float32), _aligned(4 * wide).view(np.float32)
        sz = _aligned(4 * deep).view(np.float32)
        spread[:], sz[:] = 0, 0
        for r in range(first, min(outs, first + TILE)):
            _read_grid(scale, shift, e, r, zeros, zero_at[e], bits[e], s, z)
            _unpack_row(codes, code_at[e] + r * ((inputs + 7) // 8) * bits[e], bits[e], inputs, row)
            for g in range(groups):
                sz[g] = z[g] * values[g]
            if parts == groups:
                for part in range(parts):
                    spread[part] = values[part]
            else:
                for part in range(parts):
                    spread[part] = values[group_of[part]]
            for slot in range(bounds[j], bounds[j + 1]):
                t = tokens[slot]
                for at in range(0, wide, 16):
                    product = vectors.multiply(vectors.load_floats(spread, at), vectors.load_floats(xs, t * wide + at))
                    vectors.store_floats(sx, at, product)
                total = vectors.no_floats()
                for at in range(0, deep, 16):
                    total = vectors.subtract_product(total, vectors.load_floats(sz, at), vectors.load_floats(xz, t * deep + at))
                total = _integer_row(row, high, low, t * units * unit, unit, halves, sx, parts, total)
                y[slot, start + r * step] = vectors.sum_floats(total)


@numba.njit(nogil=True, error_model="numpy")
def _dequantize_row(row: Any, s: Any, z: Any, weight: Any) -> None:
    group = weight.size // s.size
    for g in range(s.size):
        scale, zero = s[g], z[g]
        # Slices, here and below: numba sees that an index from 0 is not negative, and vectorizes.
        codes, result = row[g * group : g * group + group], weight[g * group : g * group + group]
        for i in range(group):
            result[i] = scale * (np.float32(codes[i]) - zero)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _float_product(
    codes: Any, scale: Any, shift: Any, zeros: Any, bits: Any, code_at: Any, zero_at: Any, outs: int, inputs: int,
    chosen: Any, bounds: Any, tokens: Any, x: Any, y: Any, start: int, step: int,
) -> None:  # fmt: skip
    groups = scale.shape[2]
    tiles = (outs + TILE - 1) // TILE
    for flat in numba.prange(chosen.size * tiles):
        j, first = flat // tiles, (flat % tiles) * TILE
        e = chosen[j]
        row, weight = _aligned((inputs + CHUNK - 1) // CHUNK * CHUNK), np.empty(inputs, np.float32)
        s, z = np.empty(groups, np.uint32), np.empty(groups, np.float32)
        values = s.view(np.float32)
        for r in range(first, min(outs, first + TILE)):
            _read_grid(scale, shift, e, r, zeros, zero_at[e], bits[e], s, z)
            _unpack_row(codes, code_at[e] + r * ((inputs + 7) // 8) * bits[e], bits[e], inputs, row)
            _dequantize_row(row, values, z, weight)
            for slot in range(bounds[j], bounds[j + 1]):
                y[slot, start + r * step] = _dot(weight, x[tokens[slot]])


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _dequantize(
    codes: Any, scale: Any, shift: Any, zeros: Any, bits: Any, code_at: Any, zero_at: Any, outs: int, inputs: int,
    e: int, narrow: Any, wide: Any, start: int, step: int,
) -> None:  # fmt: skip
    groups = scale.shape[2]
    for tile in numba.prange((outs + TILE - 1) // TILE):
        row, weight = _aligned((inputs + CHUNK - 1) // CHUNK * CHUNK), np.empty(inputs, np.float32)
        s, z = np.empty(groups, np.uint32), np.empty(groups, np.float32)
        values, pattern = s.view(np.float32), weight.view(np.uint32)
        for r in range(tile * TILE, min(outs, tile * TILE + TILE)):
            _read_grid(scale, shift, e, r, zeros, zero_at[e], bits[e], s, z)
            _unpack_row(codes, code_at[e] + r * ((inputs + 7) // 8) * bits[e], bits[e], inputs, row)
            _dequantize_row(row, values, z, weight)
            if wide.size:
                wide[start + r * step] = weight
            else:
                target = narrow[start + r * step]
                for i in range(inputs):  # to bfloat16: nearest, ties to even; in 32 bits, which numba has to be told
                    odd = np.uint32(pattern[i] >> np.uint32(16)) & np.uint32(1)
                    target[i] = np.uint16(np.uint32(pattern[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def integers_serve(stack: Stack) -> bool:
    """Whether `integer_product` can take this stack on this processor."""
    return vectors.AVAILABLE and (stack.group % CHUNK == 0 or stack.group == CHUNK // 2 or stack.scale.shape[-1] == 1)


def integer_product(stack: Stack, x_TI: Tensor, chosen: list[int], bounds: list[int], tokens: Tensor, y: Tensor, rows: slice) -> None:
    """Write products of chosen matrices with rows of x: slot s in [bounds[j], bounds[j+1]) is matrix chosen[j] times row tokens[s].

    Args:
        y: float32 [S, columns]; output r of a slot goes to column range(columns)[rows][r].

    Raises:
        ValueError: a stack that `integers_serve` says no to.
    """
    if not integers_serve(stack):
        raise ValueError(f"groups of {stack.group} cannot be multiplied in integers here")
    follow_torch()
    _integer_product(*stack.arrays, *_routed(x_TI, chosen, bounds, tokens), y.numpy(), rows.start or 0, rows.step or 1)


def float_product(stack: Stack, x_TI: Tensor, chosen: list[int], bounds: list[int], tokens: Tensor, y: Tensor, rows: slice) -> None:
    """Write products of chosen matrices with rows of x in float32 throughout. The arguments are those of `integer_product`."""
    follow_torch()
    _float_product(*stack.arrays, *_routed(x_TI, chosen, bounds, tokens), y.numpy(), rows.start or 0, rows.step or 1)


def dequantize_into(stack: Stack, e: int, target: Tensor, rows: slice) -> None:
    """Write matrix e to target[rows], where target is [rows, I] in float32 or bfloat16: the product in float32, rounded once."""
    follow_torch()
    if target.dtype == torch.bfloat16:
        narrow, wide = target.view(torch.uint16).numpy(), np.empty((0, 0), np.float32)
    else:
        narrow, wide = np.empty((0, 0), np.uint16), target.numpy()
    _dequantize(*stack.arrays, e, narrow, wide, rows.start or 0, rows.step or 1)


def _routed(x_TI: Tensor, chosen: list[int], bounds: list[int], tokens: Tensor) -> tuple[Any, ...]:
    x = x_TI.detach().float().contiguous().numpy()
    return np.array(chosen), np.array(bounds), tokens.numpy(), x
