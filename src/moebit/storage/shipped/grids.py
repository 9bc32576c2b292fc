"""Matrices whose codes lie in rows, beside a grid of scales: weight = scale * (code - zero point), the product taken in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import Decode, e8m0, floats
from moebit.storage.shipped.entries import ShippedEntry, check_scales, missing, short, unfit, wrong_shape

ACTIVATION_PARTS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "k_scale",
    "v_scale",
)


@dataclass(frozen=True)
class Shared:
    """One further number for a whole matrix, by which its numbers are multiplied or divided (NVFP4's global scale).

    Attributes:
        entry: float32, one number or one for each matrix of a stack. unit: what it is divided by first.
    """

    entry: TensorEntry
    divides: bool
    unit: float = 1.0

    def on(self, numbers: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The numbers [n, ..], or those of matrices [start, stop) of a stack, with it."""
        stored = self.entry.read() if self.entry.spec.nbytes == self.entry.dtype.itemsize else self.entry.read(start, stop)
        factor = (stored.float() / self.unit).reshape(-1, *(1,) * (numbers.ndim - 1))
        return numbers / factor if self.divides else numbers * factor


@dataclass(frozen=True)
class Grid:
    """Numbers (scales, zero points) of which each stands for a block of a matrix.

    Attributes:
        shape: (rows, columns) of numbers for one matrix. block: rows and columns of the matrix that a number stands for.
        decode: stored numbers to float32, rows in their order. per_row: rows of numbers in `unit` stored rows.
        shared: a further factor of all of them.
    """

    entry: TensorEntry
    shape: tuple[int, int]
    block: tuple[int, int]
    decode: Decode
    per_row: int = 1
    unit: int = 1
    shared: Shared | None = None

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self.entry, *((self.shared.entry,) if self.shared else ()))

    def of_rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, columns]: the numbers of a matrix's rows."""
        first, last = start // self.block[0] // self.per_row, (stop - 1) // self.block[0] // self.per_row
        if self.shape[0] == 1:  # perhaps a scalar
            first, stored = 0, self.entry.read()
        else:
            stored = self.entry.read(first * self.unit, min((last + 1) * self.unit, self.entry.shape[0]))
        rows = torch.arange(start, stop) // self.block[0] - first * self.per_row
        numbers = self.decode(stored).reshape(-1, self.shape[1])[rows]
        return self.shared.on(numbers) if self.shared else numbers

    def of_matrices(self, start: int, stop: int, rows: int) -> Tensor:
        """float32 [stop - start, rows, columns]: the numbers of every row of some matrices of a stack."""
        numbers = self.decode(self.entry.read(start, stop)).reshape(stop - start, *self.shape)
        numbers = self.shared.on(numbers, start, stop) if self.shared else numbers
        return numbers[:, torch.arange(rows) // self.block[0]]

    def all(self) -> Tensor:
        numbers = self.decode(self.entry.read())
        if self.shared is None:
            return numbers
        matrices = self.shape[0] * self.shape[1]
        return self.shared.on(numbers.reshape(-1, matrices))


@dataclass(frozen=True)
class Order:
    """Which group of scales each column belongs to, where groups are scattered: int32 [in], or -1 where they are not."""

    entry: TensorEntry
    size: int

    def of_columns(self, groups: int) -> Tensor:
        """int64 [in].

        Raises:
            BadInputError: numbers that are no groups.
        """
        found = self.entry.read().long()
        if bool((found == -1).any()):
            return torch.arange(len(found)) // self.size
        if bool(((found < 0) | (found >= groups)).any()):
            raise BadInputError(f"tensor {self.entry.name!r} names a group outside of the {groups} there are; the checkpoint is damaged")
        return found


@dataclass(frozen=True)
class RowsEntry(ShippedEntry):
    """A matrix or a stack of matrices whose rows can be read one by one.

    Attributes:
        decode: stored rows to float32 rows [n, in] or [n, out, in].
        scale: what codes are multiplied with. zero: what is taken off before that.
        offset: what is added after that.
        largest: no code (less its zero point) is beyond it.
        order: the group of every column, where they are scattered.
    """

    decode: Decode
    scale: Grid
    largest: float
    zero: Grid | None = None
    offset: Grid | None = None
    order: Order | None = None
    turned: bool = False
    beside: tuple[TensorEntry, ...] = ()

    @property
    def transposed(self) -> bool:
        return self.turned

    @property
    def further(self) -> tuple[TensorEntry, ...]:
        return self.beside

    @property
    def needed(self) -> tuple[TensorEntry, ...]:
        grids = [grid for grid in (self.scale, self.zero, self.offset) if grid is not None]
        return (self.codes, *(part for grid in grids for part in grid.stored), *((self.order.entry,) if self.order else ()))

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.decode(self.codes.read(start, stop))
        columns = self.order.of_columns(self.scale.shape[1]) if self.order else None
        for grid, operation in ((self.zero, torch.Tensor.sub_), (self.scale, torch.Tensor.mul_), (self.offset, torch.Tensor.add_)):
            if grid is None:
                continue
            numbers = grid.of_rows(start, stop) if values.ndim == 2 else grid.of_matrices(start, stop, values.shape[1])
            if columns is None:
                _apply(values, operation, numbers, grid.block[1])
            else:
                operation(values, numbers[..., columns])
        return values

    def check(self) -> None:
        check_scales(self.scale.entry.name, self.scale.all(), self.largest, self)
        if self.offset:
            check_scales(self.offset.entry.name, self.offset.all(), 1.0, self)
        if self.order:
            self.order.of_columns(self.scale.shape[1])


def _apply(values: Tensor, operation: Callable[[Tensor, Tensor], Tensor], numbers: Tensor, width: int) -> None:
    """Apply an operation in place to every `width` columns of [..., in] and their number; the last block may be narrower."""
    whole = values.shape[-1] // width
    if whole:
        operation(values[..., : whole * width].unflatten(-1, (whole, width)), numbers[..., :whole, None])
    if values.shape[-1] % width:
        operation(values[..., whole * width :], numbers[..., whole:])


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
    shared: Shared | None = None,
    order: Order | None = None,
) -> RowsEntry:
    shape = codes.shape if shape is None else shape
    grid = grid_of(scale, shape, block, scale_decode(scale), shared)
    largest = torch.finfo(codes.dtype).max if largest is None else largest
    return RowsEntry(name, plain_type(scale), shape, codes, decode or floats, grid, largest, zero=zero, order=order, beside=further)


