"""Compiled CPU kernels (numba) for the two inner loops that matrix products cannot express.

Each has a plain torch form next to its caller, which runs on any device; the tests hold the two together. The second has one for CUDA,
too (`triton_kernels.py`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

TILE = 64  # rows that are rounded side by side


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _best_grid(w: Any, scales: Any, zeros: Any, importance: Any, qmax: Any, best: Any) -> None:
    experts, rows, inputs = w.shape
    ratios, _, _, groups = scales.shape
    width = inputs // groups
    tiles = (rows + TILE - 1) // TILE
    for flat in numba.prange(experts * tiles):
        e, first = flat // tiles, (flat % tiles) * TILE
        count = min(TILE, rows - first)
        top = qmax[e]
        nought = top * 0
        # Columns of a tile lie side by side, so that the inner loop runs over rows and vectorizes; each row's sum keeps its order.
        value = np.zeros((width, TILE), dtype=w.dtype)
        s, z = np.ones(TILE, dtype=w.dtype), np.zeros(TILE, dtype=w.dtype)
        error, least = np.zeros(TILE, dtype=w.dtype), np.zeros(TILE, dtype=w.dtype)
        for g in range(groups):
            for r in range(count):
                for j in range(width):
                    value[j, r] = w[e, first + r, g * width + j]
            least[:] = np.inf
            for ratio in range(ratios):
                for r in range(count):
                    s[r], z[r] = scales[ratio, e, first + r, g], zeros[ratio, e, first + r, g]
                error[:] = 0
                for j in range(width):
                    weight = importance[e, g * width + j]
                    column = value[j]
                    for r in range(TILE):
                        code = min(max(np.rint(column[r] / s[r]) + z[r], nought), top)
                        gap = s[r] * (code - z[r]) - column[r]
                        error[r] += gap * gap * weight
                for r in range(count):
                    if error[r] < least[r]:
                        least[r] = error[r]
                        best[e, first + r, g] = ratio


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _gptq_block(
    w: Any,
    carried: Any,
    f: Any,
    d: Any,
    scale: Any,
    zero: Any,
    group: Any,
    qmax: Any,
    start: int,
    codes: Any,
    error: Any,
    loss: Any,
) -> None:
    experts, rows, _ = w.shape
    width = carried.shape[2]
    tiles = (rows + TILE - 1) // TILE
    for flat in numba.prange(experts * tiles):
        e, first = flat // tiles, (flat % tiles) * TILE
        count = min(TILE, rows - first)
        top = qmax[e]
        nought = top * 0
        # Columns of a tile lie side by side, so that the inner loops run over rows and vectorize. What is read and written of whole
        # rows is so in one go each: going down a column of a large matrix, every row falls on the same lines of the cache.
        target, left = np.zeros((width, TILE), dtype=w.dtype), np.zeros((width, TILE), dtype=w.dtype)
        chosen = np.zeros((width, TILE), dtype=np.uint8)
        s, z = np.ones(TILE, dtype=w.dtype), np.zeros(TILE, dtype=w.dtype)
        total = np.zeros(TILE, dtype=w.dtype)
        for r in range(count):
            for k in range(width):
                left[k, r] = w[e, first + r, start + k]
                target[k, r] = carried[e, first + r, k] + left[k, r]
            total[r] = loss[e, first + r]
        for k in range(width - 1, -1, -1):
            column = start + k
            g = group[e, column]
            for r in range(count):
                s[r], z[r] = scale[e, first + r, g], zero[e, first + r, g]
            row, missed, code = target[k], left[k], chosen[k]
            dk = d[e, column]
            for r in range(TILE):
                c = min(max(np.rint(row[r] / s[r]) + z[r], nought), top)
                value = s[r] * (c - z[r])
                gap = row[r] - value
                total[r] += dk * gap * gap
                missed[r] = missed[r] - value
                code[r] = np.uint8(c)
            for j in range(k):
                weight = f[e, k, j]
                ahead = target[j]
                for r in range(TILE):
                    ahead[r] += missed[r] * weight
        for r in range(count):
            for k in range(width):
                codes[e, first + r, start + k] = chosen[k, r]
                error[e, first + r, start + k] = left[k, r]
            loss[e, first + r] = total[r]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _gptq_block_general(
    w: Any, carried: Any, f: Any, d: Any, scale: Any, zero: Any, offset: Any, group: Any, qmax: Any, levels: Any, start: int,
    codes: Any, error: Any, loss: Any,
) -> None:  # fmt: skip
    experts, rows, _ = w.shape
    width = carried.shape[2]
    tiles = (rows + TILE - 1) // TILE
    count_levels = len(levels)
    for flat in numba.prange(experts * tiles):
        e, first = flat // tiles, (flat % tiles) * TILE
        count = min(TILE, rows - first)
        top = qmax[e]
        nought = top * 0
        target, left = np.zeros((width, TILE), dtype=w.dtype), np.zeros((width, TILE), dtype=w.dtype)
        chosen = np.zeros((width, TILE), dtype=np.uint8)
        for r in range(count):
            for k in range(width):
                left[k, r] = w[e, first + r, start + k]
                target[k, r] = carried[e, first + r, k] + left[k, r]
        for k in range(width - 1, -1, -1):
            column = start + k
            g = group[e, column]
            dk = d[e, column]
            row, missed, code = target[k], left[k], chosen[k]
            for r in range(count):
                s, z, o = scale[e, first + r, g], zero[e, first + r, g], offset[e, first + r, g]
                ratio = (row[r] - o) / s if s != nought else nought
                if count_levels == 0:
                    c = min(max(np.rint(ratio) + z, nought), top)
                    step = c - z
                else:
                    low, high = 0, count_levels - 1
                    while low < high:
                        middle = (low + high) // 2
                        if ratio >= (levels[middle] + levels[middle + 1]) / 2:
                            low = middle + 1
                        else:
                            high = middle
                    c = nought + low
                    step = levels[low]
                value = s * step + o
                gap = row[r] - value
                loss[e, first + r] += dk * gap * gap
                missed[r] = missed[r] - value
                code[r] = np.uint8(c)
            for j in range(k):
                weight = f[e, k, j]
                ahead = target[j]
                for r in range(TILE):
                    ahead[r] += missed[r] * weight
        for r in range(count):
            for k in range(width):
                codes[e, first + r, start + k] = chosen[k, r]
                error[e, first + r, start + k] = left[k, r]


def load() -> None:
    """Have the kernels for float32 ready, from numba's cache or compiled; for a thread of its own, while others read or multiply.

    Who calls a kernel meanwhile waits for it.
    """
    f1, f2, f3, f4 = (np.zeros((0,) * dimensions, dtype=np.float32) for dimensions in (1, 2, 3, 4))
    i2, i3, u3 = np.zeros((0, 0), dtype=np.int64), np.zeros((0, 0, 0), dtype=np.int64), np.zeros((0, 0, 0), dtype=np.uint8)
    for kernel, arguments in (
        (_best_grid, (f3, f4, f4, f2, f1, i3)),
        (_gptq_block, (f3, f3, f3, f2, f3, f3, i2, f1, 0, u3, f3, f2)),
    ):
        kernel.compile(tuple(map(numba.typeof, arguments)))


def follow_torch() -> None:
    """Let numba use as many threads as torch does. Left alone, its first launch sets both back to the number of processors."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)


