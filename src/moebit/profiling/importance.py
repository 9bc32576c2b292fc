"""`imatrix`: how large the inputs of every matrix are on some texts, as the importance matrix that `llama-quantize --imatrix` reads.

One streaming pass over the full-precision model adds up the squares of what enters every linear and every expert, as llama.cpp's own tool
does (tools/imatrix/imatrix.cpp), but with a layer's experts in memory a chunk at a time.

A router sends some experts few tokens, or none on the texts that were given; llama-quantize weighs all inputs of an expert without tokens
alike. Such an expert is filled up here to `ENOUGH` tokens: what it lacks comes from the layer's other tokens, each counting as much as the
router would have sent it there (`methods/soft_coverage.py`), or all alike where the router is not recognised,

    mean = (sum of its own squares + (ENOUGH - n) soft mean) / ENOUGH     for an expert with n < ENOUGH tokens.

The count in the file stays n, but at least 1, so that files of several texts can be added up.

Shape suffixes: T tokens, S routed slots, M sampled tokens, E experts, C experts of a chunk, H hidden, I intermediate, N inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moebit.calibration.statistics import layer_sample
from moebit.formats.gguf.imatrix import Importance
from moebit.methods.soft_coverage import SoftCoverage, soft_coverage
from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, dispatch, experts_names, finish, intermediate, read_experts
from moebit.model.proof.router import not_linear
from moebit.model.structure import LayerSites, Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import make_budget
from moebit.streaming.routing import router_bias, router_inputs
from moebit.streaming.stream import Stream
from moebit.tensor.spacing import evenly_spaced

ENOUGH = 64  # tokens of an expert, from which on its own are taken alone
SAMPLE, PIECE = 4096, 512  # tokens that stand for a layer where the router says nothing, and tokens at a time
Progress = Callable[[str, int, int], None]


@dataclass
class InputSums:
    """Sums of squares of what enters the matrices of a model.

    Attributes:
        linears: name of a linear outside of the routed experts -> its inputs, one matrix.
        first, down: name of an experts module -> the inputs of gate and up, and of down, by expert.
        filled: name of an experts module -> expert -> its tokens, where they are fewer than `ENOUGH`.
        unweighted: experts modules whose rare experts were filled up with all tokens alike.
    """

    linears: dict[str, Importance] = field(default_factory=dict)
    first: dict[str, Importance] = field(default_factory=dict)
    down: dict[str, Importance] = field(default_factory=dict)
    filled: dict[str, dict[int, int]] = field(default_factory=dict)
    unweighted: list[str] = field(default_factory=list)


def input_sums(checkpoint: Checkpoint, structure: Structure, windows: Tensor, memory: int, progress: Progress) -> InputSums:
    """Stream windows [N, L] of token ids through a model within `memory` bytes, and add up what enters its matrices."""
    budget = make_budget(checkpoint, structure, memory, windows.numel(), length=windows.shape[1], solve=False, hessians=False)
    store = budget.store(Path(tempfile.gettempdir()))
    stream, found = Stream(checkpoint, structure, windows, store, budget.batch_tokens, budget.slots), InputSums()
    for sites in structure.layers:
        progress("layers", sites.index, len(structure.layers))
        with stream.loaded(sites.index) as layer:
            _Layer(stream, sites, layer, budget.chunk.get(sites.index, 1), found).run()
    progress("layers", len(structure.layers), len(structure.layers))
    return found


@dataclass
class _Squares:
    """Sums of squares [N] of the rows that came by, in float64, and how many they were."""

    sums: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        for some in rows.split(PIECE):
            self.sums += some.float().square().sum(0)
        self.rows += len(rows)

    @property
    def importance(self) -> Importance:
        return Importance(self.sums[None], torch.tensor([float(self.rows)]))


@dataclass(frozen=True)
class _Fill:
    """What rare experts are filled up with: tokens of the layer, and how much each counts for each expert.

    Attributes:
        positions, shares: int64 [M] and [M, E] for gate and up. sample: [S, H] tokens that go through experts, for down.
        through: [S, E] what they count.
    """

    positions: Tensor
    shares: Tensor
    sample: Tensor
    through: Tensor

    @classmethod
    def of(cls, routed: RoutedTokens, soft: SoftCoverage | None, experts: int) -> _Fill:
        rows = layer_sample(len(routed.x))
        if soft is not None:
            return cls(soft.positions, soft.shares, routed.x[rows], soft.through)
        positions = evenly_spaced(len(routed.x), SAMPLE)
        alike = (torch.full((len(some), experts), 1 / len(some)) for some in (positions, rows))
        return cls(positions, next(alike), routed.x[rows], next(alike))

    def first(self, x_TH: Tensor, experts: Tensor) -> Tensor:
        """[C, H] mean squares at the input of some experts."""
        total = torch.zeros(len(experts), x_TH.shape[1], dtype=torch.float64)
        for low in range(0, len(self.positions), PIECE):
            squares = x_TH[self.positions[low : low + PIECE]].float().square()
            total += self.shares[low : low + PIECE, experts].T @ squares
        return total

    def down(self, module: Any, weights: ExpertWeights, experts: Tensor, slots: int) -> Tensor:
        """[C, I] mean squares at the input of down if the sample went through experts; `weights` begin with those of `weights.begin`."""
        count, parts = len(self.sample), []
        for some in experts.split(max(1, slots // count)):
            here = some - weights.begin
            bias = None if weights.first_bias is None else weights.first_bias[here]
            chosen = ExpertWeights(weights.first[here], weights.down[:0], bias)
            bounds = [i * count for i in range(len(some) + 1)]
            h = intermediate(module, self.sample.repeat(len(some), 1), chosen, bounds).view(len(some), count, -1)
            parts.append(torch.einsum("csi,sc->ci", h.float().square(), self.through[:, some]))
        return torch.cat(parts).double()


@dataclass
class _Layer:
    """One loaded layer and the windows in front of it."""

    stream: Stream
    sites: LayerSites
    layer: nn.Module
    chunk: int
    found: InputSums

    @torch.no_grad()
    def run(self) -> None:
        outputs = self._experts() if self.sites.moe is not None else None
        squares = {group.names[0]: _Squares(torch.zeros(group.in_features, dtype=torch.float64)) for group in self.sites.groups}
        experts = self.stream.replay(outputs) if outputs is not None else None
        hooks = {name: one.add for name, one in squares.items()}
        self.stream.run(self.sites.index, experts=experts, inputs=hooks, advance=True)
        for group in self.sites.groups:
            importance = squares[group.names[0]].importance
            self.found.linears |= {f"{self.sites.name}.{name}": importance for name in group.names}

    def _experts(self) -> Tensor:
        """Add up the inputs of the routed experts, chunk by chunk; returns what the experts put out."""
        moe = self.sites.moe
        assert moe is not None
        name, layout, module = f"{self.sites.name}.{moe.experts}", moe.layout, self.layer.get_submodule(moe.experts)
        routed, soft = self._routed()
        outputs, counts = self.stream.new_outputs(routed), routed.counts(layout.experts)
        first, down = (torch.zeros(layout.experts, size, dtype=torch.float64) for size in (layout.hidden, layout.intermediate))
        fill = _Fill.of(routed, soft, layout.experts)
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        for start, stop, weights in self._chunks(name, layout):
            for piece in slots.pieces(start, stop, self.stream.slots):
                x = routed.x[piece.tokens]
                h = intermediate(module, x, weights, piece.bounds)
                _add_by_expert(first[start:stop], x, piece.bounds)
                _add_by_expert(down[start:stop], h, piece.bounds)
                outputs.index_add_(0, piece.tokens, finish(module, h, piece.affinity, weights, piece.bounds))
                self.stream.store.release()
            rare = start + (counts[start:stop] < ENOUGH).nonzero().flatten()
            if len(rare):
                first[rare] = _filled(first[rare], counts[rare], fill.first(routed.x, rare))
                down[rare] = _filled(down[rare], counts[rare], fill.down(module, weights, rare, self.stream.slots))
        self._note(name, counts, first, down, soft is None)
        return outputs

    def _chunks(self, name: str, layout: ExpertsLayout) -> Iterator[tuple[int, int, ExpertWeights]]:
        stored = self.stream.checkpoint.weights
        for start in range(0, layout.experts, self.chunk):
            stop = min(start + self.chunk, layout.experts)
            stored.expect(experts_names(name, layout), stop, min(stop + self.chunk, layout.experts))
            yield start, stop, read_experts(stored, name, layout, start, stop, self.stream.dtype)

    def _routed(self) -> tuple[RoutedTokens, SoftCoverage | None]:
        """What the experts are asked, and how near the layer's tokens came to each of them where the router says so."""
        moe, index = self.sites.moe, self.sites.index
        assert moe is not None
        if moe.router is None or not_linear(self.layer, self.sites) is not None:
            return self.stream.capture_routing(index), None
        with router_inputs(self.stream, self.sites) as inputs:
            routed = self.stream.capture_routing(index)
        router = self.layer.get_submodule(moe.router)
        if not inputs:
            return routed, None
        bias, sample = router_bias(router, moe.layout.experts), layer_sample(len(routed.x))
        return routed, soft_coverage(inputs[0], router.get_parameter("weight"), bias, routed, sample)

    def _note(self, name: str, counts: Tensor, first: Tensor, down: Tensor, unweighted: bool) -> None:
        stored = counts.clamp(min=1).double()
        self.found.first[name], self.found.down[name] = Importance(first, stored), Importance(down, stored)
        rare = (counts < ENOUGH).nonzero().flatten().tolist()
        if rare:
            self.found.filled[name] = {expert: int(counts[expert]) for expert in rare}
            if unweighted:
                self.found.unweighted.append(name)


def _add_by_expert(sums_CN: Tensor, x_SN: Tensor, bounds: list[int]) -> None:
    """Add the squares of routed slots, sorted by expert, to the experts' sums."""
    lengths = torch.tensor(bounds).diff()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    piece = torch.zeros(sums_CN.shape)
    for low in range(0, len(x_SN), PIECE):
        piece.index_add_(0, owner[low : low + PIECE], x_SN[low : low + PIECE].float().square())
    sums_CN += piece


def _filled(sums_CN: Tensor, counts_C: Tensor, soft_CN: Tensor) -> Tensor:
    """Sums whose quotient with the stored count is the mean of the own tokens and of those that stand in for the missing ones."""
    lacking = (ENOUGH - counts_C).double()[:, None]
    mean = (sums_CN + lacking * soft_CN) / ENOUGH
    return mean * counts_C.clamp(min=1).double()[:, None]
