"""ggml itself as an oracle: its rounding and its reading of blocks, through the C functions that xllamacpp's library exports."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebit.tensor.grids.ggml_grid import GgmlGrid


@functools.cache
def library() -> ctypes.CDLL:
    """The library, or a skipped test."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("needs xllamacpp, whose library has ggml: pip install -c constraints.txt -e '.[dev]'")
    (path,) = Path(found.origin).parent.glob("xllamacpp*.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 3, ctypes.c_void_p]
    return ggml


def quantize(grid: GgmlGrid, w_EOI: Tensor, importance_EI: Tensor | None = None) -> Tensor:
    """ggml's own bytes, uint8 [E, O, bytes per row]."""
    _, rows, inputs = w_EOI.shape
    packed = []
    for e, w in enumerate(w_EOI.contiguous()):
        importance = None if importance_EI is None else importance_EI[e].contiguous()
        row = torch.zeros(rows, inputs // grid.block * grid.layout.size, dtype=torch.uint8)
        pointer = None if importance is None else importance.data_ptr()
        written = library().ggml_quantize_chunk(grid.type_id, w.data_ptr(), row.data_ptr(), 0, rows, inputs, pointer)
        assert written == row.numel()
        packed.append(row)
    return torch.stack(packed)


def dequantize(grid: GgmlGrid, packed: Tensor) -> Tensor:
    """Flat float32 values of blocks in any shape, read by ggml."""
    name = grid.name[:-1] + "K" if grid.name.endswith("_k") else grid.name
    read = getattr(library(), f"dequantize_row_{name}")
    read.restype, read.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    packed = packed.contiguous()
    values = torch.empty(packed.numel() // grid.layout.size * grid.block)
    read(packed.data_ptr(), values.data_ptr(), values.numel())
    return values
