"""What a layer's experts are asked: tokens, chosen experts and affinities, captured once."""

from __future__ import annotations

from dataclasses import replace

from moebit.calibration.statistics import layer_sample
from moebit.methods.router import NO_SCORE, NOT_ONCE
from moebit.methods.soft_coverage import SoftCoverage, soft_coverage
from moebit.model.proof.router import not_linear
from moebit.quantize.context import Captured, LayerContext, LayerState
from moebit.quantize.groups import in_order, quantized
from moebit.streaming.routing import router_bias, router_inputs
from moebit.streaming.shortcut import KeptInput
from moebit.streaming.stream import Stream


def capture_routing(context: LayerContext, state: LayerState) -> LayerState:
    """Capture what the experts are asked by the calibration set; with soft coverage, also what the router says of all experts."""
    assert state.stream is not None
    stream, final = state.stream, _is_final(context)
    if context.recipe.calibration.coverage == "soft":
        assert context.layer is not None
        reason = not_linear(context.layer, context.sites)
        if reason is None:
            return _with_router(context, state, stream, final)
        state = state.noting(coverage={"skipped": reason})
    return _routed(state, _captured(stream, context.sites.index, final, state.kept))


def capture_pool(context: LayerContext, state: LayerState) -> LayerState:
    """Capture what the experts are asked by the pool, where there is one."""
    if state.pool is None:
        return state
    return replace(state, pooled=_captured(state.pool, context.sites.index, _is_final(context)))


def _is_final(context: LayerContext) -> bool:
    """Whether nothing in the layer but its experts changes any more, so that what it puts out without them is worth keeping."""
    order, groups = in_order(context.sites), context.sites.groups
    return not any(quantized(context, groups[number]) for number in (*order.beside, *order.behind))


def _captured(stream: Stream, index: int, final: bool, kept: KeptInput | None = None) -> Captured:
    """Run the layer up to its experts, from `kept` on where that can be; the layer's output without experts is kept if it is final."""
    without = stream.store.allocate(tuple(stream.hidden.shape), stream.dtype) if final else None
    return Captured(stream.capture_routing(index, without, kept), without)


def _routed(state: LayerState, captured: Captured, soft: SoftCoverage | None = None) -> LayerState:
    """The state with what was captured, and the report of the router's change completed: it is known now what the new one chooses."""
    if state.router is not None:
        report = replace(state.report, router=state.router.described(captured.tokens.ids))
        state = replace(state, report=report, router=None)
    return replace(state, routed=captured, soft=soft, kept=None)


def _with_router(context: LayerContext, state: LayerState, stream: Stream, final: bool) -> LayerState:
    """Capture what arrives at the router, too, and ask it about all experts."""
    moe = context.sites.moe
    assert moe is not None
    assert moe.router is not None
    assert context.layer is not None
    with router_inputs(stream, context.sites) as inputs:
        captured = _captured(stream, context.sites.index, final)
    router = context.layer.get_submodule(moe.router)
    bias = router_bias(router, moe.layout.experts)
    tokens, weight = captured.tokens, router.get_parameter("weight")
    soft = soft_coverage(inputs[0], weight, bias, tokens, layer_sample(len(tokens.x))) if inputs else None
    said = {"soft": len(soft.positions)} if soft else {"skipped": NO_SCORE if inputs else NOT_ONCE}
    return _routed(state.noting(coverage=said), captured, soft)
