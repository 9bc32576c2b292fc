"""What a layer's routed experts still have to put out, so that the layer comes to full precision's output.

Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebit.model.experts import add_outputs
from moebit.model.seam import silent
from moebit.quantize.chunk import ExpertChunk, ExpertInputs
from moebit.quantize.context import LayerContext, LayerState
from moebit.streaming.shortcut import adds_up
from moebit.streaming.stream import Stream

ROWS = 4096  # tokens whose sizes are summed at a time


@dataclass(frozen=True)
class LayerTarget:
    """What a layer should put out, less what it puts out beside the experts whose turn has come.

    Attributes:
        rest: [T, H] float32: full precision's output on its own stream, less the layer's output without routed experts, less what the
            experts behind put out in full precision. weight: [T], one over the squared size of full precision's output.
    """

    rest: Tensor
    weight: Tensor

    def of(self, outputs_TH: Tensor, tokens: Tensor) -> Tensor:
        """[N, H] float32 what the chunk whose turn it is should put out for some tokens; `outputs_TH`: what those before put out."""
        return self.rest[tokens] - outputs_TH[tokens]

    def reach(self, chunk: ExpertChunk, inputs: ExpertInputs, sign: int = 1) -> None:
        """Take experts out of those that are behind (or, with sign -1, count them among them): in full precision, on what arrives."""
        scratch = torch.zeros_like(self.rest)
        for piece in inputs.slots.pieces(chunk.start, chunk.stop, inputs.stream.slots):
            add_outputs(chunk.module, inputs.x, chunk.weights, piece, scratch)
            inputs.stream.store.release()
        self.rest.add_(scratch, alpha=sign)


def layer_target(context: LayerContext, state: LayerState, inputs: ExpertInputs, behind: Iterator[ExpertChunk]) -> LayerTarget | None:
    """What a layer's experts are to put out; None where that is not known, or the layer does not add their outputs to the rest.

    Args:
        behind: all chunks, in full precision, where there are several; each is read once more for this.
    """
    stream, index, should = inputs.stream, context.sites.index, state.reference.output
    if should is None or stream.hands_on or should.ndim != 3 or should.shape[2] != inputs.x.shape[1] or not _adds(stream, index, inputs.x):
        return None
    without = state.routed.without if state.routed is not None else None
    if without is None:
        without = stream.store.allocate(tuple(stream.hidden.shape), stream.dtype)
        stream.run(index, experts=lambda rows: silent, outputs=without)
    rest, weight = stream.store.allocate(tuple(inputs.x.shape), torch.float32), torch.empty(len(inputs.x))
    for some in torch.arange(len(rest)).split(ROWS):
        whole = should.flatten(0, 1)[some].float()
        rest[some] = whole - without.flatten(0, 1)[some].float()
        weight[some] = 1 / whole.square().sum(1).clamp(min=1e-30)
        stream.store.release()
    target = LayerTarget(rest, weight)
    for chunk in behind:
        target.reach(chunk, inputs, -1)
    return target


@torch.no_grad()
def _adds(stream: Stream, index: int, x_TH: Tensor) -> bool:
    """Whether a layer adds what its experts put out to the rest: looked at on one window, with the experts' inputs as their outputs."""
    first = torch.arange(1)

    def echo(module: nn.Module, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return states

    length = stream.windows.shape[1]
    output, without = (stream.some(index, first, handler) for handler in (echo, silent))
    return adds_up(output, without, x_TH[:length].view(output.shape).float())
