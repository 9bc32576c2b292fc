"""`--size` and `--bits`: the recipe that they mean, and what a dry run can say of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.profile import Profile
from moebit.memory import Memory, asked_bytes
from moebit.plan.disk import DiskSize
from moebit.plan.plan import Plan
from moebit.profiling.passes import Progress
from moebit.profiling.prepare import pricing_solver, spend
from moebit.profiling.profile import run_profile
from moebit.profiling.spend import measured_widths
from moebit.recipe import BIT_WIDTHS, Recipe, load_recipe
from moebit.storage.checkpoint import Checkpoint

# What an engine reads, and can be given the finest choice of.
FORMATS = {
    "any": "native",
    "transformers": "native",
    "vllm": "compressed-tensors",
    "sglang": "compressed-tensors",
    "llama.cpp": "gguf",
    "mlx": "mlx",
}
BEST = {2: "best-w2", 3: "best-w3", 4: "best-w4"}  # the best preset around so many bits
GGUF_PRESET = "gguf-q4_k_m"


def budget_changes(engine: str, size: Memory | None, bits: float | None) -> dict[str, Any]:
    """The changes of a recipe that a size, or an average of bits, means; none without either.

    Raises:
        BadInputError: both of them, a number that means nothing, an unknown engine.
    """
    if size is None and bits is None:
        return {}
    if size is not None and bits is not None:
        raise BadInputError("--size and --bits: give one of the two")
    if engine not in FORMATS:
        raise BadInputError(f"--engine {engine}: choose one of {', '.join(FORMATS)}")
    if bits is not None and not 0 < bits <= 16:
        raise BadInputError(f"--bits {bits}: a number of bits per weight, above 0 and at most 16, is expected")
    return {
        "allocation.kind": "budget",
        "allocation.target_bytes": None if size is None else asked_bytes(size),
        "allocation.target_bits": bits,
        "allocation.granularity": "projection",
        "allocation.ladder": list(BIT_WIDTHS),
        "allocation.engine": engine,
    }


def budget_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
    overrides: Mapping[str, Any],
    budget: Mapping[str, Any],
    checkpoint: Checkpoint,
) -> Recipe:
    """The recipe of a budget: what is given, or else the best preset for the format and for about that many bits.

    Args:
        overrides: go before everything. budget: of `budget_changes`.

    Raises:
        BadInputError: a recipe that cannot be.
    """
    engine = budget["allocation.engine"]
    changes = dict(budget)
    if recipe is None:
        changes["format"] = FORMATS.get(engine, "native")
        gguf = {**changes, **overrides}.get("format") == "gguf"
        recipe = GGUF_PRESET if gguf else BEST[min(4, max(2, round(_bits(budget, checkpoint))))]
        changes |= {"weights.mixture": "none"} if gguf else {}
    return load_recipe(recipe, {**changes, **overrides})


def _bits(budget: Mapping[str, Any], checkpoint: Checkpoint) -> float:
    """About how many bits a weight may have."""
    if budget["allocation.target_bits"] is not None:
        return float(budget["allocation.target_bits"])
    weights = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return 8 * float(budget["allocation.target_bytes"]) / weights


def preview(checkpoint: Checkpoint, plan: Plan, disk: DiskSize, sets: Mapping[str, Tensor] | Profile, progress: Progress) -> Plan:
    """What a budget would be spent on; a profile that is not there is made for it, and thrown away."""
    if isinstance(sets, Profile):
        return _spent(plan, disk, sets)
    with tempfile.TemporaryDirectory() as directory:
        section, where = plan.recipe.allocation, Path(directory) / "profile"
        widths, memory = measured_widths(section), plan.budget.memory
        found = run_profile(checkpoint, plan.structure, plan, sets, where, widths, pricing_solver(plan.recipe), True, memory, progress)
        return _spent(plan, disk, found)


def _spent(plan: Plan, disk: DiskSize, profile: Profile) -> Plan:
    bits, said = spend(plan, profile, disk)
    return replace(disk.planned(bits), spent=said)
