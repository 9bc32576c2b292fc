"""The steps of one decoder layer, in their order."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from moebit.quantize.context import LayerContext, LayerState, Step
from moebit.quantize.steps.experts import quantize_experts
from moebit.quantize.steps.finish import advance, write_rest
from moebit.quantize.steps.linears import linears_before_experts, linears_behind_experts, linears_beside_experts
from moebit.quantize.steps.router import adjust_router
from moebit.quantize.steps.routing import capture_pool, capture_routing
from moebit.quantize.steps.scale import scale
from moebit.quantize.steps.smooth import smooth


def steps(context: LayerContext, calibrated: bool) -> Iterator[Step]:
    """What is done to a layer. Each step sees what those before it have left, and knows nothing of the others.

    Args:
        calibrated: whether calibration windows run through the layer.
    """
    recipe = context.recipe
    if recipe.smoothing.kind != "none" and calibrated:
        yield smooth
    if recipe.solver.method == "awq" and calibrated:
        yield scale
    yield linears_before_experts
    if context.sites.moe is not None:
        if recipe.router.active:
            yield adjust_router
        if calibrated:
            yield capture_routing
            yield capture_pool
        yield linears_beside_experts
        yield quantize_experts
        yield linears_behind_experts
    yield write_rest
    if calibrated:
        yield advance


def quantize_layer(context: LayerContext, state: LayerState) -> LayerState:
    """Take a layer through its steps: it is quantized and written, and its streams are behind it."""
    sys.audit("moebit.layer", context.sites.index)
    for step in steps(context, state.streams is not None):
        state = step(context, state)
    return state
