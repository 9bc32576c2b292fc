"""AWQ's checkpoint layout of one matrix, `version: gemm`, 4 bits, as AutoAWQ writes it:

    qweight int32 [in, out / 8]       codes, eight outputs a word
    qzeros  int32 [groups, out / 8]   zero points, in the same way
    scales  float16 [groups, out]

weight[o, i] = scales[g, o] * (code[o, i] - zero[g, o]). Nibble n of a word, the lowest first, holds output 8 w + ORDER[n] of word w.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble holds
PLACES = tuple(ORDER.index(output) for output in range(len(ORDER)))


def pack_outputs(values_ON: Tensor) -> Tensor:
    """int32 [..., n, out / 8] from uint8 values below 16 [..., out, n]: `qweight` from codes, `qzeros` from zero points.

    Raises:
        ValueError: outputs that eight does not divide, a value above 15.
    """
    if values_ON.shape[-2] % len(ORDER):
        raise ValueError(f"{values_ON.shape[-2]} output channels do not fill words of {len(ORDER)}")
    if values_ON.numel() and int(values_ON.max()) >> BITS:
        raise ValueError(f"value {int(values_ON.max())} does not fit into {BITS} bits")
    eights = values_ON.mT.unflatten(-1, (-1, len(ORDER)))[..., list(ORDER)]
    pairs: Tensor = eights[..., 0::2] | eights[..., 1::2] << BITS
    return pairs.contiguous().view(torch.int32).squeeze(-1)


def unpack_outputs(packed: Tensor) -> Tensor:
    """The inverse of `pack_outputs`: uint8 [..., out, n]."""
    by = packed.contiguous().unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack([by & 15, by >> BITS], -1).flatten(-2)
    return nibbles[..., list(PLACES)].flatten(-2).mT.contiguous()
