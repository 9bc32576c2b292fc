"""One streaming pass of a data set over a model: what its tokens say about every expert, and what rounding would cost (prices.py).

The model is the one that is given: full precision where widths are measured, an output of moebit where its experts' use is looked at.
Only one layer's part outside of the experts and a chunk of experts are in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebit.methods.significance import ExpertEvidence, coactivation
from moebit.model.experts import ExpertWeights, RoutedTokens, dispatch, experts_names, finish, intermediate, read_experts
from moebit.model.structure import LayerSites, Structure
from moebit.profiling.linear_prices import LinearTrials
from moebit.profiling.prices import LINEAR_TOKENS, WHOLE, ExpertPrices, Measure, token_weights
from moebit.profiling.sensitivity import layer_gradients
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import Budget
from moebit.streaming.store import ActivationStore
from moebit.streaming.stream import Stream

Progress = Callable[[str, int, int], None]


def run_pass(
    checkpoint: Checkpoint,
    structure: Structure,
    windows: Tensor,
    budget: Budget,
    store: ActivationStore,
    measure: Measure | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """Everything that a profile keeps of one data set, under its names in the file (docs/format.md).

    Args:
        windows: int64 [N, L] token ids. measure: None leaves errors out.
    """
    sys.audit("moebit.pass", windows)
    batch = budget.batch_tokens if measure is None else min(budget.batch_tokens, LINEAR_TOKENS)
    gradients: dict[int, Tensor] = {}
    if measure is not None:
        progress("gradients", 0, 1)
        sample = windows[: min(len(windows), -(-LINEAR_TOKENS // windows.shape[1]))]
        gradients = layer_gradients(Stream(checkpoint, structure, sample, store, batch, budget.slots), budget.chunk)
    stream = Stream(checkpoint, structure, windows, store, batch, budget.slots)
    found: dict[str, Tensor] = {}
    for sites in structure.layers:
        progress("layers", sites.index, len(structure.layers))
        with stream.loaded(sites.index) as layer:
            found |= _LayerPass(stream, sites, layer, budget.chunk.get(sites.index, 1), measure, gradients.get(sites.index)).run()
    progress("layers", len(structure.layers), len(structure.layers))
    return found


@dataclass
class _LayerPass:
    """One loaded layer and the windows in front of it."""

    stream: Stream
    sites: LayerSites
    layer: nn.Module
    chunk: int
    measure: Measure | None
    gradient: Tensor | None

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        trials = LinearTrials(self.stream, self.sites, self.layer, self.measure, self.gradient) if self.measure is not None else None
        routed, outputs = None, None
        if self.sites.moe is not None:
            routed = self.stream.capture_routing(self.sites.index)
            outputs = self.stream.new_outputs(routed)
            found |= self._statistics(routed, outputs, trials)
        if trials is not None:
            found |= trials.prices(outputs)
        self.stream.run(self.sites.index, experts=self.stream.replay(outputs) if outputs is not None else None, advance=True)
        if self.measure is not None and routed is not None:
            found |= self._prices(routed, self.measure)
        return found

    def _chunks(self, step: int, dtype: torch.dtype) -> Iterator[tuple[int, int, ExpertWeights]]:
        """(start, stop, weights) of the layer's experts, `step` at a time."""
        moe = self.sites.moe
        assert moe is not None
        name, layout, weights_of = f"{self.sites.name}.{moe.experts}", moe.layout, self.stream.checkpoint.weights
        for start in range(0, layout.experts, step):
            stop = min(start + step, layout.experts)
            weights_of.expect(experts_names(name, layout), stop, min(stop + step, layout.experts))
            yield start, stop, read_experts(weights_of, name, layout, start, stop, dtype)

    def _statistics(self, routed: RoutedTokens, outputs: Tensor, trials: LinearTrials | None) -> dict[str, Tensor]:
        """Statistics of the routed experts, chunk by chunk; what they put out is added to `outputs`, and to that of the trials."""
        moe = self.sites.moe
        assert moe is not None
        name, layout, module = f"{self.sites.name}.{moe.experts}", moe.layout, self.layer.get_submodule(moe.experts)
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        tried = trials.slots() if trials is not None and trials.names else None
        significance: list[Tensor] = []
        for start, stop, weights in self._chunks(self.chunk, self.stream.dtype):
            evidence = ExpertEvidence.zeros(layout, weights)
            for piece in slots.pieces(start, stop, self.stream.slots):
                h = intermediate(module, routed.x[piece.tokens], weights, piece.bounds)
                evidence.add(h, piece)
                y = finish(module, h, piece.affinity, weights, piece.bounds)
                outputs.index_add_(0, piece.tokens, y.float())
                self.stream.store.release()
            significance.append(evidence.significance)
            if trials is not None and tried is not None:
                trials.run(module, weights, tried, start, stop)
        affinity = torch.zeros(layout.experts).index_add_(0, routed.ids.flatten(), routed.weights.float().abs().flatten())
        return {
            f"{name}.tokens": routed.counts(layout.experts),
            f"{name}.affinity": affinity,
            f"{name}.significance": torch.cat(significance),
            f"{name}.coactivation": coactivation(routed.ids, layout.experts),
        }

    def _prices(self, routed: RoutedTokens, measure: Measure) -> dict[str, Tensor]:
        """EXPERTS.PROJECTION.error and EXPERTS.error [W, E], once the hidden states are those behind the layer."""
        moe = self.sites.moe
        assert moe is not None
        name, layout, module = f"{self.sites.name}.{moe.experts}", moe.layout, self.layer.get_submodule(moe.experts)
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        weights_T = token_weights(self.stream.hidden)
        priced = ExpertPrices(self.stream, name, layout, module, routed, slots, weights_T, measure, self.gradient)
        parts: dict[str, list[Tensor]] = {part: [] for part in priced.parts}
        for start, stop, weights in self._chunks(max(1, self.chunk // 3), torch.float32):  # rounded copies stand beside the weights
            for part, prices in priced.chunk(weights, start, stop).items():
                parts[part].append(prices)
        full = {part: name if part == WHOLE else f"{name}.{part}" for part in parts}
        return {
            **{f"{full[part]}.error": torch.cat(columns, 1).float() for part, columns in parts.items()},
            **{f"{full[part]}.sensitivity": value for part, value in priced.sensitivities().items()},
        }
