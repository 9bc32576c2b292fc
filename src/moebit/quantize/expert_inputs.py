"""The tokens that a layer's experts are calibrated on, from what was captured: slots by expert, shrink targets, what experts drew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from moebit.calibration.statistics import layer_sample
from moebit.methods.balance import Drawn, draw
from moebit.model.experts import ExpertsLayout, RoutedTokens, dispatch
from moebit.quantize.chunk import ExpertInputs, PoolInputs, ShrinkTarget, Weighing
from moebit.quantize.context import LayerContext, LayerState
from moebit.quantize.statistics import NOT_COMPARED, moment
from moebit.ranks import Sums
from moebit.streaming.stream import Stream


def expert_inputs(context: LayerContext, state: LayerState) -> tuple[ExpertInputs | None, LayerState]:
    """What the experts are calibrated on, None without calibration; the report's counts of tokens are in the state."""
    moe = context.sites.moe
    assert moe is not None
    if state.routed is None or state.stream is None:
        return None, state
    routed, stream, solver = state.routed.tokens, state.stream, context.recipe.solver
    tokens_per_expert = routed.counts(moe.layout.experts).tolist()
    target = _shrink_target(context, state, stream, routed)
    slots = dispatch(routed.ids, routed.weights, moe.layout.experts)
    pool, balance = _pool(context, state, routed, moe.layout)
    exact, drift = _exact(context, state)
    report = replace(state.report, tokens_per_expert=tokens_per_expert, balance=balance).adding(drift=drift)
    weighing = Weighing(solver.affinity_power, solver.output_aware)
    outputs = Sums(stream.new_outputs(routed), stream.ranks)
    inputs = ExpertInputs(stream, routed.x, slots, outputs, target, weighing, pool, exact, solver.drift != "none")
    return inputs, replace(state, report=report)


def _shrink_target(context: LayerContext, state: LayerState, stream: Stream, routed: RoutedTokens) -> ShrinkTarget:
    sample = routed.x[layer_sample(len(routed.x))]
    wanted = context.recipe.needs_hessians and state.soft is None
    return ShrinkTarget(sample, moment(stream, routed.x).div_(len(routed.x)) if wanted else None, state.soft)


def _pool(
    context: LayerContext, state: LayerState, routed: RoutedTokens, layout: ExpertsLayout
) -> tuple[PoolInputs | None, Mapping[str, Any]]:
    """The pool's tokens, None where there are none, and what the report says of them."""
    if context.recipe.calibration.balance == "none":
        return None, {}
    if state.pooled is None or state.pool is None:  # the texts have no further windows
        return None, _drawn(context, routed, layout, routed.ids[:0]).describe()
    pooled = state.pooled.tokens
    drawn = _drawn(context, routed, layout, pooled.ids)
    extra, slots = (dispatch(ids, pooled.weights, layout.experts) for ids in (drawn.ids, pooled.ids))
    return PoolInputs(state.pool, pooled.x, slots, extra, Sums(state.pool.new_outputs(pooled), state.pool.ranks)), drawn.describe()


def _drawn(context: LayerContext, routed: RoutedTokens, layout: ExpertsLayout, pool_ids: Tensor) -> Drawn:
    calibration = context.recipe.calibration
    return draw(routed.counts(layout.experts), pool_ids, calibration.seq_len, float(calibration.balance))


def _exact(context: LayerContext, state: LayerState) -> tuple[Tensor | None, Mapping[str, Any]]:
    """[T, H] what full precision delivers to the experts, where that is compared; a note where drift is corrected and it is not known."""
    assert context.sites.moe is not None
    name = context.sites.moe.experts
    exact = state.reference.inputs.get(name)
    wanted = context.recipe.solver.drift != "none" and context.full(name) in context.plan.experts
    return exact, {name: {"skipped": NOT_COMPARED}} if wanted and exact is None else {}
