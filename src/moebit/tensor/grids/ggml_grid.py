"""What all block types of ggml (llama.cpp, GGUF) have in common as grids; the types are in `ggml` and `ggml_fp4`.

What `fit` returns is rounded to the stored types already, so that a solver rounds weights to the numbers that will be read. Arithmetic is
that of `dequantize_row_*` in llama.cpp's `ggml-quants.c`, in float32 and in the same order: differences are exactly zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moebit.tensor.grids.base import Affine, Grid
from moebit.tensor.grids.ggml_blocks import LAYOUTS, Fields, Layout
from moebit.tensor.grids.ggml_fit import Effort
from moebit.tensor.grids.ggml_moments import Piece, inverse, nearest

PIECE_WEIGHTS, DEVICE_PIECE_WEIGHTS = 2**20, 2**25  # so many weights are fitted at a time: in a CPU's caches, enough work for a GPU
LEAST_IMPORTANCE = 1e-6  # of the mean: columns that no input ever reached still get a scale
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # finer ones lower the error by 0.2 percent, none above 1 raises it by 1


P = TypeVar("P")


@dataclass(frozen=True)
class GgmlGrid(Grid, Generic[P]):
    """A block type of ggml.

    Attributes:
        name: ggml's name in small letters, also the key of `ggml_blocks.LAYOUTS`.
        type_id: its number in GGUF files.
        group: columns that share a scale.
        bits: bits per code. zero: the code of value 0 in uniform types.
        table: sorted levels; empty where levels are uniform.
        effort: how much `fit` tries.
    """

    name: str
    type_id: int
    group: int
    bits: int
    zero: int = 0
    table: tuple[int, ...] = ()
    effort: Effort = field(default=Effort(STEPS, 2), kw_only=True)

    @property
    def layout(self) -> Layout:
        """How a block lies in bytes."""
        return LAYOUTS[self.name]

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.layout.width

    @property
    def levels(self) -> Tensor | None:
        """Sorted float32 levels of a table, else None."""
        return torch.tensor(self.table, dtype=torch.float32) if self.table else None

    @property
    def largest_code(self) -> int:
        """The largest code."""
        return len(self.table) - 1 if self.table else 2**self.bits - 1

    def qmax(self, bits_E: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E]: the largest code of every expert."""
        return torch.full(bits_E.shape, float(self.largest_code), dtype=dtype, device=bits_E.device)

    def group_width(self, in_features: int) -> int:
        """Columns that share a scale."""
        self.check(in_features)
        return self.group

    def groups(self, in_features: int) -> int:
        """Groups of a row."""
        return in_features // self.group_width(in_features)

    def check(self, in_features: int) -> None:
        """Refuse rows that cannot be cut into blocks.

        Raises:
            ValueError: `block` does not divide `in_features`; the message names types whose blocks do.
        """
        if in_features % self.block == 0:
            return
        fitting = [name for name, layout in LAYOUTS.items() if in_features % layout.width == 0]
        remedy = f"types that fit: {', '.join(fitting)}" if fitting else "no block type fits; keep the tensor in f16 or bf16"
        raise ValueError(f"{self.name} has blocks of {self.block} weights, which do not divide rows of {in_features}; {remedy}")

    def fit(self, w_EOI: Tensor, bits_E: Tensor, importance_EI: Tensor | None = None, search: bool = True) -> P:
        """Scales and offsets for round-to-nearest, as they will be stored.

        Args:
            w_EOI: weights.
            bits_E: int64 [E], all equal to the type's: one type holds one width.
            importance_EI: how much a squared error in a column counts (the diagonal of the Hessian); None counts all alike.
            search: try many scales; else only the one that covers the range, with least squares.

        Raises:
            ValueError: rows that blocks do not divide, a width that is not the type's, weights or importance that are not finite.
        """
        self.check(w_EOI.shape[-1])
        if bool((bits_E != self.bits).any()):
            raise ValueError(f"{self.name} has {self.bits} bits per code for all experts, asked for {sorted(set(bits_E.tolist()))}")
        effort = self.effort if search else replace(self.effort, steps=(0.0,), rounds=0)
        importance, shared = _weights(importance_EI, w_EOI), self._shared(w_EOI)
        stacks = []
        for these, slabs in _slabs(w_EOI):
            some = None if shared is None else shared[these]
            parts = [self._fitted(self._piece(w_EOI[these, rows], importance[these]), effort, some) for rows in slabs]
            stacks.append([_joined(column, 1) for column in zip(*parts, strict=True)])
        return self._params(*(_joined(column, 0) for column in zip(*stacks, strict=True)), shared=shared)

    def _piece(self, w_EOI: Tensor, importance_EI: Tensor) -> Piece:
        x = w_EOI.to(torch.float32).unflatten(2, (-1, self.group)).permute(0, 2, 3, 1).contiguous()
        if not bool(x.isfinite().all()):
            raise ValueError(f"weights to be put on {self.name} are not all finite")
        weight = importance_EI.unflatten(1, (-1, self.group)).contiguous()
        low, high = (self.table[0], self.table[-1]) if self.table else (-self.zero, self.largest_code - self.zero)
        table = self.levels
        return Piece(x, weight, low, high, None if table is None else table.to(x.device))

    def _shared(self, w_EOI: Tensor) -> Tensor | None:
        """What all rows of an expert share, [E]; most types have nothing of the kind."""
        return None

    @abstractmethod
    def _fitted(self, piece: Piece, effort: Effort, shared_E: Tensor | None) -> tuple[Tensor | None, ...]:
        """The stored numbers of some rows, each [E, R, n], in the order of the parameters."""

    @abstractmethod
    def _params(self, *stored: Tensor | None, shared: Tensor | None) -> P:
        """Parameters from the stored numbers of all rows."""

    @abstractmethod
    def _fields(self, params: P) -> Fields:
        """Stored numbers by the names that `ggml_blocks` has for them, each [E, O, n]."""

    @abstractmethod
    def columns(self, params: P) -> Affine:
        """What the parameters mean, one number per group of columns."""

    def round(self, w_EOI: Tensor, params: P, bits_E: Tensor | None = None) -> Tensor:
        """uint8 codes [E, O, I] of the nearest values; groups whose scale is 0 get the code that means 0.

        The widths `bits_E` are the type's own; grids with several widths need them here.
        """
        affine = self.columns(params)
        by = inverse(affine.scale).unsqueeze(-1)
        above = w_EOI.to(torch.float32).unflatten(-1, (-1, self.group))
        target = (above if affine.offset is None else above - affine.offset.unsqueeze(-1)) * by
        levels = self.levels
        if levels is not None:
            return nearest(target, levels.to(target.device)).to(torch.uint8).flatten(-2)
        codes: Tensor = target.round_().add_(self.zero).clamp_(0, self.largest_code).to(torch.uint8)
        return codes.flatten(-2)

    def dequantize(self, codes_EOI: Tensor, params: P, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E, O, I] weights, in float32 arithmetic as ggml's, rounded once to `dtype`."""
        affine = self.columns(params)
        grouped = codes_EOI.unflatten(-1, (-1, self.group))
        levels = self.levels
        value = grouped.to(torch.float32).sub_(self.zero) if levels is None else levels.to(codes_EOI.device)[grouped.long()]
        value.mul_(affine.scale.unsqueeze(-1))
        if affine.offset is not None:
            value.add_(affine.offset.unsqueeze(-1))
        return value.flatten(-2).to(dtype)

    def pack(self, codes_EOI: Tensor, params: P) -> Tensor:
        """uint8 [E, O, bytes per row], as GGUF files have them."""
        experts, rows, inputs = codes_EOI.shape
        self.check(inputs)
        blocks = experts * rows * inputs // self.block
        stored: Fields = {"codes": self._stored_codes(codes_EOI), **self._fields(params)}
        return self.layout.pack({name: value.reshape(blocks, -1) for name, value in stored.items()}).view(experts, rows, -1)

    def unpack(self, packed: Tensor, in_features: int) -> tuple[Tensor, P]:
        """The inverse of `pack`: codes uint8 [E, O, I] and parameters.

        Raises:
            ValueError: rows of another length.
        """
        self.check(in_features)
        experts, rows, size = packed.shape
        wanted = in_features // self.block * self.layout.size
        if size != wanted:
            raise ValueError(f"a row of {in_features} weights has {wanted} bytes as {self.name}, got {size}")
        fields = self.layout.unpack(packed.reshape(-1, self.layout.size))
        whole = {name: value.reshape(experts, rows, -1) for name, value in fields.items()}
        return self._codes(whole.pop("codes")), self._read(whole)

    def _stored_codes(self, codes: Tensor) -> Tensor:
        return codes

    def _codes(self, stored: Tensor) -> Tensor:
        return stored

    @abstractmethod
    def _read(self, fields: Fields) -> P:
        """Parameters from the fields of unpacked blocks, each [E, O, n]."""


