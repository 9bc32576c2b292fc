"""The solver's inner loop for CUDA devices (Triton); `moebit.tensor.kernels` has the form for CPUs.

Imported only where it is used: moebit runs without Triton. In Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the
kernel also takes tensors on the CPU, which is how the tests without a device run it.
"""

# mypy: disable-error-code="misc,no-untyped-def"
# (Kernels are not annotated: Triton reads annotations as types of its own.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # rows of a matrix that one program rounds side by side
BEYOND = 1024.0  # in multiples of the scale: farther from zero, every code of 8 bits is clamped anyway
# 1.5 * 2^23 and 1.5 * 2^52: added to a number within BEYOND they leave no bits for its fraction, so that it is rounded, ties to even.
MAGIC = {torch.float32: 12582912.0, torch.float64: 6755399441055744.0}


@triton.jit
def _gptq_block(
    w, carried, f, d, scale, zero, group, qmax, start, codes, error, loss,
    rows, inputs, groups, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEYOND: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    line = e * rows + row  # of the stack flattened to [E * O, ...]
    live = row < rows
    inside = live[:, None] & (column < width)[None, :]
    left = tl.load(w + line[:, None] * inputs + start + column[None, :], mask=inside, other=0)
    target = tl.load(carried + line[:, None] * width + column[None, :], mask=inside, other=0) + left
    total = tl.load(loss + line, mask=live, other=0)
    top = tl.load(qmax + e)
    chosen = tl.zeros([ROWS, COLUMNS], tl.uint8)
    for back in range(width):
        k = width - 1 - back
        here = (column == k)[None, :]
        g = tl.load(group + e * inputs + start + k)
        s = tl.load(scale + line * groups + g, mask=live, other=1)
        z = tl.load(zero + line * groups + g, mask=live, other=0)
        value = tl.sum(tl.where(here, target, 0), 1)  # the column, out of registers
        ratio = value / s if value.dtype == tl.float64 else tl.div_rn(value, s)
        nearest = (tl.minimum(tl.maximum(ratio, -BEYOND), BEYOND) + MAGIC) - MAGIC
        code = tl.minimum(tl.maximum(nearest + z, 0), top)
        point = s * (code - z)
        gap = value - point
        total += tl.load(d + e * inputs + start + k) * (gap * gap)
        missed = tl.sum(tl.where(here, left, 0), 1) - point
        left = tl.where(here, missed[:, None], left)
        chosen = tl.where(here, code.to(tl.uint8)[:, None], chosen)
        weight = tl.load(f + (e * width + k) * width + column, mask=column < k, other=0)  # only below the diagonal is F
        target += missed[:, None] * weight[None, :]
    place = line[:, None] * inputs + start + column[None, :]
    tl.store(codes + place, chosen, mask=inside)
    tl.store(error + place, left, mask=inside)
    tl.store(loss + line, total, mask=live)


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
    """`kernels.gptq_block` in one launch over experts x rows: the same arguments, float32 or float64.

    The arithmetic is that of the plain form (`solver.gptq_block`), operation by operation: nothing is fused, division rounds correctly.
    """
    experts, rows, inputs = w_EOI.shape
    width = carried_EOB.shape[2]
    read = [t.contiguous() for t in (w_EOI, carried_EOB, f_EBB, d_EI, scale_EOG, zero_EOG, group_EI, qmax_E)]
    sizes = (rows, inputs, scale_EOG.shape[2], width)
    with torch.cuda.device_of(w_EOI):
        _gptq_block[experts, triton.cdiv(rows, ROWS)](
            *read, start, codes_EOI, error_EOI, loss_EO, *sizes,
            ROWS=ROWS, COLUMNS=triton.next_power_of_2(width), BEYOND=BEYOND, MAGIC=MAGIC[w_EOI.dtype],
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
