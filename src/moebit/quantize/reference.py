"""Full precision's side of a layer: what its router says, and what arrives where weights are corrected for the drift of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moebit.model.seam import silent
from moebit.model.structure import LayerSites, LinearGroup
from moebit.plan.plan import Plan
from moebit.streaming.reference import captured_inputs
from moebit.streaming.routing import Routing, reference_step
from moebit.streaming.stream import Stream


@dataclass(frozen=True)
class FullPrecision:
    """What the layer in full precision makes of the calibration set.

    Attributes:
        routing: what its router says; None where nothing is compared with that.
        inputs: [T, N] what arrives at modules of the layer, by their name in it.
        output, without: [N, L, ...] what it puts out, and what it puts out while its routed experts are silent; None where learned
            rounding does not compare with that.
    """

    routing: Routing | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    without: Tensor | None = None


def full_precision(plan: Plan, sites: LayerSites, stream: Stream | None) -> FullPrecision:
    """Advance the reference stream through a layer, and keep what the recipe compares with."""
    if stream is None:
        return FullPrecision()
    names = compared_modules(plan, sites) if plan.recipe.compares_inputs else []
    refines, without = plan.recipe.refine.active, None
    if refines and sites.moe is not None and any(name.startswith(f"{sites.name}.") for name in plan.linears):
        without = output_without_experts(stream, sites.index)
    with captured_inputs(stream, names) as inputs:
        routing = reference_step(stream, sites.index, plan.chunk.get(sites.index, 1))
    output = stream.hidden if refines else None
    return FullPrecision(
        routing if plan.recipe.router.realign != "none" else None, inputs, output, output if sites.moe is None else without
    )


def output_without_experts(stream: Stream, index: int) -> Tensor:
    """Return [N, L, ...] what a layer, as the stream's checkpoint has it, puts out while its routed experts are silent."""
    result = stream.store.allocate(tuple(stream.hidden.shape), stream.dtype)
    with stream.loaded(index):
        stream.run(index, experts=lambda rows: silent, outputs=result)
    return result


def compared_modules(plan: Plan, sites: LayerSites) -> list[str]:
    """Modules at whose inputs full precision is asked what should arrive: one for each group of linears (drift), and the experts."""
    corrected = sites.groups if plan.recipe.solver.drift != "none" else []
    groups = [group for group in corrected if any(f"{sites.name}.{name}" in plan.linears for name in group.names)]
    names = [input_of(sites, group) for group in groups]
    if sites.moe is not None and f"{sites.name}.{sites.moe.experts}" in plan.experts:
        names.append(sites.moe.experts)
    return list(dict.fromkeys(names))


def input_of(sites: LayerSites, group: LinearGroup) -> str:
    """The module that is asked for a group's input."""
    return sites.moe.experts if group.moe_input and sites.moe is not None else group.names[0]
