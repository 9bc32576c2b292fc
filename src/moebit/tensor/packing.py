"""Tight bit packing of codes: 2 to 8 bits, no padding bits inside a row.

A row is a little-endian bitstream: value i occupies bits [i*b, (i+1)*b), the least significant bit first. Rows are padded with
zeros to a multiple of 8 values, so that eight values fill exactly b bytes and a row never shares a byte with the next.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_row_bytes(n: int, bits: int) -> int:
    """Bytes of one packed row of `n` codes."""
    return -(-n // 8) * bits


def pack(codes_RN: Tensor, bits: int) -> Tensor:
    """Pack rows of codes.

    Args:
        codes_RN: uint8 [R, N], every value below 2^bits.
        bits: 2 … 8.

    Returns:
        uint8 [R, ceil(N/8) * bits].

    Raises:
        ValueError: a code that does not fit.
    """
    _check(bits)
    rows, n = codes_RN.shape
    if codes_RN.numel() and int(codes_RN.max()) >> bits:
        raise ValueError(f"code {int(codes_RN.max())} does not fit into {bits} bits")
    if bits == 8:
        return torch.nn.functional.pad(codes_RN, (0, -n % 8)).contiguous()
    if bits in (2, 4):  # whole codes per byte: no need for 64-bit words
        whole = torch.nn.functional.pad(codes_RN, (0, -n % 8)).view(rows, packed_row_bytes(n, bits), 8 // bits)
        packed = whole[..., 0].clone()
        for position in range(1, 8 // bits):
            packed |= whole[..., position] << (position * bits)
        return packed
    eights = torch.nn.functional.pad(codes_RN, (0, -n % 8)).view(rows, -(-n // 8), 8).to(torch.int64)
    word: Tensor = (eights << (torch.arange(8, device=codes_RN.device) * bits)).sum(-1, keepdim=True)
    by: Tensor = (word >> (torch.arange(bits, device=codes_RN.device) * 8)) & 0xFF
    return by.to(torch.uint8).view(rows, packed_row_bytes(n, bits))


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [R, n] codes from uint8 [R, ceil(n/8) * bits].

    Raises:
        ValueError: the row length does not belong to `n` codes of that width.
    """
    _check(bits)
    rows = packed.shape[0]
    if packed.shape[1] != packed_row_bytes(n, bits):
        raise ValueError(f"rows of {packed.shape[1]} bytes cannot hold {n} codes of {bits} bits ({packed_row_bytes(n, bits)} bytes)")
    if bits == 8:
        return packed[:, :n].contiguous()
    if bits in (2, 4):  # whole codes per byte: no need for 64-bit words
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(1)[:, :n].contiguous()
    by = packed.view(rows, -(-n // 8), bits).to(torch.int64)
    word: Tensor = (by << (torch.arange(bits, device=packed.device) * 8)).sum(-1, keepdim=True)
    eights: Tensor = (word >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)
    return eights.to(torch.uint8).flatten(1)[:, :n].contiguous()


def _check(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bit width must lie between 2 and 8, got {bits}")
