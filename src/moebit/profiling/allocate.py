"""`allocate`: a profile and a size become a width for everything: a bit plan that a person can edit and `quantize --plan` uses."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.engines import ANY, MARLIN_BITS, TRANSFORMERS, VLLM
from moebit.formats.native import PackedSpec, average_bits
from moebit.formats.profile import Profile, ProfiledModule
from moebit.methods.allocation import frequency_errors, fuzzy_widths, knapsack_choice
from moebit.methods.significance import baseline, expert_shares
from moebit.plan.bitplan import BitPlan
from moebit.profiling.profile import LADDER
from moebit.recipe import BIT_WIDTHS
from moebit.storage.durable import replace_text

METHODS = ("fuzzy", "knapsack", "frequency", "uniform")
GRANULARITIES = ("expert", "projection", "layer")
Member = tuple[str, str, int]  # module, projection ("" for a linear), expert (0 for a linear)


@dataclass(frozen=True)
class Allocation:
    """What `allocate` decided.

    Attributes:
        plan: widths by module. bits: experts module -> projection -> one width per expert.
        average_bits: of everything quantized, as on disk: codes, scales, zero points.
        counts: matrices by width, of every experts module and of the linears.
        made: how it came about, kept in the plan's file.
    """

    plan: BitPlan
    average_bits: float
    counts: dict[str, dict[int, int]]
    made: dict[str, Any]

    def document(self) -> str:
        """The plan's file."""
        body = {"version": 1, "made": self.made, "experts": self.plan.experts, "linears": self.plan.linears}
        return json.dumps(body, indent=1) + "\n"


def allocate(
    profile: str | Path | Profile,
    out: str | Path | None = None,
    *,
    target_bits: float,
    method: str = "fuzzy",
    ladder: Sequence[int] = LADDER,
    granularity: str | None = None,
    engine: str = ANY,
    significance: str = "mean",
    linear_bits: int | None = None,
) -> Allocation:
    """Choose widths so that the average on disk is at most `target_bits`.

    Args:
        profile: what `moebit profile` wrote. out: the plan's file, None to keep it in memory.
        method: `fuzzy` (MoQa), `knapsack` (measured errors), `frequency` (tokens alone) or `uniform`.
        ladder: widths to choose from.
        granularity: what has one width: an `expert`, a `projection` of an expert, or a `layer`'s experts. Fuzzy and frequency compare
            experts within a layer and know `expert` alone.
        engine: `vllm` allows what it serves: one width for a layer's experts and for linears that share an input, of 4 and 8.
        significance: `mean` or `max` over data sets (fuzzy).
        linear_bits: width of the linears outside of the experts, which methods other than knapsack leave alone; the largest width that
            the target would allow everything, if not given.

    Raises:
        BadInputError: a target below the lowest widths, errors that were not measured, a combination that makes no sense.
    """
    if not 0 < target_bits < math.inf:
        raise BadInputError(f"--target-bits {target_bits}: a positive number is expected")
    found = profile if isinstance(profile, Profile) else Profile.read(profile)
    if not found.sets:
        raise BadInputError(f"{found.path}: no data set in this profile; `moebit profile` again")
    rising = _ladder(found, method, ladder, engine)
    if linear_bits is not None and linear_bits not in BIT_WIDTHS:
        raise BadInputError(f"--linear-bits {linear_bits}: choose one of {', '.join(map(str, BIT_WIDTHS))}")
    problem = _Problem(found, method, rising, _granularity(method, granularity, engine), engine, linear_bits or 0)
    plan = problem.solve(target_bits, significance)
    made = {
        "by": "moebit allocate", "method": method, "target_bits": target_bits, "ladder": list(problem.ladder),
        "granularity": problem.granularity, "engine": engine, "significance": significance,
        "model": found.facts["model"], "input": found.facts["input"],
        "sets": {name: facts["sha256"] for name, facts in found.sets.items()},
    }  # fmt: skip
    average = problem.average(plan)
    result = Allocation(plan, average, problem.counts(plan), {**made, "average_bits": round(average, 6)})
    if out is not None:
        try:
            replace_text(Path(out), result.document())
        except OSError as error:
            raise BadInputError(f"-o {out}: {error.strerror}") from error
    return result


def _ladder(profile: Profile, method: str, ladder: Sequence[int], engine: str) -> tuple[int, ...]:
    if method not in METHODS:
        raise BadInputError(f"--method {method}: choose one of {', '.join(METHODS)}")
    if engine not in (ANY, TRANSFORMERS, VLLM):
        raise BadInputError(f"--engine {engine}: choose one of {', '.join((ANY, TRANSFORMERS, VLLM))}")
    rising = tuple(sorted(set(ladder)))
    if engine == VLLM:
        rising = tuple(width for width in rising if width in MARLIN_BITS)
    missing = [width for width in rising if width not in profile.widths]
    if not rising:
        raise BadInputError(f"--ladder {','.join(map(str, ladder))}: none of {', '.join(map(str, MARLIN_BITS))}, which vLLM serves")
    if missing and method == "knapsack":
        measured = ", ".join(map(str, profile.widths))
        raise BadInputError(f"--ladder: no errors were measured at {missing[0]} bits; choose of {measured}, or profile with more widths")
    return rising


