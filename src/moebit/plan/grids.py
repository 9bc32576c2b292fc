"""Which grid a module gets: the recipe's, what an override says of it, and another group size where rows need one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.recipe import Recipe
from moebit.recipe.weights import BLOCK_TYPES, GROUP_SIZES
from moebit.tensor.layouts import mlx

ROW, KEEP = "row", "keep"
FP8_ROWS = 128  # output channels of a block of FP8


@dataclass(frozen=True)
class Grid:
    """What is asked of one module, as its matrices allow it: the width where no bit plan says another, and the group size."""

    bits: int
    group_size: int


@dataclass
class GridChooser:
    """Decides module by module while the plan walks through the layers.

    Attributes:
        instead: module -> the group size that it got in the place of the recipe's. used: patterns of overrides that matched something.
    """

    recipe: Recipe
    instead: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def choose(self, name: str, shapes: Sequence[tuple[int, int]]) -> Grid | str:
        """Return the grid of a module, or the reason why it stays in full precision.

        Args:
            name: full name of the module. shapes: (out, in) of its matrices; experts have one group size for all projections, because
                engines have one.

        Raises:
            BadInputError: an override whose group size does not divide the rows.
        """
        wanted, override = self.recipe.weights, None
        if not wanted.ggml:
            override = next((one for one in wanted.overrides if one.matches(name)), None)
        if override is not None:
            self.used.add(override.match)
        bits = override.bits if override and override.bits else wanted.bits
        size = override.group_size if override and override.group_size else wanted.group_size
        rows = [inputs for _, inputs in shapes]
        if wanted.type == "nvfp4" and self.recipe.format == "mlx" and len(shapes) == 1:
            return "mlx-lm has no place for the scale of the whole matrix of an NVFP4 linear, only of experts"
        if wanted.type in BLOCK_TYPES:
            reason = self._misfit(rows, [out for out, _ in shapes])
            return reason or Grid(bits, size)
        if _fits(size, rows):
            return Grid(bits, size)
        if override and override.group_size:
            raise BadInputError(
                f"weights.overrides: group size {size} does not divide the {next(n for n in rows if n % size)} input channels of {name}; "
                f"choose one of {', '.join(map(str, _fitting(rows)))}"
            )
        return self._instead(name, bits, rows)

    def _misfit(self, rows: list[int], outs: list[int]) -> str | None:
        kind = self.recipe.weights.type
        odd = next((n for n in rows if n % self.recipe.weights.group_size), None)
        if odd:
            return f"{kind} has blocks of {self.recipe.weights.group_size} weights, which do not divide its rows of {odd}"
        odd = next((n for n in outs if n % FP8_ROWS), None) if kind == "fp8-block" else None
        return f"{kind} has blocks of {FP8_ROWS} rows, which do not divide its {odd} rows" if odd else None

    def _instead(self, name: str, bits: int, rows: list[int]) -> Grid | str:
        wanted, fallback = self.recipe.weights.group_size, self.recipe.weights.group_size_fallback
        if fallback == KEEP:
            return f"group size {wanted} does not divide its {next(n for n in rows if n % wanted)} input channels"
        smaller = [size for size in _fitting(rows) if size == -1 or size < wanted]
        if isinstance(fallback, int):
            smaller = [size for size in smaller if size in (fallback, -1)]
        size = -1 if fallback == ROW else smaller[0]
        if size == -1 and self.recipe.format == "mlx":
            return f"format mlx has groups of {', '.join(map(str, mlx.GROUPS))}, none of which divides its rows of {rows[0]}"
        self.instead[name] = size
        return Grid(bits, size)

    def check(self, first: str) -> None:
        """Refuse an override that matched nothing; `first` is the name of a module, for the message."""
        for override in () if self.recipe.weights.ggml else self.recipe.weights.overrides:
            if override.match not in self.used:
                raise BadInputError(
                    f"weights.overrides: {override.match!r} matches no linear and no experts that are quantized (names look like {first!r})"
                )

    def spec(self, grid: Grid, shape: tuple[int, int], bits: tuple[int, ...], dtype: torch.dtype, *, stacked: bool) -> PackedSpec:
        """Return how a stack of matrices is stored, apart from what happens to its inputs."""
        w = self.recipe.weights
        spec = PackedSpec(bits, shape, grid.group_size, w.symmetric, dtype, stacked, w.float8)
        if w.fp4:
            return replace(spec, ggml=w.type)
        return replace(spec, block_rows=FP8_ROWS) if w.type == "fp8-block" else spec


def _fits(size: int, rows: list[int]) -> bool:
    return size == -1 or not any(n % size for n in rows)


def _fitting(rows: list[int]) -> list[int]:
    """Group sizes that divide all these rows, the largest first and the whole row last."""
    return [size for size in sorted(GROUP_SIZES, reverse=True) if _fits(size, rows)]
