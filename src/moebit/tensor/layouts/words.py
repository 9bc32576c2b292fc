"""Rows of codes in 32-bit words: compressed-tensors `pack-quantized`, and what GPTQ and MLX build on.

A row is a little-endian stream of codes, the least significant bit first, padded with zeros to whole words. Codes may cross words.
Source: compressed-tensors 0.18.0 and later (earlier versions lay 3, 5, 6 and 7 bits otherwise).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebit.tensor.packing import pack, packed_row_bytes, unpack


def words(n: int, bits: int) -> int:
    """32-bit words of one packed row of `n` codes."""
    return -(-n * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 [..., words] from uint8 codes [..., n], each below 2^bits."""
    rows, size = codes.reshape(-1, codes.shape[-1]), 4 * words(codes.shape[-1], bits)
    packed = pack(rows, bits)
    packed = nn.functional.pad(packed[:, :size], (0, max(0, size - packed.shape[1])))
    # (a slice of a single row is called contiguous, whatever its stride, and cannot be seen as words)
    return packed.reshape(-1).view(torch.int32).view(*codes.shape[:-1], size // 4)


def unpack_words(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_words`: uint8 codes [..., n] from int32 or uint32 [..., words]."""
    by, size = packed.reshape(-1, packed.shape[-1]).contiguous().view(torch.uint8), packed_row_bytes(n, bits)
    codes = unpack(nn.functional.pad(by[:, :size], (0, max(0, size - by.shape[1]))), bits, n)
    return codes.view(*packed.shape[:-1], n)


def pack_zero_points(zero_OG: Tensor, bits: int) -> Tensor:
    """int32 [..., words, groups] from uint8 zero points [..., out, groups]: packed along the outputs, as compressed-tensors has them."""
    return pack_words(zero_OG.mT.contiguous(), bits).mT.contiguous()


def unpack_zero_points(packed: Tensor, bits: int, out: int) -> Tensor:
    """The inverse of `pack_zero_points`: uint8 [..., out, groups]."""
    return unpack_words(packed.mT.contiguous(), bits, out).mT.contiguous()
