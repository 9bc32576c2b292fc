"""Quantized matrices under the names and shapes that they would have plain: what every adapter makes.

Every format is codes and a grid of scales: weight = scale * (code - zero point), the product taken in float32 and rounded once. The rows
that are asked for are dequantized when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import PIECE_BYTES, Entry, TensorEntry, TensorSpec
from moebit.storage.shipped.decode import Decode, e8m0, floats

ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")


@dataclass(frozen=True)
class Grid:
    """Numbers (scales, zero points) of which each stands for a block of a matrix.

    Attributes:
        shape: (rows, columns) of numbers for one matrix. block: rows and columns of the matrix that a number stands for.
        decode: stored numbers to float32, rows in their order. per_row: rows of numbers in one stored row.
    """

    entry: TensorEntry
    shape: tuple[int, int]
    block: tuple[int, int]
    decode: Decode
    per_row: int = 1

    def of_rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, columns]: the numbers of a matrix's rows."""
        first, last = start // self.block[0] // self.per_row, (stop - 1) // self.block[0] // self.per_row
        if self.shape[0] == 1:  # perhaps a scalar
            first, stored = 0, self.entry.read()
        else:
            stored = self.entry.read(first, last + 1)
        rows = torch.arange(start, stop) // self.block[0] - first * self.per_row
        return self.decode(stored).reshape(-1, self.shape[1])[rows]

    def of_matrices(self, start: int, stop: int, rows: int) -> Tensor:
        """float32 [stop - start, rows, columns]: the numbers of every row of some matrices of a stack."""
        numbers = self.decode(self.entry.read(start, stop)).reshape(stop - start, *self.shape)
        return numbers[:, torch.arange(rows) // self.block[0]]

    def all(self) -> Tensor:
        return self.decode(self.entry.read())


@dataclass(frozen=True)
class ShippedEntry:
    """A matrix [out, in] or a stack of them [E, out, in] that is stored quantized, under the name and in the shape it would have plain.

    Attributes:
        dtype: what `read` gives. shape: rows first; [E, in, out] where `transposed`.
        codes: as stored. decode: stored rows to float32 rows [n, in] or [n, out, in].
        largest: no code (less its zero point) is beyond it.
        further: stored tensors that belong to it and are not needed to read it (a copy of the shape, scales of activations).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    codes: TensorEntry
    decode: Decode
    scale: Grid
    largest: float
    zero: Grid | None = None
    transposed: bool = False
    further: tuple[TensorEntry, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The stored tensors behind it."""
        return (self.codes, self.scale.entry, *((self.zero.entry,) if self.zero else ()), *self.further)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(entry.spec.nbytes for entry in self.stored if entry not in self.further)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis (all by default), dequantized; reads their codes and scales and no others.

        Where `transposed`, the result is a view of [n, out, in], as whoever solves matrices wants them.

        Raises:
            BadInputError: a file changed underneath or ends early.
        """
        stop = self.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.name}: rows {start} to {stop} of {self.shape[0]}")
        matrices = (self.shape[2], self.shape[1]) if self.transposed else self.shape[1:]
        result = torch.empty(stop - start, *matrices, dtype=self.dtype)
        step = max(1, PIECE_BYTES // (4 * max(1, math.prod(matrices))))
        for low in range(start, stop, step):
            high = min(low + step, stop)
            result[low - start : high - start] = self._rows(low, high)
        return result.transpose(1, 2) if self.transposed else result

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read the codes of these rows ahead."""
        self.codes.expect(start, stop)

    def _rows(self, start: int, stop: int) -> Tensor:
        values = self.decode(self.codes.read(start, stop))
        if self.zero:
            _apply(values, torch.Tensor.sub_, self._numbers(self.zero, values, start, stop), self.zero.block[1])
        _apply(values, torch.Tensor.mul_, self._numbers(self.scale, values, start, stop), self.scale.block[1])
        return values

    @staticmethod
    def _numbers(grid: Grid, values: Tensor, start: int, stop: int) -> Tensor:
        return grid.of_rows(start, stop) if values.ndim == 2 else grid.of_matrices(start, stop, values.shape[1])


def _apply(values: Tensor, operation: Callable[[Tensor, Tensor], Tensor], numbers: Tensor, width: int) -> None:
    """Apply an operation in place to every `width` columns of [..., in] and their number; the last block may be narrower."""
    whole = values.shape[-1] // width
    if whole:
        operation(values[..., : whole * width].unflatten(-1, (whole, width)), numbers[..., :whole, None])
    if values.shape[-1] % width:
        operation(values[..., whole * width :], numbers[..., whole:])


@dataclass(frozen=True)
class Shipped:
    """What a checkpoint that is shipped quantized reads like.

    Attributes:
        method: its `quant_method`. scheme: in words. entries: every tensor under its plain name.
    """

    method: str
    scheme: str
    entries: dict[str, Entry]

    @property
    def quantized(self) -> list[ShippedEntry]:
        return [entry for entry in self.entries.values() if isinstance(entry, ShippedEntry)]

    @property
    def average_bits(self) -> float:
        """8 x bytes of codes, scales and zero points / number of weights they stand for."""
        return 8 * sum(entry.nbytes for entry in self.quantized) / sum(math.prod(entry.shape) for entry in self.quantized)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        unread = sum(not _is_shape(e) for entry in self.quantized for e in entry.further)
        return {
            "method": self.method,
            "scheme": self.scheme,
            "read_as": " and ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in self.quantized})),
            "tensors": len(self.quantized),
            "average_bits": self.average_bits,
            "activation_scales_left_out": unread,
        }


def gathered(method: str, scheme: str, stored: Mapping[str, TensorEntry], made: list[ShippedEntry]) -> Shipped:
    consumed = {part.name for entry in made for part in entry.stored}
    entries: dict[str, Entry] = {name: entry for name, entry in stored.items() if name not in consumed}
    for entry in made:
        if entry.name in entries:
            raise BadInputError(
                f"tensor {entry.name!r} is stored both plain and quantized ({entry.codes.name!r}); download the checkpoint again"
            )
        entries[entry.name] = entry
    return Shipped(method, scheme, entries)


class UnreadableError(Exception):
    """Why a scheme cannot be read."""


def check_shipped(entries: Iterable[Entry]) -> None:
    """Read every scale of what is quantized: no NaN, and no product that the plain type cannot hold; and every copy of a shape.

    Raises:
        BadInputError: naming the tensor.
    """
    for entry in entries:
        if not isinstance(entry, ShippedEntry):
            continue
        scale = entry.scale.all()
        if not bool(torch.isfinite(scale).all()):
            raise BadInputError(f"tensor {entry.scale.entry.name!r} holds a scale that is no finite number; the checkpoint is damaged")
        if scale.numel() and float(scale.abs().max()) * entry.largest > torch.finfo(entry.dtype).max:
            raise BadInputError(
                f"tensor {entry.scale.entry.name!r} holds the scale {float(scale.abs().max()):g}, with which {entry.name} would overflow "
                f"{short(entry.dtype)}; the checkpoint is damaged"
            )
        for copy in filter(_is_shape, entry.further):
            says = copy.read().tolist()
            if says != list(entry.shape):
                raise BadInputError(
                    f"tensor {copy.name!r} holds {says}, {entry.codes.name!r} is {list(entry.shape)}; the checkpoint is damaged"
                )


def plain_entry(
    name: str,
    codes: TensorEntry,
    scale: TensorEntry,
    block: tuple[int, int],
    shape: tuple[int, ...] | None = None,
    decode: Decode | None = None,
    zero: Grid | None = None,
    further: tuple[TensorEntry, ...] = (),
    largest: float | None = None,
) -> ShippedEntry:
    shape = codes.shape if shape is None else shape
    exponents = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if not exponents and not scale.dtype.is_floating_point:
        raise BadInputError(f"tensor {scale.name!r} is {short(scale.dtype)}, expected scales; download the checkpoint again")
    grid = grid_of(scale, shape, block, e8m0 if exponents else floats)
    # Whoever wrote float16 scales computes in float16, which holds more digits.
    dtype = torch.float16 if scale.dtype == torch.float16 else torch.bfloat16
    return ShippedEntry(
        name, dtype, shape, codes, decode or floats, grid, largest or torch.finfo(codes.dtype).max, zero=zero, further=further
    )


def grid_of(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int], decode: Decode) -> Grid:
    """The numbers of a matrix or stack in blocks; axes of one number may be left out.

    Raises:
        BadInputError: not as many of them as there are blocks.
    """
    stack, rows, columns = shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    known = [(*stack, rows, columns)]
    known += [(*stack, rows)] if columns == 1 else []
    known += [stack, (*stack, 1)] if rows == columns == 1 else []
    if entry.shape not in known:
        raise wrong_shape(entry, shape, block, known[0])
    return Grid(entry, (rows, columns), block, decode)


