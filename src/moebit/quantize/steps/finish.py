"""The end of a layer: what is not quantized is written, and the streams move on through the layer as it now is."""

from __future__ import annotations

from torch import Tensor

from moebit.quantize.context import Captured, LayerContext, LayerState
from moebit.streaming.stream import Stream


def write_rest(context: LayerContext, state: LayerState) -> LayerState:
    """Write what is not quantized."""
    context.sink.put_plain(context.shard, context.sink.parameters(f"{context.sites.name}."))
    return state


def advance(context: LayerContext, state: LayerState) -> LayerState:
    """Move the calibration set and the pool through the quantized layer."""
    assert state.stream is not None
    index = context.sites.index
    _advance(state.stream, index, state.routed, state.outputs)
    if state.pool is not None:
        _advance(state.pool, index, state.pooled, state.pool_outputs)
    return state


def _advance(stream: Stream, index: int, captured: Captured | None, outputs: Tensor | None) -> None:
    if outputs is None:
        stream.run(index, advance=True)
    else:
        stream.advance_by(index, outputs, captured.without if captured else None)
