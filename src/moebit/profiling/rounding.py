"""What a grid costs that was not measured: measured prices, moved by how much coarser or finer the grid rounds.

A profile has the price of every matrix at a few integer widths (prices.py). The price of a matrix is nearly proportional to the squared
error of its rounded weights as long as the error is small, and bends where it is not; both can be read off the measured widths. So the
squared error of every candidate grid is measured on a sample of the matrix's own rows, which needs no data. The price is then read from
the curve of price against error: straight between two measured widths on logarithmic axes, and proportional beyond them.

One profile then serves every format: block types of ggml, other group sizes, widths that were left out.

Shape suffixes: W measured widths, L candidate grids, E experts, R sampled rows, I input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebit.formats.profile import Profile
from moebit.model.experts import read_experts
from moebit.model.structure import Structure
from moebit.storage.weights import Weights
from moebit.tensor import UniformGrid, solve_rtn
from moebit.tensor.grids.base import Grid
from moebit.tensor.grids.ggml import GRIDS
from moebit.tensor.spacing import evenly_spaced

Label = int | str  # an integer width on the recipe's grid, or a block type of ggml
SAMPLED_EXPERTS, SAMPLED_ROWS = 8, 128  # of a projection, rows of all these experts together
LEAST = 1e-300


def relative_error(w_RI: Tensor, grid: Grid, bits: int) -> float:
    """Return |Q(w) - w|^2 / |w|^2 of rows rounded to nearest, with searched ranges; 0 for rows that are all zero."""
    w = w_RI.float().unsqueeze(0)
    missed = solve_rtn(w, bits, grid).dequantize() - w
    whole = float(w.double().square().sum())
    return float(missed.double().square().sum()) / whole if whole else 0.0


def moved_prices(price_WE: Tensor, error_W: Sequence[float], wanted_L: Sequence[float]) -> Tensor:
    """Return float64 [L, E], prices at other squared errors.

    Args:
        price_WE: measured prices. error_W: the squared errors that they were measured at. wanted_L: those that prices are wanted for.
    """
    order = sorted(range(len(error_W)), key=lambda w: error_W[w])
    x = torch.tensor([max(error_W[w], LEAST) for w in order], dtype=torch.float64).log()
    y = price_WE.double()[order].clamp(min=LEAST).log()
    wanted = torch.tensor(list(wanted_L), dtype=torch.float64).clamp(min=LEAST).log()
    above = torch.searchsorted(x, wanted).clamp(1, max(1, len(x) - 1))
    if len(x) == 1:
        found = y + (wanted - x).unsqueeze(1)
    else:
        low, high = above - 1, above
        share = ((wanted - x[low]) / (x[high] - x[low]).clamp(min=1e-9)).unsqueeze(1)
        inside = y[low] + share.clamp(0, 1) * (y[high] - y[low])
        beyond = (wanted - x[-1]).clamp(min=0) + (wanted - x[0]).clamp(max=0)
        found = inside + beyond.unsqueeze(1)
    return torch.where((price_WE.double() > 0).any(0), found.exp(), torch.zeros((), dtype=torch.float64))


@dataclass
class RoundingErrors:
    """The squared errors of grids on sampled rows of a checkpoint's matrices, each computed once.

    Attributes:
        grid: what an integer label means in the output. measured: what a width meant when prices were measured.
    """

    weights: Weights
    structure: Structure
    grid: UniformGrid
    measured: UniformGrid
    _rows: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Weights, structure: Structure, profile: Profile, grid: UniformGrid) -> RoundingErrors:
        """For a profile's measured widths and candidates of `grid`."""
        facts = profile.facts
        measured = UniformGrid(facts["group_size"], facts["symmetric"], facts["signed"])
        return cls(weights, structure, grid, measured)

    def measured_at(self, name: str, part: str, bits: int) -> float:
        """The error of a width as it was when prices were measured."""
        return self._error(name, part, self.measured, bits)

    def candidate(self, name: str, part: str, label: Label) -> float:
        """The error of a candidate."""
        if isinstance(label, int):
            return self._error(name, part, self.grid, label)
        return self._error(name, part, GRIDS[label], GRIDS[label].bits)

    def _error(self, name: str, part: str, grid: Grid, bits: int) -> float:
        key = (name, part, repr(grid), bits)
        if key not in self._known:
            self._known[key] = relative_error(self._sample(name, part), grid, bits)
        return self._known[key]

    def _sample(self, name: str, part: str) -> Tensor:
        """[R, I] rows of a linear (part ""), or of some experts' projection, evenly spread."""
        if (name, part) not in self._rows:
            self._rows = {(name, part): self._read(name, part)}  # one at a time: who asks goes through grids first
        return self._rows[name, part]

    def _read(self, name: str, part: str) -> Tensor:
        if not part:
            return _some(self.weights.parameter(f"{name}.weight"), SAMPLED_ROWS)
        sites = next(layer for layer in self.structure.moe_layers if layer.experts == name)
        assert sites.moe is not None
        layout = sites.moe.layout
        chosen = evenly_spaced(layout.experts, min(SAMPLED_EXPERTS, layout.experts)).tolist()
        rows = []
        for expert in chosen:
            read = read_experts(self.weights, name, layout, expert, expert + 1)
            matrix = read.down[0] if part == "down_proj" else read.first[0, layout.rows(part)]
            rows.append(_some(matrix, -(-SAMPLED_ROWS // len(chosen))))
        return torch.cat(rows)


def _some(matrix_OI: Tensor, count: int) -> Tensor:
    return matrix_OI[evenly_spaced(len(matrix_OI), min(count, len(matrix_OI)))]
