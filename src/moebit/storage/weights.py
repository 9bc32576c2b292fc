"""The one interface to a model's parameters, wherever they come from.

Every class behind it is final. What changes other weights (`EditedWeights`) wraps them; nobody asks which kind it has been given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import PIECE_BYTES, Entry, TensorEntry, TensorSpec


class Weights(ABC):
    """The parameters and persistent buffers of a model, under the names and in the layout of its transformers class.

    Attributes:
        model: the skeleton that they are for.
        device: where parameters are handed out.
        entries: the stored tensors by name, each as it can be read: a matrix that is stored quantized stands here as a plain one where
            the format keeps one tensor for one matrix.
        unused: names in `entries` of tensors that the model class does not use.
    """

    model: Any
    device: torch.device = torch.device("cpu")
    entries: Mapping[str, Entry]
    unused: Sequence[str]

    @abstractmethod
    def available(self) -> set[str]:
        """The names that are stored; a parameter that is tied to another one is stored under one of its two names."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """The type and shape in which a parameter is read; a tied parameter has those of the other one."""

    @abstractmethod
    def parameter(self, name: str) -> Tensor:
        """A whole parameter or persistent buffer; a tied parameter is the other one."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter's first axis; only these are read where `divisible` says so."""

    @abstractmethod
    def expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter whose first axis is the expert; no other expert is read.

        Raises:
            BadInputError: experts that are stored in a way that does not allow that.
        """

    @abstractmethod
    def expect(self, names: Iterable[str], start: int, stop: int) -> None:
        """Say that experts [start, stop) of these parameters are wanted soon, so that the system can read ahead."""

    @abstractmethod
    def divisible(self, name: str) -> bool:
        """Whether rows of a parameter's first axis can be read without the others."""

    @abstractmethod
    def stored_names(self, name: str) -> list[str]:
        """The names in `entries` of what makes up a parameter."""

    @abstractmethod
    def stored_by_pattern(self, name: str) -> dict[str, list[str]]:
        """What `stored_names` gives, by the pattern of transformers' conversion that the names match.

        There is one pattern for each projection; the names under it are in the order of the experts.
        """

    @abstractmethod
    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        """Values for a parameter, or for its experts from `start` on, under the checkpoint's own names and in its own shapes.

        Raises:
            BadInputError: a parameter for which the way back is not known.
        """

    @abstractmethod
    def stored_together(self) -> dict[str, list[str]]:
        """The parameters that share stored tensors with others, and with which."""

    @abstractmethod
    def merged(self) -> set[str]:
        """The parameters that transformers puts together from stored tensors called *.weight."""

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(byte at which it begins, tensor) of a parameter's rows, a limited number at a time where `divisible` allows that."""
        spec = self.spec(name)
        if not spec.shape or not self.divisible(name):
            yield 0, self.parameter(name).contiguous()
            return
        row = max(1, spec.nbytes // max(1, spec.shape[0]))
        step = max(1, PIECE_BYTES // row)
        for start in range(0, spec.shape[0], step):
            yield start * row, self.rows(name, start, min(start + step, spec.shape[0])).contiguous()

    def stored(self, name: str) -> tuple[TensorEntry, ...]:
        """The tensors in the files that hold a parameter, codes and scales among them."""
        return tuple(part for stored in self.stored_names(name) for part in self.entries[stored].stored)

    @property
    def stored_specs(self) -> dict[str, TensorSpec]:
        """Type and shape of every stored tensor as it is read."""
        return {name: entry.spec for name, entry in self.entries.items()}

    @property
    def plain_bytes(self) -> int:
        """Bytes of all `entries` as they are read: more than are stored where they are stored quantized."""
        return sum(entry.spec.nbytes for entry in self.entries.values())


class OwnNames(Weights):
    """Weights that are stored under the names of transformers' parameters, or not stored at all: nothing was renamed or merged."""

    unused: Sequence[str] = ()

    def stored_by_pattern(self, name: str) -> dict[str, list[str]]:
        return {stored: [stored] for stored in self.stored_names(name)}

    def stored_form(self, name: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
        if self.stored_names(name) != [name]:
            raise BadInputError(f"{name} is stored quantized, values for it cannot be written; give the full-precision checkpoint")
        return {name: tensor}

    def stored_together(self) -> dict[str, list[str]]:
        return {}

    def merged(self) -> set[str]:
        return set()
