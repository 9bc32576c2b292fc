"""Stored bytes as float32 numbers, by looking every byte up in a table."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moebit.tensor.layouts.words import unpack_words
from moebit.tensor.packing import packed_row_bytes
from moebit.tensor.packing import unpack as unpack_stream

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WORD = 32  # bits of the int32 words that packed codes lie in
TABLED_WIDTHS = (2, 4, 8)  # no code crosses a byte
# What each of the 256 bytes stands for, [256, codes in a byte] float32: looking up is several times faster than computing.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # without the sign; OCP Microscaling Formats (MX) 1.0, section 5.3.3
E2M1_BYTES = torch.tensor([[(-1.0 if code & 8 else 1.0) * E2M1[code & 7] for code in (byte & 15, byte >> 4)] for byte in range(256)])
E2M3 = torch.tensor(  # likewise, six bits
    [sign * (low / 8 if high == 0 else (1 + low / 8) * 2.0 ** (high - 1)) for sign in (1, -1) for high in range(4) for low in range(8)]
)
E8M0_BYTES = torch.tensor([[2.0 ** (byte - 127)] for byte in range(255)] + [[math.nan]])  # section 5.4.1 there
FLOAT8_BYTES = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float().unsqueeze(1) for dtype in FLOAT8}
INTEGER_BYTES = {
    bits: torch.tensor([[float((byte >> low) % 2**bits - 2 ** (bits - 1)) for low in range(0, 8, bits)] for byte in range(256)])
    for bits in TABLED_WIDTHS
}
WHOLE_ROWS = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}  # a row of such a table as one number
Decode = Callable[[Tensor], Tensor]


def floats(stored: Tensor) -> Tensor:
    if stored.dtype in FLOAT8_BYTES and stored.ndim:
        return _lookup(stored, FLOAT8_BYTES[stored.dtype])
    return stored.float()


def e8m0(stored: Tensor) -> Tensor:
    return _lookup(stored.reshape(-1), E8M0_BYTES).view(stored.shape)


def e2m1(blocks: Tensor) -> Tensor:
    """uint8 [n, out, G, 16] -> float32 [n, out, 32 G]."""
    return _lookup(blocks, E2M1_BYTES).flatten(2)


def e2m1_rows(stored: Tensor) -> Tensor:
    """uint8 [.., in / 2] -> float32 [.., in], the low four bits of a byte first."""
    return _lookup(stored, E2M1_BYTES)


def e2m3_rows(stored: Tensor) -> Tensor:
    """uint8 [n, 3 in / 4] -> float32 [n, in]: codes of six bits, the first from the lowest bit on."""
    count = stored.shape[-1] * 4 // 3
    whole = torch.nn.functional.pad(stored, (0, packed_row_bytes(count, 6) - stored.shape[-1]))
    return E2M3.index_select(0, unpack_stream(whole, 6, count).flatten().int()).view(len(stored), -1)


def unpack(words: Tensor, *, bits: int, width: int) -> Tensor:
    """int32 [n, words] -> float32 [n, width], signed; codes lie from the lowest bit of the first word on, offset by 2^(bits-1)."""
    if bits in TABLED_WIDTHS:
        return _lookup(words, INTEGER_BYTES[bits])[:, :width]
    return unsigned(words, bits=bits, width=width).float() - float(2 ** (bits - 1))


def unsigned(words: Tensor, *, bits: int, width: int) -> Tensor:
    """int32 [n, words] -> uint8 [n, width]: codes of 1 to 8 bits from the lowest bit of the first word on."""
    if bits == 1:
        stored = words.contiguous().view(torch.uint8)
        return ((stored.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[:, :width]
    return unpack_words(words, bits, width)


def unpack_apart(words: Tensor, *, bits: int, width: int) -> Tensor:
    """int32 [n, words] -> float32 [n, width], signed; each word holds as many whole codes as fit, and its highest bits are unused.

    compressed-tensors packed widths that do not divide 32 like this before its version 0.18.
    """
    per_word = WORD // bits
    codes = (words.long().unsqueeze(-1) >> (torch.arange(per_word) * bits)) & (2**bits - 1)
    return codes.flatten(1)[:, :width].float() - float(2 ** (bits - 1))


def _lookup(stored: Tensor, table: Tensor) -> Tensor:
    """float32 [..., k n]: every byte of [..., n bytes] replaced by its row of [256, k]."""
    stored_bytes, per_byte = stored.view(torch.uint8), table.shape[1]
    rows = table.view(WHOLE_ROWS[per_byte]).flatten().index_select(0, stored_bytes.flatten().int())
    return rows.view(torch.float32).view(*stored_bytes.shape[:-1], stored_bytes.shape[-1] * per_byte)
