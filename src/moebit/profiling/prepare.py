"""What a quantization with `allocation` or `switching` needs before its first layer: a profile, widths, switchable channels.

The profile is made in OUT.partial/profile, data set by data set, and goes when the output is finished; what is decided stands in the
journal, so that a resumed run decides nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.followed import Output
from moebit.formats.output import PROFILE_DIRECTORY
from moebit.formats.profile import Profile
from moebit.formats.switch import SIDE_FILE, Channels, Usage, side_specs, write_side_file
from moebit.methods.significance import expert_shares
from moebit.methods.switching import switchable
from moebit.plan.bitplan import BitPlan
from moebit.plan.disk import DiskSize
from moebit.plan.plan import Plan
from moebit.profiling.allocate import allocate
from moebit.profiling.passes import Progress
from moebit.profiling.profile import run_profile
from moebit.profiling.spend import Spender, find_spender, limit_of, measured_widths
from moebit.recipe import Recipe
from moebit.storage.checkpoint import Checkpoint, checkpoint_fingerprint
from moebit.storage.files import shard_bytes

PICTURED_LAYERS, PICTURED_EXPERTS = 8, 128  # of which the report shows what is chosen together


@dataclass(frozen=True)
class Prepared:
    """What was decided.

    Attributes:
        bits: widths, None where the recipe's hold. facts: for moebit.json.
        coactivation: layer -> [E, E] tokens that both experts got, over the data sets, for the report.
    """

    bits: BitPlan | None
    facts: dict[str, Any]
    coactivation: dict[int, list[list[int]]]


def check_profile(profile: Profile, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a profile of another model, or of a grid that the recipe does not have.

    Raises:
        BadInputError: naming what differs.
    """
    grid = recipe.weights
    wanted = {
        "input": checkpoint_fingerprint(checkpoint),
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "signed": grid.signed,
    }
    if recipe.allocation.kind == "budget":  # which moves prices to any grid
        wanted = {"input": wanted["input"]}
    other = [key for key, value in wanted.items() if profile.facts.get(key) != value]
    if other:
        what = "of another checkpoint" if other[0] == "input" else f"with {other[0]} {profile.facts.get(other[0])}"
        raise BadInputError(f"--profile {profile.path}: was made {what}; profile this checkpoint with this recipe")


def prepare(
    output: Output,
    checkpoint: Checkpoint,
    plan: Plan,
    bits: BitPlan | None,
    sets: Mapping[str, Tensor] | Profile,
    progress: Progress,
    disk: DiskSize | None = None,
) -> Prepared:
    """Profile, allocate, choose channels and write the side file; from the journal where that was done.

    Args:
        plan: of the recipe without an allocation. bits: widths that were given, which an allocation then does not choose.
        sets: windows by data set, or a profile that is there. disk: sizes of the outputs, for a budget.
    """
    known = next((entry for entry in output.entries if entry["kind"] == "profile"), None)
    if known is None:
        profile = sets if isinstance(sets, Profile) else _profile(output, checkpoint, plan, sets, bits is None, progress)
        with torch.device("cpu"):  # what was measured is read from files, and decided upon on the host
            _record(output, checkpoint, plan, bits, profile, disk)
        known = output.entries[-1]
    chosen = None if known["plan"] is None else BitPlan.of(known["plan"])
    return Prepared(chosen, known["facts"], {int(layer): counts for layer, counts in known.get("coactivation", {}).items()})


def _profile(
    output: Output, checkpoint: Checkpoint, plan: Plan, sets: Mapping[str, Tensor], allocating: bool, progress: Progress
) -> Profile:
    section = plan.recipe.allocation
    errors = allocating and section.kind in ("knapsack", "budget")
    where = output.partial / PROFILE_DIRECTORY
    widths = measured_widths(section) if section.kind == "budget" else tuple(sorted(section.ladder))
    return run_profile(
        checkpoint, plan.structure, plan, sets, where, widths, pricing_solver(plan.recipe), errors, plan.budget.memory, progress
    )


def pricing_solver(recipe: Recipe) -> str:
    """What rounds where errors are measured, gptq or rtn: what the model will be rounded with, unless the recipe says otherwise."""
    chosen = recipe.allocation.solver
    return chosen if chosen != "auto" else "gptq" if recipe.solver.method == "gptq" else "rtn"


