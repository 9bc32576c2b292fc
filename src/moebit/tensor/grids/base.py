"""The interface that solvers, refitting and formats have of a grid.

A grid knows three things: which parameters (scales, offsets) suit a matrix, already as they will be stored; which code is nearest to a
weight; and which number a code stands for. Whatever the storage, a solver sees one affine map per group of input channels,

    value = scale * (code - zero) + offset          or, of a table,          value = scale * levels[code].

How the formats map to it:
    integers, symmetric or not     scale; zero is the zero point; no offset
    float8, FP4 (NVFP4, MXFP4)     a table of the numbers of that type; scale is the block's (NVFP4: e4m3 block scale times one float32)
    ggml Q4_0, Q8_0, Q3_K, Q6_K    scale = d, or d times the sub-block's integer; zero is the middle code
    ggml Q4_1, Q2_K, Q4_K, Q5_K    scale = d sc, offset = -dmin m of the sub-block (or m); zero is 0
    ggml IQ4_NL, IQ4_XS            a table of 16 levels; scale = d, or d times the sub-block's integer

Shape suffixes: E experts (or matrices in a batch), O output channels, I input channels, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

LEAST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Affine:
    """What a grid's parameters mean, one number per group of input channels.

    Attributes:
        scale: [E, O, G].
        zero: [E, O, G], the code of value `offset`; 0 throughout for a table.
        offset: [E, O, G], or None where it is zero throughout.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor | None = None


@dataclass(frozen=True)
class Grid(ABC):
    """A grid for stacks of matrices [E, O, I]. Implementations are final and hold no tensors.

    Parameters are a frozen dataclass whose tensors have the rows in their second axis, or no axis for rows at all.
    """

    @abstractmethod
    def group_width(self, in_features: int) -> int:
        """Return how many input channels share a scale.

        Raises:
            ValueError: rows of this length cannot be divided so.
        """

    def groups(self, in_features: int) -> int:
        """Return the number of scales per output row."""
        return in_features // self.group_width(in_features)

    @property
    def levels(self) -> Tensor | None:
        """The rising levels of a table, float32; None where levels are evenly spaced."""
        return None

    @property
    def value_dtype(self) -> torch.dtype:
        """The type that engines compute the numbers in when they dequantize."""
        return torch.float32

    @property
    def refits(self) -> bool:
        """Whether a scale may be changed by itself once the codes are known (`refit_scales`)."""
        return False

    @property
    def factored(self) -> tuple[str, ...]:
        """The stored numbers that may be multiplied group by group (learned rounding): of the scales and, if any, of the offsets.

        They name fields of the parameters, [E, O, B], each shared by as many groups as B divides the groups into; `columns` is linear in
        both. None where scales are integers or exponents and cannot be moved a little.
        """
        return ()

    def qmax(self, bits_E: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [E], the largest code of every matrix."""
        return torch.exp2(bits_E.to(dtype)) - 1

    @abstractmethod
    def fit(self, w_EOI: Tensor, bits_E: Tensor, importance_EI: Tensor | None = None, search: bool = True) -> Any:
        """Return parameters for round-to-nearest, as they will be stored.

        Args:
            w_EOI: weights.
            bits_E: int64 [E].
            importance_EI: how much a squared error in an input channel counts (the diagonal of the Hessian); None counts all alike.
            search: try several ranges; else take the one that covers all weights.

        Raises:
            ValueError: rows that cannot be divided into groups, widths that this grid does not have.
        """

    @abstractmethod
    def columns(self, params: Any) -> Affine:
        """Return what the parameters mean."""

    @abstractmethod
    def round(self, w_EOI: Tensor, params: Any, bits_E: Tensor) -> Tensor:
        """Return uint8 [E, O, I], the codes of the nearest numbers."""

    @abstractmethod
    def dequantize(self, codes_EOI: Tensor, params: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [E, O, I] weights, computed in float32 (float64 if asked for) and rounded once to `dtype`."""


@dataclass(frozen=True)
class QTensor:
    """A stack of quantized matrices.

    Attributes:
        codes: uint8 [E, O, I].
        params: the grid's parameters.
        bits: int64 [E], bits per code.
        grid: what codes and parameters mean.
    """

    codes: Tensor
    params: Any
    bits: Tensor
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [E, O, I] weights, computed in float32 (float64 if asked for) and rounded once to `dtype`."""
        return self.grid.dequantize(self.codes, self.params, dtype)

    def rows(self, rows: slice) -> QTensor:
        """Return some output rows of every matrix."""
        return replace(self, codes=self.codes[:, rows].contiguous(), params=rows_of(self.params, rows))


def rows_of(params: Any, rows: slice) -> Any:
    """Return the parameters of some output rows; what all rows share stays."""
    stored = {f.name: getattr(params, f.name) for f in fields(params)}
    return replace(params, **{name: t[:, rows].contiguous() for name, t in stored.items() if isinstance(t, Tensor) and t.ndim == 3})


def joined_rows(parts: Sequence[Any]) -> Any:
    """Return the parameters of rows that were fitted a part at a time."""
    if len(parts) == 1:
        return parts[0]
    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), Tensor) and getattr(parts[0], f.name).ndim == 3]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts], 1) for name in names})


def as_bits(bits: int | Tensor, experts: int, device: torch.device | None = None) -> Tensor:
    """Return int64 [E] bit widths from one width or one per expert.

    Raises:
        ValueError: a width outside 2..8, or the wrong number of them.
    """
    result = torch.full((experts,), bits, dtype=torch.int64) if isinstance(bits, int) else bits.to(torch.int64)
    if result.shape != (experts,):
        raise ValueError(f"{tuple(result.shape)} bit widths for {experts} experts")
    if bool(((result < LEAST_BITS) | (result > MOST_BITS)).any()):
        raise ValueError(f"bit widths must lie between {LEAST_BITS} and {MOST_BITS}, got {sorted(set(result.tolist()))}")
    return result.to(device) if device is not None else result


def divided(group_size: int, in_features: int) -> int:
    """Return the width of groups of `group_size` input channels, -1 for the whole row.

    Raises:
        ValueError: the group size does not divide the row.
    """
    if group_size == -1:
        return in_features
    if group_size <= 0 or in_features % group_size:
        raise ValueError(f"group size {group_size} does not divide {in_features} input channels")
    return group_size
