"""Some of a layer's experts on their way through the solve, and what is seen of the tokens that are routed to them.

Shape suffixes: C experts of a chunk, T tokens, S routed slots, H hidden, I intermediate, N inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.statistics import ExpertMoments, down_layer_hessians, layer_sample, output_sensitivity, to_power
from moebit.methods.input_drift import InputDriftMoments
from moebit.methods.soft_coverage import SoftCoverage
from moebit.model.experts import ExpertsLayout, ExpertWeights, Slots, add_outputs, finish, intermediate
from moebit.streaming.stream import Stream

SAMPLED_SLOTS = 128  # of an expert's tokens, that a transform of its down projection is made from


@dataclass(frozen=True)
class ExpertChunk:
    """Experts [start, stop) of a layer.

    Attributes:
        module: the experts module, for its gating. weights: of these experts, as stored, as computed with, or quantized.
    """

    module: Any
    layout: ExpertsLayout
    start: int
    stop: int
    weights: ExpertWeights

    @property
    def count(self) -> int:
        return self.stop - self.start

    def to(self, dtype: torch.dtype) -> ExpertChunk:
        """The chunk with weights of another type; what has it already is not copied."""
        return replace(self, weights=self.weights.to(dtype))

    def with_first(self, first_CFH: Tensor) -> ExpertChunk:
        """The chunk with other gate and up projections."""
        return replace(self, weights=replace(self.weights, first=first_CFH))

    def with_down(self, down_CHI: Tensor) -> ExpertChunk:
        """The chunk with other down projections."""
        return replace(self, weights=replace(self.weights, down=down_CHI))

    def projection(self, name: str) -> Tensor:
        """[C, O, I] weights of one projection."""
        return self.weights.down if name == "down_proj" else self.weights.first[:, self.layout.rows(name)]

    def intermediate(self, x_SH: Tensor, bounds: list[int]) -> Tensor:
        """[S, I] what enters down."""
        sys.audit("moebit.rows", "first", len(x_SH))
        return intermediate(self.module, x_SH, self.weights, bounds)


@dataclass(frozen=True)
class Weighing:
    """How much a routed slot counts in the Hessian of its expert.

    Attributes:
        power: of the slot's affinity. output_aware: for gate and up, by what an error costs in the layer's output instead.
    """

    power: float = 0.0
    output_aware: bool = False

    @property
    def first_power(self) -> float:
        """Power to which gate and up's slot weights are raised."""
        return 1.0 if self.output_aware else self.power

    @property
    def down_power(self) -> float:
        """Power of the affinity in the Hessian of down."""
        return 2.0 if self.output_aware else self.power

    def first(self, x_SH: Tensor, slots: Slots, chunk: ExpertChunk) -> Tensor:
        """[S] what slots count for gate and up, before the power; `chunk` has the experts in full precision."""
        if not self.output_aware:
            return slots.affinity
        return output_sensitivity(chunk.module, chunk.layout, x_SH, slots.affinity, chunk.weights, slots.bounds)


@dataclass(frozen=True)
class ShrinkTarget:
    """What the statistics of experts with few tokens are drawn towards.

    Attributes:
        sample: [M, H] some of the layer's tokens. moment: [H, H] mean second moment of all of them, None where `soft` stands for it.
        soft: how near the tokens came to the experts, where the recipe asks for soft coverage.
    """

    sample: Tensor
    moment: Tensor | None
    soft: SoftCoverage | None = None

    def first(self, x_TH: Tensor, chunk: ExpertChunk) -> Tensor:
        """[H, H] or [C, H, H] for gate and up."""
        if self.soft is not None:
            return self.soft.moments(x_TH, chunk.start, chunk.stop)
        assert self.moment is not None
        return self.moment

    def down(self, chunk: ExpertChunk, slots: int) -> Tensor:
        """[C, I, I] for down: the layer's tokens as they come through these experts, `slots` of them at a time."""
        shares = None if self.soft is None else self.soft.through[:, chunk.start : chunk.stop]
        return down_layer_hessians(chunk.module, self.sample, chunk.weights, slots, shares)


