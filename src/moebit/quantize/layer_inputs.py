"""What the matrices of one decoder layer are calibrated on: inputs that pass by, and the routed slots of its experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from moebit.calibration.statistics import ExpertMoments, down_layer_hessians, layer_sample, output_sensitivity, to_power
from moebit.methods.drift import DriftMoments
from moebit.methods.soft_coverage import SoftCoverage
from moebit.model.experts import ExpertsLayout, ExpertWeights, Slots, add_outputs, finish, intermediate
from moebit.streaming.stream import Stream
from moebit.tensor import add_second_moment, mirror_

SAMPLED_SLOTS = 128  # of an expert's tokens, that a transform of its down projection is made from


@dataclass
class Statistics:
    """What is seen of a group's input while it passes by.

    Attributes:
        total: [N, N] second moments, complete above the diagonal only; None where nothing is solved from them, or where drift has them.
        positions: tokens that are kept as a sample, in order. kept: them. seen: tokens so far.
        drift, exact: sums of what arrives and should arrive; what full precision delivers, [T, N].
    """

    total: Tensor | None
    positions: Tensor
    kept: list[Tensor] = field(default_factory=list)
    seen: int = 0
    drift: DriftMoments | None = None
    exact: Tensor | None = None

    def add(self, x_TN: Tensor, weight_T: Tensor | None = None) -> None:
        if self.drift is not None and self.exact is not None:
            tokens = torch.arange(self.seen, self.seen + len(x_TN))
            self.drift.add(x_TN, self.exact[tokens], weight_T, tokens, [0, len(x_TN)])
        if self.total is not None:
            add_second_moment(self.total, x_TN, weight_T)
        inside = self.positions[(self.positions >= self.seen) & (self.positions < self.seen + len(x_TN))]
        if len(inside):
            self.kept.append(x_TN[inside - self.seen].float())
        self.seen += len(x_TN)

    @property
    def hessian(self) -> Tensor | None:
        """[N, N]."""
        if self.drift is not None:
            return self.drift.hessian[0]
        return None if self.total is None else mirror_(self.total)

    @property
    def sample(self) -> Tensor:
        """[S, N] float32."""
        return torch.cat(self.kept)


@dataclass(frozen=True)
class ExpertInputs:
    """What a layer's experts are calibrated on, a limited number of routed slots at a time.

    Attributes:
        x: [T, H] inputs of the block; slots: all routed slots. sample: some of the layer's tokens; h_layer: the moment of all, [H, H].
        outputs: [T, H] float32, added to. pool: further tokens, for experts that get too few of these.
        soft: how near the tokens came to the experts; in the place of h_layer.
        exact: [T, H] what full precision delivers for the same tokens, where weights are corrected for drift.
    """

    stream: Stream
    layout: ExpertsLayout
    x: Tensor
    slots: Slots
    sample: Tensor
    h_layer: Tensor
    outputs: Tensor
    pool: PoolInputs | None = None
    soft: SoftCoverage | None = None
    exact: Tensor | None = None

    def _pieces(self, start: int, stop: int) -> Iterator[Slots]:
        for piece in self.slots.pieces(start, stop, self.stream.slots):
            yield piece
            self.stream.store.release()

    def hessians(
        self, start: int, stop: int, power: float, sensitive: tuple[nn.Module, ExpertsLayout, ExpertWeights] | None = None
    ) -> Tensor:
        """[C, H, H] of gate and up.

        Args:
            sensitive: weigh slots by what an error costs in the layer's output instead, through these experts as they are.
        """
        moments = ExpertMoments.zeros(stop - start, self.x.shape[1], 1.0 if sensitive else power)
        for piece in self._pieces(start, stop):
            moments.add(x := self.x[piece.tokens], self._weight(x, piece, sensitive), piece.bounds)
        for x, piece in self.pool.drawn(start, stop) if self.pool else ():
            moments.add(x, self._weight(x, piece, sensitive), piece.bounds)
        return moments.shrunk(self.h_layer if self.soft is None else self.soft.moments(self.x, start, stop))

    def down_target(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int) -> Tensor:
        """[C, I, I] what Hessians of down are drawn towards: the layer's tokens as they come through these experts."""
        shares = None if self.soft is None else self.soft.through[:, start:stop]
        return down_layer_hessians(module, self.sample, weights, self.stream.slots, shares)

    def first_drift(
        self, start: int, stop: int, power: float, sensitive: tuple[nn.Module, ExpertsLayout, ExpertWeights] | None = None
    ) -> DriftMoments:
        """Of the inputs of gate and up, tokens weighted as in `hessians`; there is nothing to compare those of the pool with."""
        assert self.exact is not None
        moments = DriftMoments.zeros(stop - start, self.x.shape[1], len(self.x), self.stream.windows.shape[1])
        for piece in self._pieces(start, stop):
            x = self.x[piece.tokens]
            weight = to_power(self._weight(x, piece, sensitive), 1.0 if sensitive else power)
            moments.add(x, self.exact[piece.tokens], weight, piece.tokens, piece.bounds)
        return moments

    def _weight(self, x: Tensor, piece: Slots, sensitive: tuple[nn.Module, ExpertsLayout, ExpertWeights] | None) -> Tensor:
        """[S] affinities, or what an error costs in the layer's output."""
        if sensitive is None:
            return piece.affinity
        module, layout, weights = sensitive
        return output_sensitivity(module, layout, x, piece.affinity, weights, piece.bounds)

    def extremes(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """[C, I] largest and smallest input of every channel of down; zero for experts without tokens."""
        high = torch.full((stop - start, self.layout.intermediate), -torch.inf)
        low = -high
        own = ((self.x[piece.tokens], piece) for piece in self._pieces(start, stop))
        for x, piece in chain(own, self.pool.drawn(start, stop) if self.pool else ()):
            h = intermediate(module, x, weights, piece.bounds).float()
            for c, (begin, end) in enumerate(pairwise(piece.bounds)):
                if begin < end:
                    torch.maximum(high[c], h[begin:end].amax(0), out=high[c])
                    torch.minimum(low[c], h[begin:end].amin(0), out=low[c])
        seen = high > -torch.inf
        return torch.where(seen, high, 0.0), torch.where(seen, low, 0.0)

    def through_first(
        self,
        module: nn.Module,
        weights: ExpertWeights,
        start: int,
        stop: int,
        moments: ExpertMoments | None,
        compared: tuple[DriftMoments, ExpertWeights] | None = None,
    ) -> Tensor:
        """[S, I] inputs of down, for all slots of these experts; their moments are added to `moments`.

        Args:
            compared: gets how they drift from what these experts, in full precision, deliver.
        """
        count = self.slots.bounds[stop] - self.slots.bounds[start]
        h = self.stream.store.allocate((count, weights.down.shape[2]), self.stream.dtype)
        for piece in self._pieces(start, stop):
            h[piece.place] = inner = intermediate(module, self.x[piece.tokens], weights, piece.bounds)
            if moments is not None:
                moments.add(inner, piece.affinity, piece.bounds)
            if moments is not None and compared is not None and self.exact is not None:
                should = intermediate(module, self.exact[piece.tokens], compared[1], piece.bounds)
                compared[0].add(inner, should, to_power(piece.affinity, moments.power), piece.tokens, piece.bounds)
        if moments is not None and self.pool is not None:
            for x, piece in self.pool.drawn(start, stop):
                moments.add(intermediate(module, x, weights, piece.bounds), piece.affinity, piece.bounds)
        return h

    def down_samples(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int, h: Tensor) -> Tensor:
        """[C, S, I] some inputs of each expert's down projection, filled up with zeros; an expert without tokens gets the layer's."""
        samples = torch.zeros(stop - start, SAMPLED_SLOTS, h.shape[1])
        bounds = self.slots.chunk(start, stop).bounds
        for c, (low, high) in enumerate(pairwise(bounds)):
            x = self.sample[:SAMPLED_SLOTS]
            own = h[low + layer_sample(high - low, SAMPLED_SLOTS)] if low < high else None
            rows = own if own is not None else intermediate(module, x, weights.experts(c, c + 1), [0, len(x)])
            samples[c, : len(rows)] = rows
        return samples

    def through_down(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int, h: Tensor) -> None:
        """Add the experts' outputs."""
        for piece in self._pieces(start, stop):
            y = finish(module, h[piece.place], piece.affinity, weights, piece.bounds)
            self.outputs.index_add_(0, piece.tokens, y)


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

    def drawn(self, start: int, stop: int) -> Iterator[tuple[Tensor, Slots]]:
        """(inputs [S, H], their slots) of the tokens that experts [start, stop) drew."""
        for piece in self.extra.pieces(start, stop, self.stream.slots):
            yield self.x[piece.tokens], piece
            self.stream.store.release()

    def through(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int) -> None:
        """Add the outputs of these experts, as they now are, for all tokens of the pool."""
        for piece in self.slots.pieces(start, stop, self.stream.slots):
            add_outputs(module, self.x, weights, piece, self.outputs)
            self.stream.store.release()
