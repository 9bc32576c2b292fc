"""FP4 (e2m1) numbers in bytes: compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized`, ModelOpt, and MLX's words.

A byte holds two numbers, the one of the lower channel in its low nibble. A nibble is a sign (8) and the position of the magnitude in
0, 0.5, 1, 1.5, 2, 3, 4, 6. Codes here are positions in the table of 15 levels from -6 to 6, zero being 7; minus zero is never written.
Source: OCP Microscaling Formats 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.tensor.packing import pack, unpack

NIBBLES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)  # of the codes 0 to 14
CODES = (7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0)  # of the nibbles; 8 is minus zero


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [..., n / 2] from codes of levels [..., n].

    Raises:
        ValueError: an odd number of them.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} numbers of four bits do not fill whole bytes")
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8, device=codes.device)[codes.long()]
    packed = pack(nibbles.reshape(-1, codes.shape[-1]), 4)[:, : codes.shape[-1] // 2]
    return packed.reshape(*codes.shape[:-1], -1).contiguous()


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: uint8 codes of levels [..., n]."""
    n = 2 * packed.shape[-1]
    rows = packed.reshape(-1, packed.shape[-1])
    nibbles = unpack(torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)), 4, n)
    codes: Tensor = torch.tensor(CODES, dtype=torch.uint8, device=packed.device)[nibbles.long()]
    return codes.view(*packed.shape[:-1], n)