def priced(plan: Plan, profile: Profile, disk: DiskSize) -> Spender:
    """The choices that a recipe with a budget leaves, with the bytes of the side file that the native format has beside the weights."""
    side = 0
    if plan.recipe.format == "native":
        layouts = {layer.experts: layer.moe.layout for layer in plan.structure.layers if layer.moe}
        side = shard_bytes(side_specs(disk.weights, layouts, _usage(profile), _channels(profile, plan.recipe)))
    return find_spender(plan, profile, replace(disk, beside=side))


def spend(plan: Plan, profile: Profile, disk: DiskSize) -> tuple[BitPlan, dict[str, Any]]:
    """What a recipe's budget is spent on, and what there is to say about it.

    Raises:
        BadInputError: less than the smallest output, or more than the largest.
    """
    spent = priced(plan, profile, disk).spend(limit_of(plan))
    return spent.plan, {"method": "budget", "ladder": list(plan.recipe.allocation.ladder), **spent.describe()}


def _record(output: Output, checkpoint: Checkpoint, plan: Plan, bits: BitPlan | None, profile: Profile, disk: DiskSize | None) -> None:
    """Decide, write the side file, and note both."""
    recipe, made = plan.recipe, None
    section = recipe.allocation
    if bits is None and section.kind == "budget":
        assert disk is not None
        bits, made = spend(plan, profile, disk)
    elif bits is None and section.kind != "uniform":
        assert section.target_bits is not None
        result = allocate(
            profile,
            target_bits=section.target_bits,
            method=section.kind,
            ladder=section.ladder,
            granularity=None if section.engine == "vllm" else section.granularity,
            engine=section.engine,
            significance=section.significance,
            linear_bits=recipe.weights.bits,
        )
        bits, made = result.plan, {key: value for key, value in result.made.items() if key not in ("by", "model", "input", "sets")}
    usage, channels = _usage(profile), _channels(profile, recipe)
    files: list[str] = []
    if recipe.format == "native":  # what looks at it reads no other
        layouts = {layer.experts: layer.moe.layout for layer in plan.structure.layers if layer.moe}
        chunk = {layer.experts: plan.chunk[layer.index] for layer in plan.structure.layers if layer.moe}
        with output.shard(SIDE_FILE, side_specs(checkpoint.weights, layouts, usage, channels)) as shard:
            write_side_file(shard, checkpoint.weights, layouts, usage, channels, chunk)
        files = [SIDE_FILE]
    facts: dict[str, Any] = {"sets": {name: dict(item) for name, item in profile.sets.items()}, "allocation": made}
    if channels:
        facts["switching"] = {"share": recipe.switching.share, "channels": sum(len(chosen.expert) for chosen in channels.values())}
    written = None if bits is None else bits.describe()
    output.record("profile", files, plan=written, facts=facts, coactivation=_coactivation(profile))


def _coactivation(profile: Profile) -> dict[int, list[list[int]]]:
    """Co-activation of a few layers, evenly spread, where a picture of it can still be read."""
    known = [
        (module.layer, name) for name, module in profile.experts.items() if len(profile.stacked(f"{name}.tokens")[0]) <= PICTURED_EXPERTS
    ]
    some = known[:: max(1, -(-len(known) // PICTURED_LAYERS))]
    return {layer: profile.stacked(f"{name}.coactivation").sum(0).tolist() for layer, name in some}


def _usage(profile: Profile) -> dict[str, Usage]:
    return {
        name: Usage(
            profile.stacked(f"{name}.tokens"),
            torch.stack([expert_shares(s).float() for (s,) in profile.over_sets(f"{name}.significance")]),
        )
        for name in profile.experts
    }


def _channels(profile: Profile, recipe: Recipe) -> dict[str, Channels]:
    """Switchable channels by experts module.

    Raises:
        BadInputError: a single data set, on which nothing changes.
    """
    share = recipe.switching.share
    if not share:
        return {}
    if len(profile.sets) < 2:
        raise BadInputError(
            "switching: which channels change with the data takes two data sets or more to see; give --text NAME=FILE several times"
        )
    return {name: Channels(*switchable(profile.stacked(f"{name}.significance"), share, recipe.switching.per)) for name in profile.experts}