@dataclass(frozen=True)
class ExpertInputs:
    """What a layer's experts are calibrated on, a limited number of routed slots at a time.

    Attributes:
        x: [T, H] inputs of the block; slots: all routed slots. outputs: [T, H] float32, added to.
        target: what the Hessians of experts with few tokens are drawn towards. weighing: what a slot counts.
        pool: further tokens, for experts that get too few of these.
        exact: [T, H] what full precision delivers for the same tokens, where something is compared with that.
        corrects: whether weights are corrected for how far inputs have drifted from it.
    """

    stream: Stream
    x: Tensor
    slots: Slots
    outputs: Tensor
    target: ShrinkTarget
    weighing: Weighing = Weighing()
    pool: PoolInputs | None = None
    exact: Tensor | None = None
    corrects: bool = False

    @property
    def drifts(self) -> bool:
        """Whether there is drift to be corrected for: full precision's inputs are known, and the recipe asks for it."""
        return self.corrects and self.exact is not None

    def _pieces(self, chunk: ExpertChunk) -> Iterator[Slots]:
        for piece in self.slots.pieces(chunk.start, chunk.stop, self.stream.slots):
            yield piece
            self.stream.store.release()

    def _drawn(self, chunk: ExpertChunk) -> Iterator[tuple[Tensor, Slots]]:
        return self.pool.drawn(chunk) if self.pool else iter(())

    def hessians(self, chunk: ExpertChunk) -> Tensor:
        """[C, H, H] of gate and up; `chunk` has the experts in full precision."""
        moments = ExpertMoments.zeros(chunk.count, self.x.shape[1], self.weighing.first_power)
        for piece in self._pieces(chunk):
            moments.add(x := self.x[piece.tokens], self.weighing.first(x, piece, chunk), piece.bounds)
        for x, piece in self._drawn(chunk):
            moments.add(x, self.weighing.first(x, piece, chunk), piece.bounds)
        return moments.shrunk(self.target.first(self.x, chunk))

    def first_drift(self, chunk: ExpertChunk) -> InputDriftMoments:
        """How the inputs of gate and up drift, tokens weighted as in `hessians`; the pool's have nothing to be compared with."""
        assert self.exact is not None
        moments = InputDriftMoments.zeros(chunk.count, self.x.shape[1], len(self.x), self.stream.windows.shape[1])
        for piece in self._pieces(chunk):
            x = self.x[piece.tokens]
            weight = to_power(self.weighing.first(x, piece, chunk), self.weighing.first_power)
            moments.add(x, self.exact[piece.tokens], weight, piece.tokens, piece.bounds)
        return moments

    def extremes(self, chunk: ExpertChunk) -> tuple[Tensor, Tensor]:
        """[C, I] largest and smallest input of every channel of down; zero for experts without tokens."""
        high = torch.full((chunk.count, chunk.layout.intermediate), -torch.inf)
        low = -high
        own = ((self.x[piece.tokens], piece) for piece in self._pieces(chunk))
        for x, piece in chain(own, self._drawn(chunk)):
            h = chunk.intermediate(x, piece.bounds).float()
            for c, (begin, end) in enumerate(pairwise(piece.bounds)):
                if begin < end:
                    torch.maximum(high[c], h[begin:end].amax(0), out=high[c])
                    torch.minimum(low[c], h[begin:end].amin(0), out=low[c])
        seen = high > -torch.inf
        return torch.where(seen, high, 0.0), torch.where(seen, low, 0.0)

    def through_first(
        self, chunk: ExpertChunk, moments: ExpertMoments | None, compared: tuple[InputDriftMoments, ExpertChunk] | None = None
    ) -> Tensor:
        """[S, I] inputs of down, for all slots of these experts; their moments are added to `moments`.

        Args:
            compared: gets how they drift from what these experts, in full precision, deliver.
        """
        count = self.slots.bounds[chunk.stop] - self.slots.bounds[chunk.start]
        h = self.stream.store.allocate((count, chunk.layout.intermediate), self.stream.dtype)
        for piece in self._pieces(chunk):
            h[piece.place] = inner = chunk.intermediate(self.x[piece.tokens], piece.bounds)
            if moments is not None:
                moments.add(inner, piece.affinity, piece.bounds)
            if moments is not None and compared is not None and self.exact is not None:
                should = compared[1].intermediate(self.exact[piece.tokens], piece.bounds)
                compared[0].add(inner, should, to_power(piece.affinity, moments.power), piece.tokens, piece.bounds)
        if moments is not None:
            for x, piece in self._drawn(chunk):
                moments.add(chunk.intermediate(x, piece.bounds), piece.affinity, piece.bounds)
        return h

    def down_samples(self, chunk: ExpertChunk, h_SI: Tensor) -> Tensor:
        """[C, S, I] some inputs of each expert's down projection, filled up with zeros; an expert without tokens gets the layer's."""
        samples = torch.zeros(chunk.count, SAMPLED_SLOTS, h_SI.shape[1])
        bounds = self.slots.chunk(chunk.start, chunk.stop).bounds
        for c, (low, high) in enumerate(pairwise(bounds)):
            x = self.target.sample[:SAMPLED_SLOTS]
            own = h_SI[low + layer_sample(high - low, SAMPLED_SLOTS)] if low < high else None
            rows = own if own is not None else intermediate(chunk.module, x, chunk.weights.experts(c, c + 1), [0, len(x)])
            samples[c, : len(rows)] = rows
        return samples

    def through_down(self, chunk: ExpertChunk, h_SI: Tensor) -> None:
        """Add the experts' outputs, and those for the pool's tokens, which run through the whole of the experts."""
        for piece in self._pieces(chunk):
            sys.audit("moebit.rows", "down", piece.bounds[-1])
            y = finish(chunk.module, h_SI[piece.place], piece.affinity, chunk.weights, piece.bounds)
            self.outputs.index_add_(0, piece.tokens, y)
        if self.pool is not None:
            self.pool.through(chunk)


@dataclass(frozen=True)
class PoolInputs:
    """The pool's tokens at a layer's experts.

    Attributes:
        x: [P, H] inputs of the block; slots: all routed slots; extra: those that count for an expert with too few tokens.
        outputs: [P, H] float32, added to.
    """

    stream: Stream
    x: Tensor
    slots: Slots
    extra: Slots
    outputs: Tensor

    def drawn(self, chunk: ExpertChunk) -> Iterator[tuple[Tensor, Slots]]:
        """(inputs [S, H], their slots) of the tokens that these experts drew."""
        for piece in self.extra.pieces(chunk.start, chunk.stop, self.stream.slots):
            yield self.x[piece.tokens], piece
            self.stream.store.release()

    def through(self, chunk: ExpertChunk) -> None:
        """Add the outputs of these experts, as they now are, for all tokens of the pool."""
        for piece in self.slots.pieces(chunk.start, chunk.stop, self.stream.slots):
            add_outputs(chunk.module, self.x, chunk.weights, piece, self.outputs)
            self.stream.store.release()
