"""MLX's layout of one matrix or stack of them.

    weight  uint32 [..., out, in * bits / 32]   codes, the least significant bit first; codes may cross words
    scales  [..., out, groups]                  affine: floating-point; mxfp4, nvfp4: uint8 bytes of e8m0 or e4m3 numbers
    biases  [..., out, groups]                  affine only

affine: weight = scales * code + biases with groups of 32, 64 or 128 and 2, 3, 4, 5, 6 or 8 bits. mxfp4 (groups of 32) and nvfp4 (groups of
16) hold e2m1 numbers, a nibble each. Source: mlx.core.quantize's documentation and mlx_lm/utils.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.tensor.layouts.words import pack_words, unpack_words

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """`weight`, uint32 [..., out, in * bits / 32], from uint8 codes [..., out, in].

    Raises:
        ValueError: a width that MLX does not have, inputs that do not fill whole words.
    """
    if bits not in BITS or codes_OI.shape[-1] * bits % 32:
        raise ValueError(f"{codes_OI.shape[-1]} codes of {bits} bits: MLX has {', '.join(map(str, BITS))} bits and rows of whole words")
    return pack_words(codes_OI, bits).view(torch.uint32)


def unpack_codes(weight: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 codes [..., out, in]."""
    return unpack_words(weight.view(torch.int32), bits, weight.shape[-1] * 32 // bits)
