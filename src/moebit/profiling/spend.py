"""The best model of a size: every item gets the grid with which the sum of predicted losses is least, under the bytes of the whole output.

The sum is minimised by `knapsack_choice` (methods/allocation.py) over items and candidates (choices.py), with measured prices moved to
every candidate (rounding.py). Bytes are those of the files. What does not depend on the choice is measured once, on the smallest output.
What the choice changes beside the weights (lengths of headers) is measured on the choice itself, which is made again with so much less
until it fits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moebit import words
from moebit.errors import BadInputError
from moebit.formats.profile import Profile, ProfiledModule
from moebit.methods.allocation import knapsack_choice
from moebit.plan.bitplan import BitPlan
from moebit.plan.disk import DiskSize
from moebit.plan.plan import Plan
from moebit.profiling.allocate import measured_prices
from moebit.profiling.choices import Item, build, find_items, padded
from moebit.profiling.rounding import RoundingErrors, moved_prices
from moebit.recipe.allocation import AllocationSection
from moebit.tensor import UniformGrid

ROUNDS = 16  # of choosing with a little less
NEIGHBOURS = (-2, -1, 1, 2)  # steps around a size that a dry run shows


@dataclass(frozen=True)
class Point:
    """A size, in bytes, and the loss that is predicted for the best choice of that size."""

    size_bytes: int
    loss: float


@dataclass(frozen=True)
class Spent:
    """What was decided for a size.

    Attributes:
        plan: widths or types. size_bytes: of the output. limit_bytes: that were allowed. loss: predicted, in `unit`.
        counts: items' matrices by label. neighbours: sizes around this one, and what is predicted there.
        smallest, largest: bytes of the smallest and of the largest output that this format and engine can be given.
    """

    plan: BitPlan
    size_bytes: int
    limit_bytes: int
    loss: float
    unit: str
    counts: dict[str, int]
    neighbours: tuple[Point, ...]
    smallest: int
    largest: int

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        near = [{"size_bytes": p.size_bytes, "loss": p.loss} for p in self.neighbours]
        return {
            "size_bytes": self.size_bytes, "limit_bytes": self.limit_bytes, "predicted_loss": self.loss, "unit": self.unit,
            "matrices": self.counts, "neighbours": near, "smallest_bytes": self.smallest, "largest_bytes": self.largest,
        }  # fmt: skip


def find_spender(plan: Plan, profile: Profile, disk: DiskSize) -> Spender:
    """The choices that a recipe's format and engine leave, priced.

    Args:
        plan: of the recipe, before anything is chosen. disk: sizes of its outputs.

    Raises:
        BadInputError: a profile without measured errors, or without some of what is quantized.
    """
    if not profile.has_errors:
        raise BadInputError(f"{profile.path}: errors were not measured; profile again without --no-errors")
    grid, section = plan.recipe.weights, plan.recipe.allocation
    items = find_items(plan, profile, disk.weights, disk.gguf)
    errors = RoundingErrors.of(disk.weights, plan.structure, profile, UniformGrid(grid.group_size, grid.symmetric, grid.signed))
    prices = item_prices(profile, items, errors)
    unit = "nats per token" if profile.has_sensitivities else "share of the layers' outputs"
    if section.target_bytes is not None:
        return Spender(items, prices, profile.modules, disk.of, unit)
    weights = sum(spec.weights for parts in plan.modules.values() for spec in parts.values())

    def measure(bits: BitPlan) -> int:
        return round(disk.planned(bits).average_bits * weights / 8)

    return Spender(items, prices, profile.modules, measure, unit, "--bits", lambda count: f"{8 * count / weights:.4f} bits a weight")


def measured_widths(section: AllocationSection) -> tuple[int, ...]:
    """The widths that prices are measured at: those of a ladder that cannot as well be read between two others."""
    rising = sorted(section.ladder)
    between = {width for width in rising[1:-1] if width - 1 in rising and width + 1 in rising and width > 4}
    return tuple(width for width in rising if width not in between)


def limit_of(plan: Plan) -> int:
    """The bytes that a recipe's budget allows: of the whole output, or of what is quantized in it."""
    section = plan.recipe.allocation
    if section.target_bytes is not None:
        return section.target_bytes
    assert section.target_bits is not None
    weights = sum(spec.weights for parts in plan.modules.values() for spec in parts.values())
    return int(section.target_bits * weights / 8)


def item_prices(profile: Profile, items: Sequence[Item], errors: RoundingErrors) -> list[list[float]]:
    """The predicted loss of every item on each of its candidates: nats per token, or a share of the layer's output."""
    widths = [int(width) for width in profile.widths]
    members = [[member] for item in items for member in item.members]
    known = dict(zip([m[0] for m in members], measured_prices(profile, members, widths), strict=True))  # [W] each
    return [_prices_of(item, known, widths, errors) for item in items]


def _prices_of(item: Item, known: Mapping[tuple[str, str, int], Tensor], widths: Sequence[int], errors: RoundingErrors) -> list[float]:
    total = torch.zeros(len(item.labels), dtype=torch.float64)
    for (name, part), numbers in item.parts.items():
        price_WE = torch.stack([known[name, part, expert] for expert in numbers], 1)
        at = [errors.measured_at(name, part, width) for width in widths]
        total += moved_prices(price_WE, at, [errors.candidate(name, part, label) for label in item.labels]).sum(1)
    return [float(x) for x in total]


