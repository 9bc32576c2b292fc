"""How much a layer loses without one of its experts: what removal is decided by.

- `reap` (REAP, 2510.13999): the mean, over the tokens that the router sends to an expert, of the length of what it adds to the layer's
  output, `g_e(x) |f_e(x)|`.
- `measured`: the mean over all tokens of the squared change of the layer's output, relative to its squared length (as prices are), when
  the expert answers nothing and the router's other weights are scaled up to the same sum where the router keeps that sum. The expert
  that the router would choose in its place is not run: that would take the router once more for every expert.
- `frequency`: the share of tokens that the router sends to an expert.
- `random`: a baseline.

Shape suffixes: E experts, T tokens, H hidden, S slots of a chunk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moebit.model.experts import RoutedTokens, dispatch, experts_names, finish, intermediate, read_experts
from moebit.model.structure import LayerSites, Structure
from moebit.profiling.passes import Progress
from moebit.profiling.prices import token_weights
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import Budget
from moebit.streaming.stream import Stream

BY = ("reap", "measured", "frequency", "random")
CONSTANT = 1e-3  # relative spread of the sums of a router's weights, up to which it is taken to keep the sum


def saliencies(
    checkpoint: Checkpoint, structure: Structure, windows: Tensor, budget: Budget, by: str, seed: int, progress: Progress
) -> dict[int, Tensor]:
    """Return layer -> float64 [E], rising with what the layer would lose; one pass over `windows` [N, L]."""
    generator = torch.Generator().manual_seed(seed)
    if by == "random":
        return {s.index: torch.rand(s.moe.layout.experts, generator=generator, dtype=torch.float64) for s in structure.moe_layers if s.moe}
    stream = Stream(checkpoint, structure, windows, budget.store(Path(tempfile.gettempdir())), budget.batch_tokens, budget.slots)
    found: dict[int, Tensor] = {}
    for sites in structure.layers:
        progress("layers", sites.index, len(structure.layers))
        with stream.loaded(sites.index) as layer:
            if sites.moe is None:
                stream.run(sites.index, advance=True)
            else:
                found[sites.index] = _Layer(stream, sites, layer, budget.chunk.get(sites.index, 1)).saliency(by)
    progress("layers", len(structure.layers), len(structure.layers))
    return found


@dataclass(frozen=True)
class _Layer:
    """One loaded layer with experts, and the windows in front of it."""

    stream: Stream
    sites: LayerSites
    layer: nn.Module
    chunk: int

    @torch.no_grad()
    def saliency(self, by: str) -> Tensor:
        """float64 [E]; the stream is behind the layer afterwards."""
        moe = self.sites.moe
        assert moe is not None
        routed = self.stream.capture_routing(self.sites.index)
        outputs, lengths = self.stream.new_outputs(routed), torch.zeros(moe.layout.experts, dtype=torch.float64)
        for tokens, experts, y in self._answers(routed):
            outputs.index_add_(0, tokens, y)
            lengths.index_add_(0, experts, y.double().norm(dim=1))
        counts = torch.bincount(routed.ids.flatten(), minlength=moe.layout.experts).double()
        self.stream.run(self.sites.index, experts=self.stream.replay(outputs), advance=True)
        if by == "frequency":
            return counts / len(routed.x)
        return lengths / counts.clamp(min=1) if by == "reap" else self._without(routed, outputs)

    def _without(self, routed: RoutedTokens, outputs_TH: Tensor) -> Tensor:
        """What every expert's silence changes, all others answering."""
        moe = self.sites.moe
        assert moe is not None
        weight_T, total = token_weights(self.stream.hidden), torch.zeros(moe.layout.experts, dtype=torch.float64)
        sums = routed.weights.sum(1)
        kept = float(sums.std()) <= CONSTANT * float(sums.mean()) if len(sums) > 1 and moe.top_k > 1 else False
        for tokens, experts, y in self._answers(routed):
            share = (routed.weights[tokens] * (routed.ids[tokens] == experts.unsqueeze(1))).sum(1) / sums[tokens]
            scale = 1 / (1 - share).clamp(min=1e-6) if kept else torch.ones(len(tokens))
            change = (outputs_TH[tokens] - y) * scale.unsqueeze(1) - outputs_TH[tokens]
            total.index_add_(0, experts, change.double().square().sum(1) * weight_T[tokens])
        return total

    def _answers(self, routed: RoutedTokens) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(token [S], expert [S], what it adds to the output [S, H] float32), a piece at a time."""
        moe = self.sites.moe
        assert moe is not None
        name, layout, module = self.sites.experts, moe.layout, self.layer.get_submodule(moe.experts)
        slots, weights_of = dispatch(routed.ids, routed.weights, layout.experts), self.stream.checkpoint.weights
        for start in range(0, layout.experts, self.chunk):
            stop = min(start + self.chunk, layout.experts)
            weights_of.expect(experts_names(name, layout), stop, min(stop + self.chunk, layout.experts))
            weights = read_experts(weights_of, name, layout, start, stop, self.stream.dtype)
            for piece in slots.pieces(start, stop, self.stream.slots):
                h = intermediate(module, routed.x[piece.tokens], weights, piece.bounds)
                y = finish(module, h, piece.affinity, weights, piece.bounds).float()
                yield piece.tokens, torch.arange(start, stop).repeat_interleave(torch.tensor(piece.bounds).diff()), y
                self.stream.store.release()
