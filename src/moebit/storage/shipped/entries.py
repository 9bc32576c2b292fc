"""Quantized matrices under the names and shapes that they would have plain: what every adapter makes.

The rows that are asked for are dequantized when they are asked for: computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import PIECE_BYTES, Entry, TensorEntry, TensorSpec

SHAPES = ("weight_shape",)  # what a copy of a shape is called


@dataclass(frozen=True)
class ShippedEntry(ABC):
    """A matrix [out, in] or a stack of them [E, out, in] that is stored quantized, under the name and in the shape it would have plain.

    Attributes:
        dtype: what `read` gives. shape: rows first; [E, in, out] where `transposed`.
        codes: as stored.
        further: stored tensors that belong to it and are not needed to read it (a copy of the shape, scales of activations).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    codes: TensorEntry

    @property
    def further(self) -> tuple[TensorEntry, ...]:
        return ()

    @property
    def transposed(self) -> bool:
        return False

    @property
    def is_quantized(self) -> bool:
        """Whether its values have been rounded to fewer than 16 bits."""
        return True

    @property
    @abstractmethod
    def needed(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it is computed from: codes, scales, zero points and the like."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first axis in float32; [stop - start, out, in] where the result is to be transposed."""

    @abstractmethod
    def check(self) -> None:
        """Read every scale: each is a finite number, and no product with it is beyond what the plain type holds.

        Raises:
            BadInputError: naming the tensor.
        """

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The stored tensors behind it."""
        return (*self.needed, *self.further)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(entry.spec.nbytes for entry in self.needed)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis (all by default), dequantized; reads what belongs to them, as far as it lies apart.

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
            result[low - start : high - start] = self.rows(low, high)
        return result.transpose(1, 2) if self.transposed else result

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read the codes of these rows ahead."""
        self.codes.expect(start, stop)


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
        return [entry for entry in self.entries.values() if isinstance(entry, ShippedEntry) and entry.is_quantized]

    @property
    def average_bits(self) -> float:
        """8 x bytes of codes, scales and zero points / number of weights they stand for."""
        return 8 * sum(entry.nbytes for entry in self.quantized) / sum(math.prod(entry.shape) for entry in self.quantized)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        unread = sum(not is_shape(e) for entry in self.quantized for e in entry.further)
        return {
            "method": self.method,
            "scheme": self.scheme,
            "read_as": " and ".join(sorted({short(entry.dtype) for entry in self.quantized})),
            "tensors": len(self.quantized),
            "average_bits": self.average_bits,
            "activation_scales_left_out": unread,
        }


def gathered(method: str, scheme: str, stored: Mapping[str, TensorEntry], made: Sequence[ShippedEntry]) -> Shipped:
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
        if isinstance(entry, ShippedEntry):
            entry.check()
            check_shapes(entry)


def check_shapes(entry: ShippedEntry) -> None:
    """Every copy of the shape says what the shape is.

    Raises:
        BadInputError: naming the tensor.
    """
    for copy in filter(is_shape, entry.further):
        says = copy.read().tolist()
        if says != list(entry.shape):
            raise BadInputError(
                f"tensor {copy.name!r} holds {says}, {entry.codes.name!r} is {list(entry.shape)}; the checkpoint is damaged"
            )


def check_scales(name: str, scale: Tensor, largest: float, entry: ShippedEntry) -> None:
    """Scales are finite, and no weight overflows.

    Args:
        name: of the stored scales. largest: no code (less its zero point) is beyond it.

    Raises:
        BadInputError: naming the tensor.
    """
    if not bool(torch.isfinite(scale).all()):
        raise BadInputError(f"tensor {name!r} holds a scale that is no finite number; the checkpoint is damaged")
    if scale.numel() and float(scale.abs().max()) * largest > torch.finfo(entry.dtype).max:
        raise BadInputError(
            f"tensor {name!r} holds the scale {float(scale.abs().max()):g}, with which {entry.name} would overflow "
            f"{short(entry.dtype)}; the checkpoint is damaged"
        )


def is_shape(entry: TensorEntry) -> bool:
    return entry.name.endswith(SHAPES)


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


def unfit(entry: TensorEntry, wanted: str) -> BadInputError:
    return BadInputError(
        f"tensor {entry.name!r} is {short(entry.dtype)} {list(entry.shape)}, expected {wanted}; "
        "config.json and weights do not belong together: download the checkpoint again"
    )
