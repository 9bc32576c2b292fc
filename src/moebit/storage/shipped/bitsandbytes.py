"""bitsandbytes: 4 bits from a table of 16 numbers (nf4, fp4) with a scale per block, perhaps quantized itself; 8 bits per channel."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.documents import checked
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import floats
from moebit.storage.shipped.documents import BlockState
from moebit.storage.shipped.entries import Shipped, ShippedEntry, check_scales, gathered, missing, unfit

STATES = ("nf4", "fp4")
STATE_BYTES = 4096  # of the JSON beside a matrix; it takes some two hundred
CODES = 16
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
UNITS = 127.0  # of the largest magnitude in a row that is stored in 8 bits


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME uint8 with NAME.absmax, .quant_map and .quant_state.bitsandbytes__nf4 (or fp4), or X.weight int8 with X.SCB."""
    made: list[ShippedEntry] = []
    for name, codes in stored.items():
        if codes.dtype == torch.uint8:
            state = next((entry for kind in STATES if (entry := stored.get(f"{name}.quant_state.bitsandbytes__{kind}"))), None)
            if state is not None:
                made.append(_blocks(name, codes, state, stored))
            elif f"{name}.absmax" in stored:
                raise missing(codes, f"{name}.quant_state.bitsandbytes__nf4")
        elif codes.dtype == torch.int8 and name.endswith(".weight"):
            made.append(_channels(name, codes, stored))
    kinds = sorted({entry.kind if isinstance(entry, BlocksEntry) else "int8 per channel" for entry in made})
    return gathered("bitsandbytes", " and ".join(kinds), stored, made)


def _channels(name: str, codes: TensorEntry, stored: Mapping[str, TensorEntry]) -> ShippedEntry:
    """Rows of int8, each with the largest magnitude in it: weight = SCB / 127 * code."""
    owner = name.removesuffix("weight")
    if f"{owner}SCB" not in stored:
        raise missing(codes, f"{owner}SCB")
    scale, kind = stored[f"{owner}SCB"], stored.get(f"{owner}weight_format")
    if len(codes.shape) != 2 or scale.shape != codes.shape[:1] or scale.dtype not in TYPES.values():
        raise unfit(scale, f"the largest magnitude in each row of {list(codes.shape)}")
    if kind is not None and (kind.spec.nbytes != 1 or int(kind.read().view(torch.uint8)) != 0):
        raise BadInputError(f"tensor {kind.name!r} says that {name} is not stored in rows, the only form of 8 bits that moebit reads")
    return RowsOfBytes(name, torch.bfloat16, codes.shape, codes, scale, (kind,) if kind else ())


@dataclass(frozen=True)
class RowsOfBytes(ShippedEntry):
    """int8 [out, in] and the largest magnitude of every row, which 127 stands for."""

    scale: TensorEntry
    beside: tuple[TensorEntry, ...]

    @property
    def needed(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.scale)

    @property
    def further(self) -> tuple[TensorEntry, ...]:
        return self.beside

    def rows(self, start: int, stop: int) -> Tensor:
        largest = floats(self.scale.read(start, stop)).view(-1, 1)
        return self.codes.read(start, stop).float().mul_(largest).mul_(1 / UNITS)

    def check(self) -> None:
        check_scales(self.scale.name, floats(self.scale.read()), 128 / UNITS, self)


