"""Pure tensor mathematics: quantization grids, packing, factorisations, solvers. Knows no model.

Shape suffixes: E experts (or matrices in a batch), O output channels, I input channels, N = I, G groups, T tokens.
"""

from moebit.tensor.grids import Float8Grid, Grid, QTensor, UniformGrid, UniformParams
from moebit.tensor.grids.uniform import minmax_grid, round_to_grid, search_grid
from moebit.tensor.linalg import add_second_moment, damp, factor_, mirror_, second_moment, shrink, shrink_
from moebit.tensor.packing import pack, packed_row_bytes, unpack
from moebit.tensor.refit import refit_scales
from moebit.tensor.solver import SolveInfo, backend_of, solve_gptq, solve_rtn

__all__ = [
    "Float8Grid",
    "Grid",
    "QTensor",
    "SolveInfo",
    "UniformGrid",
    "UniformParams",
    "add_second_moment",
    "backend_of",
    "damp",
    "factor_",
    "minmax_grid",
    "mirror_",
    "pack",
    "packed_row_bytes",
    "refit_scales",
    "round_to_grid",
    "search_grid",
    "second_moment",
    "shrink",
    "shrink_",
    "solve_gptq",
    "solve_rtn",
    "unpack",
]