@dataclass
class Spender:
    """Choices for one model, format and engine.

    Attributes:
        items, prices: what is chosen, and the predicted loss of every candidate. modules: of the profile.
        measure: the bytes of the whole output of a choice. unit: of the loss. what: the option that says the limit, for messages.
    """

    items: list[Item]
    prices: list[list[float]]
    modules: Mapping[str, ProfiledModule]
    measure: Callable[[BitPlan], int]
    unit: str = "nats per token"
    what: str = "--size"
    shown: Callable[[int], str] = words.size
    _sizes: Tensor = field(init=False)
    _errors: Tensor = field(init=False)
    _base: int = field(init=False)
    smallest: int = field(init=False)
    largest: int = field(init=False)

    def __post_init__(self) -> None:
        self.items, self.prices = zip(*map(_worth_it, self.items, self.prices), strict=True)  # type: ignore[assignment]
        self._sizes, self._errors = padded([item.sizes for item in self.items]).to(torch.int64), padded(self.prices)
        self.smallest = self.measure(self._plan(torch.zeros(len(self.items), dtype=torch.int64)))
        self._base = self.smallest - int(self._sizes[:, 0].sum())
        self.largest = self.measure(self._plan(torch.tensor([len(item.sizes) - 1 for item in self.items])))

    def spend(self, limit: int) -> Spent:
        """The best choice whose output has at most `limit` bytes.

        Raises:
            BadInputError: less than the smallest output, or more than the largest.
        """
        self._check(limit)
        allowed = limit - self._base
        for _ in range(ROUNDS):
            try:
                choice = knapsack_choice(self._errors, self._sizes, allowed)
            except ValueError:
                choice = torch.zeros(len(self.items), dtype=torch.int64)
            total = self.measure(self._plan(choice))
            if total <= limit:
                break
            allowed -= total - limit
        else:
            choice = torch.zeros(len(self.items), dtype=torch.int64)
            total = self.smallest
        return Spent(
            self._plan(choice), total, limit, self._loss(choice), self.unit, self._counts(choice), self._around(limit), self.smallest,
            self.largest,
        )  # fmt: skip

    def predicted(self, size: int) -> Point | None:
        """The best choice of about that size, without measuring it; None where there is none."""
        if not self.smallest <= size <= self.largest:
            return None
        choice = knapsack_choice(self._errors, self._sizes, max(size - self._base, int(self._sizes[:, 0].sum())))
        return Point(self._base + int(self._sizes.gather(1, choice.unsqueeze(1)).sum()), self._loss(choice))

    def _check(self, limit: int) -> None:
        if limit < self.smallest:
            raise BadInputError(
                f"{self.what} {self.shown(limit)}: the smallest output of this model in this format has {self.shown(self.smallest)} "
                f"({self.smallest:,} bytes of {limit:,}); allow that much, add smaller widths to allocation.ladder (or types to "
                "allocation.types), or choose another engine"
            )
        if limit > self.largest:
            raise BadInputError(
                f"{self.what} {self.shown(limit)}: the largest output of this model in this format has {self.shown(self.largest)} "
                f"({self.largest:,} bytes of {limit:,}); give at most that, or quantize with a preset of 8 bits"
            )

    def _plan(self, choice: Tensor) -> BitPlan:
        labels = [item.labels[k if k < len(item.labels) else -1] for item, k in zip(self.items, choice.tolist(), strict=True)]
        return build(self.items, labels, self.modules)

    def _loss(self, choice: Tensor) -> float:
        return float(self._errors.gather(1, choice.unsqueeze(1)).sum())

    def _counts(self, choice: Tensor) -> dict[str, int]:
        counted = Counter[str]()
        for item, k in zip(self.items, choice.tolist(), strict=True):
            counted[str(item.labels[min(k, len(item.labels) - 1)])] += len(item.members)
        return dict(sorted(counted.items()))

    def _around(self, limit: int) -> tuple[Point, ...]:
        step = round_step(limit)
        found = [self.predicted(limit + number * step) for number in NEIGHBOURS]
        return tuple(point for point in found if point is not None)


def _worth_it(item: Item, prices: Sequence[float]) -> tuple[Item, list[float]]:
    """An item without candidates that cost more than a smaller one, or take as much and cost more."""
    kept: list[int] = []
    for k in sorted(range(len(item.sizes)), key=lambda k: (item.sizes[k], prices[k])):
        if not kept or (item.sizes[k] > item.sizes[kept[-1]] and prices[k] <= prices[kept[-1]]):
            kept.append(k)
    labels, sizes = tuple(item.labels[k] for k in kept), tuple(item.sizes[k] for k in kept)
    return Item(item.members, labels, sizes, item.tensors), [prices[k] for k in kept]


def round_step(size: int) -> int:
    """A round number of bytes, about a twelfth of a size: 1 GB of 12 GB."""
    aim = size / 12
    unit = 10.0 ** math.floor(math.log10(max(aim, 1)))
    return int(unit * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * unit / aim))))
