"""The ways in which packed matrices are multiplied, and which one is taken.

  reference    torch alone, on any device: unpack, dequantize, multiply. What every other way is held to.
  dequantize   one matrix at a time, dequantized by a compiled kernel, multiplied by torch: for many rows of input.
  float        compiled product with the packed codes, float32 throughout: for few rows.
  integer      the same with the input in 16-bit integers, for processors that can: for few rows, fastest.
  triton       Triton kernels over the packed codes, for few rows and for many, on CUDA devices.

On a CPU `auto` takes a product with packed codes (`integer` for inputs in half precision where it can, else `float`) up to a number of rows
and `dequantize` beyond. One row is always multiplied as it is packed; where the border lies beyond that is measured once per process and
shape. On CUDA it is `triton` where that is installed, else `reference`; `taken` says which.
The way never changes which experts run, and all agree within the rounding of the input's type; but the border may move between two runs,
and with it last digits: ask for one way where bytes have to be equal.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moebit.runtime import vectors
from moebit.runtime.kernels import Stack, dequantize_into, float_product, integer_product, integers_serve
from moebit.tensor import packed_row_bytes

Path = Literal["auto", "reference", "dequantize", "float", "integer", "triton"]
PATHS: tuple[Path, ...] = get_args(Path)
ON_CPU: tuple[Path, ...] = ("dequantize", "float", "integer")  # that only run there
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the compiled kernels serve
LADDER = (2, 4, 8, 16, 32, 64)  # rows of input at which the border is looked for
MEASURED_OUTPUTS = 1024  # of a matrix, at most
REPEATS = 3
ALWAYS = 2**62


def taken(path: Path, device: torch.device) -> Path:
    """What a way comes to on a device: `auto` is one of the others there, except on a CPU, where it depends on the rows of input."""
    if path == "auto" and device.type != "cpu":
        return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "reference"
    return path


def compiled(path: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels for CPUs may be used."""
    return path not in ("reference", "triton") and device.type == "cpu" and dtype in DTYPES


def by_triton(path: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels are used."""
    return taken(path, device) == "triton" and dtype in DTYPES


def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which dequantized weights are multiplied with inputs of `dtype`.

    A CPU without instructions for half precision multiplies float32 several times as fast, and dequantizing into either type takes as long.
    """
    narrow = dtype in (torch.bfloat16, torch.float16) and device.type == "cpu"
    return torch.float32 if narrow and not vectors.HALF_PRECISION else dtype


def few_rows(path: Path, stack: Stack, bits: int, dtype: torch.dtype, matrices: int) -> int:
    """Up to how many rows of input a matrix of `bits` is multiplied as it is packed; beyond, it is dequantized first.

    Args:
        matrices: how many of the stack are multiplied in one call, about.
    """
    if path == "auto":
        grid = (stack.group, stack.zeros is None, stack.scale.dtype)
        return _border(bits, stack.shape, *grid, dtype, matrices, torch.get_num_threads())
    return ALWAYS if path in ("float", "integer") else 0


def packed_product(
    path: Path, stack: Stack, x_TI: Tensor, chosen: list[int], bounds: list[int], tokens: Tensor, y: Tensor, rows: slice = slice(None)
) -> None:
    """`integer_product`, `float_product` or Triton's, whichever is asked for or fits."""
    if taken(path, x_TI.device) == "triton":
        from moebit.runtime import triton_kernels  # not everyone has Triton

        triton_kernels.product(stack, x_TI, chosen, bounds, tokens, y, rows)
        return
    integers = path == "integer" or (path == "auto" and x_TI.dtype != torch.float32 and integers_serve(stack))
    (integer_product if integers else float_product)(stack, x_TI, chosen, bounds, tokens, y, rows)


def dequantized(stack: Stack, e: int, target: Tensor, rows: slice = slice(None)) -> None:
    """Write matrix e to target[rows]; target is [rows, I] in one of `DTYPES`."""
    if target.dtype != torch.float16:
        dequantize_into(stack, e, target, rows)
        return
    wide = torch.empty(stack.shape)
    dequantize_into(stack, e, wide, slice(None))
    target[rows] = wide


def why_not(path: Path, stack: Stack) -> str | None:
    """What stands in the way of a way for matrices where they lie, or None."""
    device = stack.codes.device
    if path in ON_CPU and device.type != "cpu":
        return f"it lies on {device}, and {path!r} is for CPUs; use 'auto'"
    if path == "triton":
        return _why_not_triton(device)
    if path == "integer" and not vectors.AVAILABLE:
        return f"this processor lacks {', '.join(vectors.NEEDED)}; use 'auto' or 'float'"
    if path == "integer" and not integers_serve(stack):
        return f"groups of {stack.group} input channels are neither 32 nor a multiple of 64 nor the whole row; use 'auto' or 'float'"
    return None


def _why_not_triton(device: torch.device) -> str | None:
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed (pip install 'moebit[gpu]')"
    if device.type == "cuda":
        return None
    import triton

    return None if triton.knobs.runtime.interpret else f"it lies on {device}, and 'triton' is for CUDA devices; use 'auto'"


@lru_cache
def _border(
    bits: int,
    shape: tuple[int, int],
    group: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    matrices: int,
    threads: int,
) -> int:
    """The number of rows, from LADDER, up to which the packed product was faster; 1 at least, which needs no measurement."""
    out, inputs = min(shape[0], MEASURED_OUTPUTS), shape[1]
    code_bytes, zero_bytes = out * packed_row_bytes(inputs, bits), packed_row_bytes(out * (inputs // group), bits)
    codes = torch.randint(0, 256, (matrices * code_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    zeros = None if symmetric else codes[: matrices * zero_bytes].clone()
    scale = torch.full((matrices, out, inputs // group), 0.01).to(scale_dtype)
    index = np.arange(matrices)
    stack = Stack(codes, scale, zeros, np.full(matrices, bits), index * code_bytes, index * zero_bytes, (out, inputs))
    work = multiplied_in(dtype, codes.device) if matrices > 1 else dtype  # as experts are, and linears
    weight, border = torch.empty(out, inputs, dtype=work), 1
    for rows in LADDER:
        x, y, tokens = torch.ones(rows, inputs, dtype=dtype), torch.empty(rows * matrices, out), torch.arange(rows).repeat(matrices)
        bounds = [rows * position for position in range(matrices + 1)]
        packed = _seconds(partial(packed_product, "auto", stack, x, list(range(matrices)), bounds, tokens, y)) / matrices
        dense = _seconds(partial(dequantized, stack, 0, weight)) + _seconds(partial(torch.mm, x.to(work), weight.T))
        if packed > dense:
            break
        border = rows
    return border


def _seconds(run: Callable[[], object]) -> float:
    run()  # compiles, and fills caches
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
