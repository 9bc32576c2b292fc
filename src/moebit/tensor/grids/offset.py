"""Evenly spaced grids whose offset is stored as a number instead of a zero point: value = scale * code + offset (MLX)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebit.tensor.grids.base import Affine, Grid
from moebit.tensor.grids.uniform import UniformGrid


@dataclass(frozen=True)
class OffsetParams:
    """Attributes:
    scale: the grid's `scale_dtype` [E, O, G].
    offset: the value of code 0, in the same type.
    """

    scale: Tensor
    offset: Tensor


@dataclass(frozen=True)
class OffsetGrid(Grid):
    """The ranges of an asymmetric `UniformGrid`, with offsets rounded to the type of the scales before weights are rounded.

    Attributes:
        group_size: input channels that share a scale. scale_dtype: of scales and offsets.
    """

    group_size: int
    scale_dtype: torch.dtype = torch.float32

    @property
    def value_dtype(self) -> torch.dtype:
        return self.scale_dtype

    def group_width(self, in_features: int) -> int:
        return self._ranges.group_width(in_features)

    @property
    def _ranges(self) -> UniformGrid:
        return UniformGrid(self.group_size, symmetric=False, scale_dtype=self.scale_dtype)

    def fit(self, w_EOI: Tensor, bits_E: Tensor, importance_EI: Tensor | None = None, search: bool = True) -> OffsetParams:
        found = self._ranges.fit(w_EOI, bits_E, importance_EI, search)
        offset = -(found.scale.float() * found.zero_point.float())
        return OffsetParams(found.scale, offset.to(self.scale_dtype))

    def columns(self, params: OffsetParams) -> Affine:
        return Affine(params.scale, torch.zeros_like(params.scale), params.offset)

    def round(self, w_EOI: Tensor, params: OffsetParams, bits_E: Tensor) -> Tensor:
        groups = params.scale.shape[-1]
        scale, offset = (t.to(w_EOI.dtype).unsqueeze(-1) for t in (params.scale, params.offset))
        codes = torch.round((w_EOI.unflatten(-1, (groups, -1)) - offset) / scale).clamp(min=0)
        return codes.minimum(self.qmax(bits_E, w_EOI.dtype)[:, None, None, None]).flatten(-2).to(torch.uint8)

    def dequantize(self, codes_EOI: Tensor, params: OffsetParams, dtype: torch.dtype = torch.float32) -> Tensor:
        work = torch.float64 if dtype == torch.float64 else torch.float32
        scale, offset = (t.to(work).unsqueeze(-1) for t in (params.scale, params.offset))
        value: Tensor = codes_EOI.to(work).unflatten(-1, (params.scale.shape[-1], -1)) * scale + offset
        return value.flatten(-2).to(dtype)
