"""Rounding a stack of matrices as a recipe says, and how far the result is from what it stands for.

Shape suffixes: E matrices, O outputs, I inputs.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from moebit.formats.native import PackedSpec
from moebit.recipe import Recipe
from moebit.tensor import Float8Grid, Grid, QTensor, SolveInfo, UniformGrid, refit_scales, solve_gptq, solve_rtn
from moebit.tensor.grids.ggml import GRIDS
from moebit.tensor.linalg import filled_diagonal

ERROR_WEIGHTS = 2**20  # weights whose errors are summed together


def grid_of(recipe: Recipe, spec: PackedSpec) -> Grid:
    """The recipe's grid as a stack of matrices has it."""
    chosen = recipe.weights
    if spec.ggml:
        return GRIDS[spec.ggml]
    if chosen.type == "fp8":
        return Float8Grid(chosen.group_size, spec.scale_dtype)
    return UniformGrid(chosen.group_size, chosen.symmetric, chosen.signed, spec.scale_dtype)


def solve(
    recipe: Recipe, w_EOI: Tensor, h_EII: Tensor | None, bits_E: Tensor, spec: PackedSpec, device: str
) -> tuple[QTensor, SolveInfo | None]:
    """Round a stack of matrices as the recipe says, on a device.

    Without a Hessian, weights are rounded to nearest. AWQ rounds to nearest, too, clipped by the Hessian's diagonal. All else is GPTQ.
    """
    sys.audit("moebit.solve", w_EOI, h_EII, bits_E)
    solver, grid, w = recipe.solver, grid_of(recipe, spec), w_EOI.to(device)
    if h_EII is None:
        return solve_rtn(w, bits_E, grid, clip_search=solver.clip_search), None
    if solver.method == "awq":
        importance = filled_diagonal(h_EII.to(device))
        return solve_rtn(w, bits_E, grid, importance_EI=importance, clip_search=solver.clip_search), None
    h = h_EII.to(device)
    q, info = solve_gptq(
        w, h, bits_E, grid,
        scales=solver.scales, act_order=solver.act_order, damping=solver.damping, clip_search=solver.clip_search,
    )  # fmt: skip
    if not (solver.refit and grid.refits):
        return q, info
    q, fallen = refit_scales(q, w, h, ~info.fallback)
    return q, replace(info, loss=info.loss - fallen)


def widths_of(spec: PackedSpec, start: int = 0, stop: int | None = None) -> Tensor:
    """int64 [E] bits of matrices [start, stop) of a stack."""
    return torch.tensor(spec.bits[start:stop])


def relative_error(value_EOI: Tensor, w_EOI: Tensor) -> list[float]:
    """|value - w|^2 / |w|^2 of every matrix, summed a few rows at a time."""
    missed, whole = torch.zeros(len(w_EOI), dtype=torch.float64), torch.zeros(len(w_EOI), dtype=torch.float64)
    step = max(1, ERROR_WEIGHTS // (w_EOI.shape[0] * w_EOI.shape[2]))
    for start in range(0, w_EOI.shape[1], step):
        w = w_EOI[:, start : start + step].float()
        missed += torch.linalg.vector_norm(value_EOI[:, start : start + step] - w, dim=(1, 2)).double().square()
        whole += torch.linalg.vector_norm(w, dim=(1, 2)).double().square()
    return (missed / whole.clamp(min=1e-30)).tolist()
