"""The bytes of ggml's blocks: fields of a block to bytes and back.

A block type is a tuple of parts in the order of their bytes. A part writes one field (`put`) or a few bits of it, and reads what it wrote
(`take`); fields whose bits lie in several parts are the sum of what the parts read. Fields are uint8 (or float16) tensors [N, n], one row
per block, and hold unsigned numbers: a signed scale is stored as the format stores it, and the grid knows its zero.

Specification: `ggml-common.h` (the order of the fields) and `dequantize_row_*` in `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

Fields = dict[str, Tensor]


def weave(values: Tensor, bits: int, stride: int) -> Tensor:
    """Put 8 / bits values into each byte, neighbours in a byte `stride` values apart, the first in the lowest bits.

    Args:
        values: uint8 [N, n], each below 2^bits; n a multiple of stride * 8 / bits.

    Returns:
        uint8 [N, n * bits / 8].
    """
    apart = values.unflatten(-1, (-1, 8 // bits, stride))
    result: Tensor = apart[:, :, 0].clone()
    for position in range(1, 8 // bits):
        result |= apart[:, :, position] << (position * bits)
    return result.flatten(1)


def unweave(packed: Tensor, bits: int, stride: int) -> Tensor:
    """The inverse of `weave`: uint8 [N, n] from uint8 [N, n * bits / 8]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    apart: Tensor = (packed.unflatten(-1, (-1, 1, stride)) >> shifts[:, None]) & (2**bits - 1)
    return apart.flatten(1)


class Part(ABC):
    """Some bytes of a block."""

    size: int

    @abstractmethod
    def put(self, fields: Fields) -> Tensor:
        """uint8 [N, size] bytes of the fields."""

    @abstractmethod
    def take(self, packed: Tensor) -> Fields:
        """What these bytes, uint8 [N, size], say about the fields."""


@dataclass(frozen=True)
class Half(Part):
    """One float16 number, little-endian."""

    field: str
    size: int = 2

    def put(self, fields: Fields) -> Tensor:
        return fields[self.field].contiguous().view(torch.uint8)

    def take(self, packed: Tensor) -> Fields:
        return {self.field: packed.contiguous().view(torch.float16)}


@dataclass(frozen=True)
class Whole(Part):
    """Numbers of one byte each; `flip` 0x80 where the format has signed bytes."""

    field: str
    size: int
    flip: int = 0

    def put(self, fields: Fields) -> Tensor:
        return fields[self.field] ^ self.flip

    def take(self, packed: Tensor) -> Fields:
        return {self.field: packed ^ self.flip}


@dataclass(frozen=True)
class Woven(Part):
    """The bits `shift` … `shift + bits - 1` of every number of a field, woven (`weave`)."""

    field: str
    size: int
    bits: int
    stride: int
    shift: int = 0

    def put(self, fields: Fields) -> Tensor:
        return weave((fields[self.field] >> self.shift) & (2**self.bits - 1), self.bits, self.stride)

    def take(self, packed: Tensor) -> Fields:
        return {self.field: unweave(packed, self.bits, self.stride) << self.shift}


@dataclass(frozen=True)
class ScalesAndMins4(Part):
    """Q2_K: 16 scales in the low and 16 mins in the high halves of bytes."""

    size: int = 16

    def put(self, fields: Fields) -> Tensor:
        return fields["scale"] | fields["minimum"] << 4

    def take(self, packed: Tensor) -> Fields:
        return {"scale": packed & 15, "minimum": packed >> 4}


@dataclass(frozen=True)
class ScalesAndMins6(Part):
    """Q4_K and Q5_K: 8 scales and 8 mins of 6 bits. The first four of each have bytes of their own, and hold the top bits of the others."""

    size: int = 12

    def put(self, fields: Fields) -> Tensor:
        (s0, s1), (m0, m1) = (fields[name].split(4, -1) for name in ("scale", "minimum"))
        return torch.cat([s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, (s1 & 15) | (m1 & 15) << 4], -1)

    def take(self, packed: Tensor) -> Fields:
        a, b, c = packed.split(4, -1)
        scale = torch.cat([a & 63, (c & 15) | a >> 6 << 4], -1)
        return {"scale": scale, "minimum": torch.cat([b & 63, c >> 4 | b >> 6 << 4], -1)}


@dataclass(frozen=True)
class Layout:
    """A block type.

    Attributes:
        width: weights of a block.
        parts: what the block consists of, in the order of its bytes.
    """

    width: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(part.size for part in self.parts)

    def pack(self, fields: Fields) -> Tensor:
        """uint8 [N, size] from the fields, each [N, n]."""
        return torch.cat([part.put(fields) for part in self.parts], -1)

    def unpack(self, packed: Tensor) -> Fields:
        """The inverse of `pack`."""
        fields: Fields = {}
        for part, piece in zip(self.parts, packed.split([part.size for part in self.parts], -1), strict=True):
            for name, value in part.take(piece).items():
                fields[name] = fields[name] | value if name in fields else value
        return fields


_D, _M, _DMIN = Half("d"), Half("m"), Half("dmin")
_NIBBLES, _FIFTH_BITS = Woven("codes", 16, 4, 16), Woven("codes", 4, 1, 1, 4)  # of 32 weights
_PAIRS, _SUPER_NIBBLES = Woven("codes", 64, 2, 32), Woven("codes", 128, 4, 32)  # of 256 weights

# By ggml's name in small letters.
LAYOUTS: dict[str, Layout] = {
    "q4_0": Layout(32, (_D, _NIBBLES)),
    "q4_1": Layout(32, (_D, _M, _NIBBLES)),
    "q5_0": Layout(32, (_D, _FIFTH_BITS, _NIBBLES)),
    "q5_1": Layout(32, (_D, _M, _FIFTH_BITS, _NIBBLES)),
    "q8_0": Layout(32, (_D, Whole("codes", 32, 0x80))),
    "q2_0": Layout(64, (_D, Woven("codes", 16, 2, 1))),
    "q2_k": Layout(256, (ScalesAndMins4(), _PAIRS, _D, _DMIN)),
    "q3_k": Layout(256, (Woven("codes", 32, 1, 32, 2), _PAIRS, Woven("scale", 8, 4, 8), Woven("scale", 4, 2, 4, 4), _D)),
    "q4_k": Layout(256, (_D, _DMIN, ScalesAndMins6(), _SUPER_NIBBLES)),
    "q5_k": Layout(256, (_D, _DMIN, ScalesAndMins6(), Woven("codes", 32, 1, 32, 4), _SUPER_NIBBLES)),
    "q6_k": Layout(256, (Woven("codes", 128, 4, 64), Woven("codes", 64, 2, 32, 4), Whole("scale", 16, 0x80), _D)),
    "iq4_nl": Layout(32, (_D, _NIBBLES)),
    "iq4_xs": Layout(256, (_D, Woven("scale", 2, 2, 1, 4), Woven("scale", 4, 4, 1), Woven("codes", 128, 4, 16))),
    "mxfp4": Layout(32, (Whole("exponent", 1), _NIBBLES)),
    "nvfp4": Layout(64, (Whole("scale", 4), Woven("codes", 32, 4, 8))),
}
