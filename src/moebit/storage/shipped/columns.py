"""Matrices whose output channels lie in columns beside their scales and zero points: what GPTQ and AWQ have in common.

weight[o, i] = scale[g, o] * (code[o, i] - zero[g, o]), the product taken in float32; g is the group of input i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import floats
from moebit.storage.shipped.entries import ShippedEntry, check_scales

Unpack = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ColumnsEntry(ShippedEntry):
    """A matrix [out, in] that is stored as [in, out], several codes in a word.

    Reading some output channels reads all packed codes, which are a fraction of the weights, and unpacks those that are asked for.

    Attributes:
        scale: float [groups, out]. zero: packed zero points.
        size: input channels in a group, where `index` does not say which group each is in.
        unpack: stored columns to uint8 codes [n, in]. unpack_zeros: all stored zero points to integers [out, groups].
        per_column: output channels in a stored column.
        largest: no code less its zero point is beyond it.
        index: int32 [in], the group of every input channel.
    """

    scale: TensorEntry
    zero: TensorEntry
    size: int
    unpack: Unpack
    unpack_zeros: Unpack
    per_column: int
    largest: float
    index: TensorEntry | None = None

    @property
    def needed(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.scale, self.zero, *((self.index,) if self.index else ()))

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        self.codes.expect()

    def rows(self, start: int, stop: int) -> Tensor:
        first = start // self.per_column
        columns = self.codes.read()[:, first : -(-stop // self.per_column)].contiguous()
        values = self.unpack(columns)[start - first * self.per_column :][: stop - start].float()
        zero = self.unpack_zeros(self.zero.read())[start:stop].float()
        scale = floats(self.scale.read())[:, start:stop].T
        groups = self._groups()
        if groups is None and self.shape[1] % self.size == 0:
            grouped = values.unflatten(1, (-1, self.size))
            grouped.sub_(zero[..., None]).mul_(scale[..., None])
            return values
        groups = torch.arange(self.shape[1]) // self.size if groups is None else groups
        return values.sub_(zero[:, groups]).mul_(scale[:, groups])

    def check(self) -> None:
        check_scales(self.scale.name, floats(self.scale.read()), self.largest, self)
        self._groups()

    def _groups(self) -> Tensor | None:
        """int64 [in], or None where groups lie one after the other.

        Raises:
            BadInputError: numbers that are no groups.
        """
        if self.index is None:
            return None
        found = self.index.read().long()
        if bool(((found < 0) | (found >= self.scale.shape[0])).any()):
            raise BadInputError(
                f"tensor {self.index.name!r} names a group outside of the {self.scale.shape[0]} there are; the checkpoint is damaged"
            )
        return None if torch.equal(found, torch.arange(self.shape[1]) // self.size) else found
