"""GPTQ's checkpoint layout of one matrix, as AutoGPTQ and GPTQModel write it:

    qweight int32 [in * bits / 32, out]       codes, packed along the inputs, the least significant bit first
    qzeros  int32 [groups, out * bits / 32]   zero points, packed along the outputs in the same way
    scales  float16 [groups, out]
    g_idx   int32 [in]                        the group of every input channel; without `desc_act`, i // group_size

weight[o, i] = scales[g, o] * (code[o, i] - zero[g, o]). Version 1 (`checkpoint_format: gptq`) stores zero - 1, so that it has zero points
from 1 to 2^bits; version 2 (`gptq_v2`) stores zero. Widths are 2, 3, 4 and 8 bits; 32 codes of 3 bits fill three words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.tensor.layouts.words import pack_words, unpack_words

BITS = (2, 3, 4, 8)
MULTIPLE = 32  # of codes that a packed axis has: 32 codes fill whole words at every width


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """`qweight`, int32 [..., in * bits / 32, out], from uint8 codes [..., out, in].

    Raises:
        ValueError: inputs that do not fill whole words.
    """
    _check(codes_OI.shape[-1], bits, "input")
    return pack_words(codes_OI, bits).mT.contiguous()


def unpack_codes(qweight: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 codes [..., out, in]."""
    return unpack_words(qweight.mT.contiguous(), bits, qweight.shape[-2] * 32 // bits)


def pack_zeros(zero_OG: Tensor, bits: int, *, version: int = 1) -> Tensor:
    """`qzeros`, int32 [..., groups, out * bits / 32], from zero points [..., out, groups].

    Raises:
        ValueError: outputs that do not fill whole words, or a zero point that the version does not have.
    """
    _check(zero_OG.shape[-2], bits, "output")
    stored = zero_OG.to(torch.int32) - int(version == 1)
    if stored.numel() and (int(stored.min()) < 0 or int(stored.max()) >= 2**bits):
        least = int(version == 1)
        raise ValueError(
            f"zero points from {int(zero_OG.min())} to {int(zero_OG.max())}: version {version} of the GPTQ layout has those from {least} "
            f"to {2**bits - 1 + least}"
        )
    return pack_words(stored.mT.to(torch.uint8).contiguous(), bits)


def unpack_zeros(qzeros: Tensor, bits: int, *, version: int = 1) -> Tensor:
    """The inverse of `pack_zeros`: int32 zero points [..., out, groups]."""
    stored = unpack_words(qzeros, bits, qzeros.shape[-1] * 32 // bits)
    return stored.mT.contiguous().to(torch.int32) + int(version == 1)


def group_index(inputs: int, group_size: int) -> Tensor:
    """`g_idx` of a matrix without `desc_act`: int32 [in], the group of every input channel; -1 is one group for the whole row."""
    width = inputs if group_size == -1 else group_size
    return torch.arange(inputs, dtype=torch.int32) // width


def _check(n: int, bits: int, what: str) -> None:
    if bits not in BITS:
        raise ValueError(f"the GPTQ layout has {', '.join(map(str, BITS))} bits, not {bits}")
    if n * bits % 32:
        raise ValueError(f"{n} {what} channels of {bits} bits do not fill 32-bit words")