def _weights(importance_EI: Tensor | None, w_EOI: Tensor) -> Tensor:
    """float32 [E, I] with mean 1, nowhere 0."""
    if importance_EI is None:
        return torch.ones_like(w_EOI[:, 0], dtype=torch.float32)
    importance = importance_EI.to(torch.float64).clamp(min=0)
    if not bool(importance.isfinite().all()):
        raise ValueError("importance is not finite everywhere")
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean, 1.0).clamp(min=LEAST_IMPORTANCE).to(torch.float32)


def _slabs(w_EOI: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Experts, and rows of them, that are fitted at a time: several whole experts, or some rows of one."""
    experts, rows, inputs = w_EOI.shape
    budget = PIECE_WEIGHTS if w_EOI.device.type == "cpu" else DEVICE_PIECE_WEIGHTS
    some_experts = max(1, budget // (rows * inputs))
    some_rows = rows if some_experts > 1 else max(1, budget // inputs)
    slabs = [slice(row, row + some_rows) for row in range(0, rows, some_rows)]
    for expert in range(0, experts, some_experts):
        yield slice(expert, expert + some_experts), slabs


def _joined(parts: tuple[Tensor | None, ...], axis: int) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present, axis) if present else None


def rows_first(value_EGR: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, R, G] in the type that is stored."""
    return value_EGR.transpose(1, 2).to(dtype)