def scale_decode(scale: TensorEntry) -> Decode:
    """How stored scales become numbers: whole bytes are exponents of two.

    Raises:
        BadInputError: no type of scales.
    """
    exponents = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if not exponents and not scale.dtype.is_floating_point:
        raise BadInputError(f"tensor {scale.name!r} is {short(scale.dtype)}, expected scales; download the checkpoint again")
    return e8m0 if exponents else floats


def plain_type(scale: TensorEntry) -> torch.dtype:
    """The type that weights are read in: whoever wrote float16 scales computes in float16, which holds more digits."""
    return torch.float16 if scale.dtype == torch.float16 else torch.bfloat16


def grid_of(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int], decode: Decode, shared: Shared | None = None) -> Grid:
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
    return Grid(entry, (rows, columns), block, decode, shared=shared)


def shared_of(codes: TensorEntry, name: str, stored: Mapping[str, TensorEntry], divides: bool, unit: float = 1.0) -> Shared:
    """The global scale of a matrix, or of each matrix of a stack.

    Raises:
        BadInputError: it is not there, or of a shape that does not fit.
    """
    if name not in stored:
        raise missing(codes, name)
    entry, count = stored[name], math.prod(stored[name].shape)
    matrices = codes.shape[0] if len(codes.shape) == 3 else 1
    if entry.dtype != torch.float32 or count not in (1, matrices) or (count > 1 and entry.shape[0] != count):
        raise unfit(entry, f"one float32 for each of {matrices} matrices" if matrices > 1 else "one float32")
    return Shared(entry, divides, unit)


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
