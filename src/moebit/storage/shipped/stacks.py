"""One matrix of a stack, for models whose experts are stored as a stack and named one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.storage.files import TensorEntry, TensorSpec
from moebit.storage.shipped.entries import ShippedEntry


@dataclass(frozen=True)
class ExpertEntry(ShippedEntry):
    """A matrix [out, in] of a quantized stack [E, out, in]; reading some of its rows reads the whole matrix.

    Attributes:
        stack: the stack. number: of the expert.
    """

    stack: ShippedEntry
    number: int

    @property
    def needed(self) -> tuple[TensorEntry, ...]:
        return self.stack.needed

    @property
    def further(self) -> tuple[TensorEntry, ...]:
        return self.stack.further

    @property
    def nbytes(self) -> int:
        return self.stack.nbytes // self.stack.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.stack.rows(self.number, self.number + 1)[0, start:stop]

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        self.stack.expect(self.number, self.number + 1)

    def check(self) -> None:
        if self.number == 0:  # once for the whole stack
            self.stack.check()


@dataclass(frozen=True)
class PlainExpertEntry:
    """A matrix [out, in] of a stack [E, out, in] that is stored plain."""

    name: str
    stack: TensorEntry
    number: int

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self.stack,)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the matrix."""
        return self._rows_as_stack().read(*self._range(start, stop))

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read these rows ahead."""
        self._rows_as_stack().expect(*self._range(start, stop))

    def _rows_as_stack(self) -> TensorEntry:
        """The stack [E, out, in] as one matrix [E out, in]."""
        experts, out, *rest = self.stack.shape
        return TensorEntry(self.stack.file, self.stack.name, self.stack.dtype, (experts * out, *rest), self.stack.offset)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        out = self.shape[0]
        return self.number * out + start, self.number * out + (out if stop is None else stop)


def apart(stack: ShippedEntry, name: str, number: int) -> ExpertEntry:
    """One expert of a stack, under a name of its own."""
    return ExpertEntry(name, stack.dtype, stack.shape[1:], stack.codes, stack, number)
