"""Orthogonal transforms made of small blocks: what is multiplied to the inputs of a matrix at run time, and into the matrix beforehand.

`x -> x T` with `T = D R1 P R2`: D signs, R1 and R2 block-diagonal rotations, P a permutation; each may be absent. A matrix W behind it
becomes W T: since T is orthogonal, `(x T)(W T)^T = x W^T`. So rows of weights and rows of activations are transformed alike.

Shape suffixes: M transforms (experts, or 1 for all), R rows, N channels, K blocks of B channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from moebit.tensor.rotation import sylvester

LARGEST_BLOCK = 128


def block_size(channels: int, largest: int = LARGEST_BLOCK) -> int:
    """The largest power of two, up to `largest`, that divides a number of channels."""
    return min(channels & -channels, largest)


def hadamard(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The normalised Hadamard matrix [size, size] of Sylvester's construction: symmetric and orthogonal.

    Raises:
        ValueError: a size that is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of {size}: sizes here are powers of two")
    return sylvester(size.bit_length() - 1).to(dtype)


def rotate_blocks(x: Tensor, block: Tensor) -> Tensor:
    """[..., N] times the block-diagonal matrix that repeats one [B, B] block."""
    parts: Tensor = x.unflatten(-1, (-1, block.shape[-1]))
    return (parts @ block.to(x.dtype)).flatten(-2)


@dataclass(frozen=True)
class BlockTransform:
    """M transforms of N channels, or one for all matrices (M = 1).

    Attributes:
        signs: [M, N] of 1 and -1. first, second: [M, K, B, B] (K = 1: the same block throughout).
        permutation: int [M, N], channel j of the result is channel `permutation[j]` of what came before.
    """

    signs: Tensor | None = None
    first: Tensor | None = None
    permutation: Tensor | None = None
    second: Tensor | None = None

    @property
    def count(self) -> int:
        """M."""
        return next(len(value) for value in (self.signs, self.first, self.permutation, self.second) if value is not None)

    def of(self, start: int, stop: int) -> BlockTransform:
        """Those of matrices [start, stop); one for all stays one for all."""
        if self.count == 1:
            return self
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return BlockTransform(**{name: None if value is None else value[start:stop] for name, value in parts.items()})

    def apply(self, x_MRN: Tensor) -> Tensor:
        """Rows times T: [M, R, N] with a transform each, or any [..., N] with one for all. Computed in the type of `x`."""
        x = self._by_matrix(x_MRN)
        if self.signs is not None:
            x = x * self.signs.to(x.dtype).unsqueeze(1)
        if self.first is not None:
            x = _blockwise(x, self.first)
        if self.permutation is not None:
            x = x.gather(2, self.permutation.long().unsqueeze(1).expand_as(x))
        if self.second is not None:
            x = _blockwise(x, self.second)
        return x.reshape(x_MRN.shape)

    def undo(self, x_MRN: Tensor) -> Tensor:
        """Rows times T^T, which takes `apply` back."""
        x = self._by_matrix(x_MRN)
        if self.second is not None:
            x = _blockwise(x, self.second.mT)
        if self.permutation is not None:
            back = self.permutation.long().argsort(-1)
            x = x.gather(2, back.unsqueeze(1).expand_as(x))
        if self.first is not None:
            x = _blockwise(x, self.first.mT)
        if self.signs is not None:
            x = x * self.signs.to(x.dtype).unsqueeze(1)
        return x.reshape(x_MRN.shape)

    def apply_ragged(self, x_SN: Tensor, bounds: list[int], start: int = 0) -> Tensor:
        """Rows [bounds[c], bounds[c + 1]) times transform `start + c`; the groups are ragged, so it is one call per group that has rows."""
        if self.count == 1:
            return self.apply(x_SN)
        result = torch.empty_like(x_SN)
        for c, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                result[low:high] = self.of(start + c, start + c + 1).apply(x_SN[low:high])
        return result

    def moments(self, h_MNN: Tensor) -> Tensor:
        """T^T H T, the second moments of transformed inputs; [M, N, N], or any number of them with one transform for all."""
        return self.apply(self.apply(h_MNN).mT.contiguous()).mT.contiguous()

    def _by_matrix(self, x: Tensor) -> Tensor:
        if self.count == 1:
            return x.reshape(1, -1, x.shape[-1])
        if x.ndim != 3 or len(x) != self.count:
            raise ValueError(f"rows {tuple(x.shape)} for {self.count} transforms")
        return x


def _blockwise(x_MRN: Tensor, blocks_MKBB: Tensor) -> Tensor:
    """Rows times block-diagonal matrices."""
    m, rows, channels = x_MRN.shape
    size = blocks_MKBB.shape[-1]
    count = channels // size
    if blocks_MKBB.shape[1] == 1:
        return (x_MRN.reshape(m, -1, size) @ blocks_MKBB[:, 0].to(x_MRN.dtype)).view(m, rows, channels)
    x = x_MRN.reshape(m, rows, count, size).transpose(1, 2).reshape(m * count, rows, size)
    y = torch.bmm(x, blocks_MKBB.reshape(m * count, size, size).to(x.dtype))
    return y.view(m, count, rows, size).transpose(1, 2).reshape(m, rows, channels)
