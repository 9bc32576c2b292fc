"""Grids: which numbers a weight may become, and how the numbers that describe this are stored. A solver takes any of them."""

from moebit.tensor.grids.base import Affine, Grid, QTensor, as_bits
from moebit.tensor.grids.float import FLOAT8, Float8Grid
from moebit.tensor.grids.uniform import CLIP_RATIOS, UniformGrid, UniformParams

__all__ = ["CLIP_RATIOS", "FLOAT8", "Affine", "Float8Grid", "Grid", "QTensor", "UniformGrid", "UniformParams", "as_bits"]
