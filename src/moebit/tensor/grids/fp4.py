"""FP4 grids as engines other than llama.cpp store them: any number of groups a row, where ggml has blocks of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moebit.tensor.grids.ggml_fp4 import Mxfp4Grid, Nvfp4Grid
from moebit.tensor.grids.ggml_grid import GgmlGrid


@dataclass(frozen=True)
class GroupedNvfp4Grid(Nvfp4Grid):
    """NVFP4 without ggml's blocks of four groups."""

    def check(self, in_features: int) -> None:
        """Refuse rows that cannot be cut into groups.

        Raises:
            ValueError: 16 does not divide `in_features`.
        """
        if in_features % self.group:
            raise ValueError(f"nvfp4 has groups of {self.group} weights, which do not divide rows of {in_features}")


FP4_GRIDS: dict[str, GgmlGrid[Any]] = {"nvfp4": GroupedNvfp4Grid(), "mxfp4": Mxfp4Grid()}