def _granularity(method: str, granularity: str | None, engine: str) -> str:
    chosen = granularity or ("layer" if engine == VLLM else "expert")
    if chosen not in GRANULARITIES:
        raise BadInputError(f"--granularity {chosen}: choose one of {', '.join(GRANULARITIES)}")
    if engine == VLLM and chosen != "layer":
        raise BadInputError(f"--granularity {chosen}: vLLM wants one width for all experts of a layer; leave it out, or take layer")
    if method in ("fuzzy", "frequency") and chosen != "expert":
        raise BadInputError(f"--method {method} compares the experts of one layer, so {chosen} means nothing to it; take --method knapsack")
    return chosen


class _Problem:
    """Which widths are to be chosen, of what."""

    def __init__(self, profile: Profile, method: str, ladder: tuple[int, ...], granularity: str, engine: str, linear_bits: int) -> None:
        self.profile, self.method, self.ladder, self.granularity, self.engine = profile, method, ladder, granularity, engine
        if method == "knapsack" and not profile.has_errors:
            raise BadInputError(f"{profile.path}: errors were not measured; profile again without --no-errors, or choose another method")
        self.linear_bits = linear_bits

    def solve(self, target_bits: float, significance: str) -> BitPlan:
        """The plan.

        Raises:
            BadInputError: a target that the lowest widths exceed.
        """
        if self.method == "uniform":
            return self._uniform(target_bits)
        linears = self.profile.linears if self.method == "knapsack" else {}
        alone = self.linear_bits or max((w for w in self.ladder if self.average(self._alike(w)) <= target_bits), default=self.ladder[0])
        fixed = {name: alone for name in self.profile.linears if name not in linears}
        items = self._items(linears)
        sizes = torch.tensor([[self._bytes(members, width) for width in self.ladder] for members in items], dtype=torch.int64)
        weights = torch.tensor([self._weights(members) for members in items], dtype=torch.int64)
        total = sum(module_weights(module) for module in self.profile.modules.values())
        budget = int(target_bits * total / 8) - sum(self._bytes([(name, "", 0)], width) for name, width in fixed.items())
        try:
            choice = self._choose(items, sizes, weights, budget, significance)
        except ValueError:
            lowest = 8 * (int(sizes[:, 0].sum()) + int(target_bits * total / 8) - budget) / total
            held = f", with the linears outside of the experts at {alone}" if fixed else ""
            raise BadInputError(
                f"--target-bits {target_bits}: the lowest widths take {lowest:.4f} bits a weight with their scales{held}; "
                "raise the target or lower the ladder"
            ) from None
        return self._plan(items, [self.ladder[k] for k in choice.tolist()], fixed)

    def _choose(self, items: list[list[Member]], sizes: Tensor, weights: Tensor, budget: int, significance: str) -> Tensor:
        if self.method == "knapsack":
            return knapsack_choice(self._errors(items).mean(0), sizes, budget)
        names = list(self.profile.experts)
        if self.method == "frequency":
            shares = [self.profile.stacked(f"{name}.tokens").double() for name in names]
            over_sets = torch.cat([(t / t.sum(1, keepdim=True).clamp(min=1)).mean(0) for t in shares])
            return knapsack_choice(frequency_errors(over_sets, list(self.ladder)), sizes, budget)
        j = [baseline(expert_shares(self.profile.stacked(f"{name}.significance")), significance) for name in names]
        return fuzzy_widths(j, len(self.ladder), sizes, weights, budget)

    def _items(self, linears: Mapping[str, ProfiledModule]) -> list[list[Member]]:
        """What gets one width each, in the order of the layers."""
        items: list[list[Member]] = []
        for name, module in self.profile.experts.items():
            count, parts = range(module.experts), list(module.parts)
            if self.granularity == "layer":
                items.append([(name, part, e) for part in parts for e in count])
            elif self.granularity == "expert":
                items += [[(name, part, e) for part in parts] for e in count]
            else:
                items += [[(name, part, e)] for part in parts for e in count]
        groups: dict[tuple[int, int] | str, list[Member]] = {}
        for name, module in linears.items():
            groups.setdefault((module.layer, module.group) if self.engine == VLLM else name, []).append((name, "", 0))
        return items + list(groups.values())

    def _errors(self, items: list[list[Member]]) -> Tensor:
        """Return float64 [D, N, K], what rounding an item costs on each data set.

        The unit is nats per token where sensitivities were measured, else a share of the layer's output. An item that holds whole experts
        costs what was measured with all of their projections rounded: their errors point the same way and do not just add up.
        """
        columns = [self.profile.widths.index(width) for width in self.ladder]
        whole = self.granularity != "projection"
        costs: dict[tuple[str, str], Tensor] = {}
        for name, module in self.profile.modules.items():
            for part in ("",) if whole else module.parts:
                costs[name, part] = self._costs(f"{name}.{part}" if part else name)[:, columns]
        found = []
        for members in items:
            parts = {(name, "" if whole else part, expert) for name, part, expert in members}
            own = [costs[name, part][:, :, expert] for name, part, expert in sorted(parts)]
            found.append(torch.stack(own).sum(0))
        return torch.stack(found, 1)

    def _costs(self, full: str) -> Tensor:
        """Return float64 [D, W, E] (or [D, W, 1]), what rounding a matrix, or an expert, costs at every measured width."""
        error = self.profile.stacked(f"{full}.error").double()  # [D, W] or [D, W, E]
        error = error.view(len(error), len(self.profile.widths), -1)
        if self.profile.has_sensitivities:
            error = error * self.profile.stacked(f"{full}.sensitivity").unsqueeze(2)
        return error

    def _bytes(self, members: list[Member], width: int) -> int:
        return sum(self._spec(name, part, (width,)).nbytes for name, part, _ in members)

    def _spec(self, name: str, part: str, bits: tuple[int, ...]) -> PackedSpec:
        return self.profile.modules[name].spec(part, bits, self.profile.facts["group_size"], self.profile.facts["symmetric"])

    def _weights(self, members: list[Member]) -> int:
        shapes = [self.profile.modules[name].parts[part] for name, part, _ in members]
        return sum(out * inputs for out, inputs in shapes)

    def _plan(self, items: list[list[Member]], widths: list[int], fixed: Mapping[str, int]) -> BitPlan:
        experts: dict[str, dict[str, list[int]]] = {
            name: {part: [0] * module.experts for part in module.parts} for name, module in self.profile.experts.items()
        }
        linears = dict(fixed)
        for members, width in zip(items, widths, strict=True):
            for name, part, e in members:
                if part:
                    experts[name][part][e] = width
                else:
                    linears[name] = width
        short = {name: {part: bits[0] if len(set(bits)) == 1 else bits for part, bits in parts.items()} for name, parts in experts.items()}
        return BitPlan(short, {name: linears[name] for name in self.profile.linears})

    def _uniform(self, target_bits: float) -> BitPlan:
        for width in reversed(self.ladder):
            plan = self._alike(width)
            if self.average(plan) <= target_bits:
                return plan
        raise BadInputError(f"--target-bits {target_bits}: {self.ladder[0]} bits take {self.average(plan):.4f} with their scales")

    def _alike(self, width: int) -> BitPlan:
        return BitPlan(
            {name: {part: width for part in module.parts} for name, module in self.profile.experts.items()},
            {name: width for name in self.profile.linears},
        )

    def counts(self, plan: BitPlan) -> dict[str, dict[int, int]]:
        """How many matrices have which width."""
        result = {}
        for name, module in self.profile.experts.items():
            widths = [width for part in module.parts for width in plan.widths(name, part, module.experts, self.ladder[0])]
            result[name] = dict(sorted(Counter(widths).items()))
        return result | ({"linears": dict(sorted(Counter(plan.linears.values()).items()))} if plan.linears else {})

    def average(self, plan: BitPlan) -> float:
        """8 x bytes of codes, scales and zero points / weights, of everything that the profile's recipe quantizes."""
        specs: dict[str, dict[str, PackedSpec]] = {}
        for name, module in self.profile.modules.items():
            if module.experts:
                widths = {part: plan.widths(name, part, module.experts, self.ladder[0]) for part in module.parts}
                specs[name] = {part: self._spec(name, part, bits) for part, bits in widths.items()}
            else:
                specs[name] = {"": self._spec(name, "", (plan.linears[name],))}
        return average_bits(specs)


def module_weights(module: ProfiledModule) -> int:
    """Weights that a module's codes stand for."""
    return sum(out * inputs for out, inputs in module.parts.values()) * max(1, module.experts)


def measured_prices(profile: Profile, items: list[list[Member]], widths: Sequence[int]) -> Tensor:
    """Return float64 [N, W], what rounding each item to each measured width costs, as `--method knapsack` counts it: mean over data sets.

    Args:
        items: matrices that are rounded together. widths: some of those that the profile has.

    Raises:
        BadInputError: a profile without measured errors.
    """
    return _Problem(profile, "knapsack", tuple(widths), "projection", ANY, 0)._errors(items).mean(0)
