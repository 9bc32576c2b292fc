"""Which inputs of a model a recipe rounds and transforms: decided once, for what is written, evaluated and loaded alike.

Rounded are the inputs of every quantized linear and of the experts, the inputs of their down projections, and, where the attention allows,
queries, keys and values. Not rounded are what stays in full precision: routers, gates, the head. (EAQuant, 2506.13329, setting.)
Transformed are the same inputs, one transform per site: linears that share an input share it, the experts of a layer share theirs with
the shared experts that read the same tensor. A router reads that tensor as it is, which is the same function.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from moebit.formats.sinks import SINKS
from moebit.model.attention import find_attention
from moebit.model.inputs import DOWN, FIRST, LINEAR, Activations, TransformSpec
from moebit.model.structure import LayerSites, Structure
from moebit.recipe import Recipe
from moebit.tensor.row_rounding import Rounding


@dataclass(frozen=True)
class ActivationPlan:
    """What a recipe makes of a model's activations.

    Attributes:
        activations: for those who run the output.
        inputs_only: decoder layer -> why its query, key and value are not rounded.
        untransformed: transform -> why there is none.
    """

    activations: Activations = field(default_factory=Activations)
    inputs_only: dict[str, str] = field(default_factory=dict)
    untransformed: dict[str, str] = field(default_factory=dict)


def plan_activations(model: PreTrainedModel, structure: Structure, recipe: Recipe, quantized: Collection[str]) -> ActivationPlan:
    """Decide for the quantized linears and experts of these names.

    Query, key and value need a proof that runs a layer of each kind on random values: the memory of one layer without its experts.
    """
    a = recipe.activations
    if not SINKS[recipe.format].holds_activations:
        return ActivationPlan()
    inputs = Rounding(a.bits, a.symmetric, a.clip) if a.bits < 16 else None
    attention = Rounding(a.qkv_bits, a.symmetric, a.clip) if a.qkv_bits < 16 else None
    sites = find_attention(model, structure) if attention else None
    transforms, reads = _transforms(structure, recipe, quantized)
    untransformed = {
        name: f"no power of two above 1 divides its {spec.channels} channels" for name, spec in transforms.items() if spec.block == 1
    }
    activations = Activations(
        inputs,
        {name: spec for name, spec in transforms.items() if name not in untransformed},
        {linear: name for linear, name in reads.items() if name not in untransformed},
        attention if sites and sites.modules else None,
        sites.modules if sites else (),
    )
    return ActivationPlan(activations, sites.inputs_only if sites else {}, untransformed)


def _transforms(structure: Structure, recipe: Recipe, quantized: Collection[str]) -> tuple[dict[str, TransformSpec], dict[str, str]]:
    """(transform -> spec, linear -> transform)."""
    kind = recipe.rotation.online
    transforms: dict[str, TransformSpec] = {}
    reads: dict[str, str] = {}
    if kind == "none":
        return transforms, reads
    for layer in structure.layers:
        experts = experts_of(layer)
        if layer.moe and experts in quantized:
            layout = layer.moe.layout
            transforms[f"{experts}.{FIRST}"] = TransformSpec(kind, layout.hidden)
            transforms[f"{experts}.{DOWN}"] = TransformSpec(
                kind, layout.intermediate, layout.experts if recipe.rotation.down == "expert" else 1
            )
        for group in layer.groups:
            names = [full for full in (f"{layer.name}.{name}" for name in group.names) if full in quantized]
            if group.moe_input and experts in quantized:
                reads |= dict.fromkeys(names, f"{experts}.{FIRST}")
            elif names:
                transforms[f"{names[0]}.{LINEAR}"] = TransformSpec(kind, group.in_features)
                reads |= dict.fromkeys(names, f"{names[0]}.{LINEAR}")
    return transforms, reads


def experts_of(layer: LayerSites) -> str:
    """Full name of a layer's experts module; "" where it has none."""
    return layer.experts if layer.moe else ""