def derived_block(codes: TensorEntry, scale: TensorEntry) -> tuple[int, int]:
    """What a scale stands for where no block size is declared: a tensor, a channel, an even part."""
    (*stack, out, inputs), grid = codes.shape, (1, 1)
    if len(scale.shape) == len(codes.shape):
        grid = (scale.shape[-2], scale.shape[-1])
    elif len(scale.shape) == len(stack) + 1:
        grid = (scale.shape[-1], 1)
    if 0 in grid or out % grid[0] or inputs % grid[1]:
        raise wrong_shape(scale, codes.shape, (out, inputs), (*stack, 1, 1))
    return out // grid[0], inputs // grid[1]


def activation_parts(name: str, stored: Mapping[str, TensorEntry]) -> tuple[TensorEntry, ...]:
    """Scales of the activations that a quantized weight is multiplied with: of no use once it is plain."""
    owner = name.removesuffix("weight")
    names = [f"{owner}{part}" for part in ACTIVATION_PARTS] if name.endswith(".weight") else [f"{name}_activation_scale"]
    return tuple(stored[part] for part in names if part in stored)


def _is_shape(entry: TensorEntry) -> bool:
    return entry.name.endswith("weight_shape")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def missing(codes: TensorEntry, name: str) -> BadInputError:
    return BadInputError(
        f"tensor {name!r} is missing, without which {codes.name!r} ({short(codes.dtype)}) cannot be read; "
        "is a shard missing? Download the checkpoint again"
    )


def wrong_shape(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int], wanted: tuple[int, ...]) -> BadInputError:
    return BadInputError(
        f"tensor {entry.name!r} has shape {list(entry.shape)}, a weight of {list(shape)} in blocks of {block[0]}x{block[1]} needs "
        f"{list(wanted)}; config.json and weights do not belong together: download the checkpoint again"
    )