def best_grid(w_EOI: Tensor, scales: Tensor, zeros: Tensor, importance_EI: Tensor, qmax_E: Tensor) -> Tensor:
    """int64 [E, O, G]: which of the candidate grids [R, E, O, G] has the least weighted rounding error; the first wins ties."""
    best = torch.zeros(scales.shape[1:], dtype=torch.int64)
    follow_torch()
    arrays = [tensor.contiguous().numpy() for tensor in (w_EOI, scales, zeros, importance_EI, qmax_E, best)]
    _best_grid(*arrays)
    return best


def gptq_block(
    w_EOI: Tensor,
    carried_EOB: Tensor,
    f_EBB: Tensor,
    d_EI: Tensor,
    scale_EOG: Tensor,
    zero_EOG: Tensor,
    group_EI: Tensor,
    qmax_E: Tensor,
    start: int,
    codes_EOI: Tensor,
    error_EOI: Tensor,
    loss_EO: Tensor,
) -> None:
    """Round the columns [start, start + B) one after the other, the last first, each seeing the errors of those before it.

    Args:
        w_EOI: weights, columns in reverse solving order; `carried_EOB`: what later columns, solved before, ask of these.
        f_EBB: the block of F on its diagonal; d_EI: D; group_EI: each column's scale; qmax_E: largest code.
        codes_EOI, error_EOI (w - q): written in these columns; loss_EO: added to.
    """
    follow_torch()
    arrays = [t.contiguous().numpy() for t in (w_EOI, carried_EOB, f_EBB, d_EI, scale_EOG, zero_EOG, group_EI, qmax_E)]
    _gptq_block(*arrays, start, codes_EOI.numpy(), error_EOI.numpy(), loss_EO.numpy())


def gptq_block_general(
    w_EOI: Tensor,
    carried_EOB: Tensor,
    f_EBB: Tensor,
    d_EI: Tensor,
    scale_EOG: Tensor,
    zero_EOG: Tensor,
    group_EI: Tensor,
    qmax_E: Tensor,
    start: int,
    codes_EOI: Tensor,
    error_EOI: Tensor,
    loss_EO: Tensor,
    offset_EOG: Tensor | None = None,
    levels_L: Tensor | None = None,
) -> None:
    """Round as `gptq_block` does, on grids with offsets or with a table of levels.

    Args:
        offset_EOG: what code `zero` stands for; None for 0.
        levels_L: the rising levels of a table, in multiples of the scale; None for evenly spaced ones.
    """
    follow_torch()
    offset = torch.zeros_like(scale_EOG) if offset_EOG is None else offset_EOG
    levels = torch.empty(0, dtype=w_EOI.dtype) if levels_L is None else levels_L.to(w_EOI.dtype)
    before = [t.contiguous().numpy() for t in (w_EOI, carried_EOB, f_EBB, d_EI, scale_EOG, zero_EOG, offset)]
    behind = [t.contiguous().numpy() for t in (group_EI, qmax_E, levels)]
    _gptq_block_general(*before, *behind, start, codes_EOI.numpy(), error_EOI.numpy(), loss_EO.numpy())