@dataclass(frozen=True)
class BlocksEntry(ShippedEntry):
    """A tensor of any shape whose values, one after the other, are codes of 4 bits in blocks that share a magnitude.

    Attributes:
        kind: of the table. table: the 16 numbers. magnitude: of every block.
        block: values in a block.
    """

    kind: str
    table: TensorEntry
    magnitude: Magnitudes
    block: int
    state: TensorEntry

    @property
    def needed(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.table, *self.magnitude.stored, self.state)

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        width = math.prod(self.shape[1:])
        first, last = start * width // 2, -(-(self.shape[0] if stop is None else stop) * width // 2)
        self.codes.expect(*((first, last) if self.codes.shape[0] != 1 else (0, 1)))

    def rows(self, start: int, stop: int) -> Tensor:
        width = math.prod(self.shape[1:])
        first, last = start * width, stop * width
        stored = self._bytes(first // 2, -(-last // 2))
        nibbles = torch.stack([stored >> 4, stored & 15], -1).flatten()[first % 2 :][: last - first]
        values = floats(self.table.read()).index_select(0, nibbles.int())
        begin = first // self.block
        magnitudes = self.magnitude.of(begin, -(-last // self.block))
        blocks = torch.arange(first, last) // self.block - begin
        return values.mul_(magnitudes[blocks]).view(stop - start, *self.shape[1:])

    def _bytes(self, start: int, stop: int) -> Tensor:
        """Bytes lie as [n, 1], in old versions as [1, n]."""
        if self.codes.shape[0] == 1:
            return self.codes.read().flatten()[start:stop]
        return self.codes.read(start, stop).flatten()

    def check(self) -> None:
        table = floats(self.table.read())
        check_scales(self.table.name, table, 1.0, self)
        name, blocks = self.magnitude.entry.name, -(-math.prod(self.shape) // self.block)
        check_scales(name, self.magnitude.of(0, blocks), float(table.abs().max()), self)


@dataclass(frozen=True)
class Magnitudes:
    """The magnitude of every block: float32, or bytes of a table with scales of their own (double quantization).

    Attributes:
        nested: (numbers of the 256 bytes, the magnitudes of blocks of them), block: bytes in such a block, offset: added to all.
    """

    entry: TensorEntry
    nested: tuple[TensorEntry, TensorEntry] | None = None
    block: int = 1
    offset: float = 0.0

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self.entry, *(self.nested or ()))

    def of(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start]."""
        if self.nested is None:
            return floats(self.entry.read(start, stop))
        table, scale = (floats(entry.read()) for entry in self.nested)
        codes = self.entry.read(start, stop).int()
        return table[codes] * scale[torch.arange(start, stop) // self.block] + self.offset


def _blocks(name: str, codes: TensorEntry, state: TensorEntry, stored: Mapping[str, TensorEntry]) -> BlocksEntry:
    said = _state(state)
    values = math.prod(said.shape)
    for part in ("absmax", "quant_map"):
        if f"{name}.{part}" not in stored:
            raise missing(codes, f"{name}.{part}")
    if math.prod(codes.shape) != -(-values // 2) or codes.shape not in ((math.prod(codes.shape), 1), (1, math.prod(codes.shape))):
        raise unfit(codes, f"the {-(-values // 2)} bytes of {said.shape} as {state.name!r} says")
    table, absmax = stored[f"{name}.quant_map"], stored[f"{name}.absmax"]
    if table.shape != (CODES,) or not table.dtype.is_floating_point:
        raise unfit(table, f"a table of {CODES} numbers")
    blocks = -(-values // said.blocksize)
    if absmax.shape != (blocks,):
        raise unfit(absmax, f"{blocks} magnitudes, one for every {said.blocksize} of {values} values")
    kind = f"{said.quant_type} blocks of {said.blocksize}"
    magnitude = _magnitudes(name, absmax, said, stored)
    return BlocksEntry(name, TYPES[said.dtype], tuple(said.shape), codes, kind, table, magnitude, said.blocksize, state)


def _magnitudes(name: str, absmax: TensorEntry, said: BlockState, stored: Mapping[str, TensorEntry]) -> Magnitudes:
    if absmax.dtype == torch.float32:
        return Magnitudes(absmax)
    for part in ("nested_absmax", "nested_quant_map"):
        if f"{name}.{part}" not in stored:
            raise missing(absmax, f"{name}.{part}")
    table, scale = stored[f"{name}.nested_quant_map"], stored[f"{name}.nested_absmax"]
    blocks = -(-absmax.shape[0] // said.nested_blocksize)
    if absmax.dtype != torch.uint8 or table.shape != (256,) or not table.dtype.is_floating_point:
        raise unfit(table, f"a table of 256 numbers for the bytes of {absmax.name!r}")
    if scale.shape != (blocks,) or not scale.dtype.is_floating_point:
        raise unfit(scale, f"{blocks} magnitudes, one for every {said.nested_blocksize} bytes of {absmax.name!r}")
    return Magnitudes(absmax, (table, scale), said.nested_blocksize, said.nested_offset)


def _state(entry: TensorEntry) -> BlockState:
    """What the JSON beside a matrix says.

    Raises:
        BadInputError: no such JSON.
    """
    if entry.dtype != torch.uint8 or not 2 <= entry.spec.nbytes <= STATE_BYTES:
        raise unfit(entry, "the bytes of a short JSON text")
    try:
        said = json.loads(bytes(entry.read().tolist()).decode("utf-8"))
    except ValueError as error:
        raise BadInputError(f"tensor {entry.name!r} holds no JSON ({error}); the checkpoint is damaged") from error
    return checked(BlockState, said, f"tensor {entry.name!r}", "the checkpoint is damaged")
