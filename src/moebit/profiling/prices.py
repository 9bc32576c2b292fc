"""The price of a width: how much rounding changes what a decoder layer puts out, measured.

A projection of an expert is rounded and the expert runs again over its own tokens; so does the whole expert, all of its projections
rounded together. Linears outside of the experts are in linear_prices.py. Nothing is linearised, so that all of them share one unit:

    price = mean over tokens of |change of the layer's output|^2 / |the layer's output|^2,

where the output includes the residual. The norm in front of the next layer divides every token by its own length, so this is what the
next layer sees; a few tokens of huge norm (attention sinks) weigh as much as any others.

How much of it reaches what the model predicts depends on where the change points. On a sample of tokens the changes of all experts
together are multiplied with gradients (sensitivity.py), which predicts their divergence; its ratio to the sum of the experts' prices is
the sensitivity at this width. Both matter where few bits are left: the values that err least are smaller than the weights (the best
scale leaves `<Q(w), w - Q(w)>` = 0, so Q(w) has the share 1 - |w - Q(w)|^2 / |w|^2 of w in it), so that the errors of gate, up and
down, and those of the experts that share a token, point the same way and add up to more than the sum of their squares.

Shape suffixes: C experts of a chunk, S routed slots, T tokens, H hidden, I intermediate, W candidate widths, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.statistics import ExpertMoments, down_layer_hessians, layer_sample
from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, Slots, finish, grouped_linear
from moebit.streaming.stream import Stream
from moebit.tensor import UniformGrid, second_moment, solve_gptq, solve_rtn

LINEAR_TOKENS = 1024  # that a linear outside of the experts is measured on; every width of it runs the layer twice over them
WHOLE = ""  # in the place of a projection: all of them together
AFFINITY_POWER = 2.0  # squared errors of experts enter the layer's output with the square of their affinity


@dataclass(frozen=True)
class Measure:
    """How prices are measured.

    Attributes:
        widths: candidates, rising.
        scheme: the grid, but for the type of the scales.
        solver: `rtn` rounds to nearest with the clipping search alone, so that the rounding is the same whatever the data; `gptq` rounds
            with GPTQ on this data set, experts from second moments that are drawn towards the layer's as when a model is quantized.
        clip_search: whether clipping ratios are searched for.
        linears: full names of the linears outside of the experts that are measured.
        dtypes: the type of the scales, by module.
    """

    widths: tuple[int, ...]
    scheme: UniformGrid
    solver: str
    clip_search: bool
    linears: frozenset[str]
    dtypes: Mapping[str, torch.dtype]

    def rounded(self, name: str, w_COI: Tensor, moment_CNN: Tensor | None, bits: int) -> Tensor:
        """Return [C, out, in] float32, the matrices of the module `name` rounded to `bits`, to nearest where no moments are given."""
        scheme = replace(self.scheme, scale_dtype=self.dtypes[name])
        if moment_CNN is not None:
            return solve_gptq(w_COI, moment_CNN, bits, scheme, clip_search=self.clip_search)[0].dequantize()
        return solve_rtn(w_COI, bits, scheme, clip_search=self.clip_search).dequantize()


def token_weights(output_NLH: Tensor) -> Tensor:
    """Return float64 [T]: one over the squared length of every token of a layer's output, divided by the number of tokens."""
    lengths = torch.cat([piece.double().flatten(2).square().sum(2).flatten() for piece in output_NLH.split(1)])
    return 1 / (lengths.clamp(min=1e-30) * len(lengths))


def sensitivity(kl_W: Tensor, price_W: Tensor) -> Tensor:
    """Return float64 [W], nats per unit of price; 0 where nothing changes."""
    kl, price = kl_W.double(), price_W.double()
    return torch.where(price > 0, kl / price.clamp(min=1e-300), 0.0)


@dataclass(frozen=True)
class _Chunk:
    """Experts [start, stop) of a layer: their weights in float32, what gate and up put out of their slots, what down does (weighed)."""

    weights: ExpertWeights
    start: int
    stop: int
    out: Tensor
    y: Tensor


@dataclass(frozen=True)
class ExpertPrices:
    """The experts of one layer, by projection and whole, rounded to each candidate width, over the tokens routed to each.

    Attributes:
        name: the full name of the experts module.
        routed, slots: what the experts are asked; slots are the layer's.
        weight_T: float64, what a token counts (`token_weights` of the layer's output).
        gradient: [S, H] of the first tokens (`layer_gradients`), for sensitivities; None leaves them out.
        moved: part -> float64 [W, S], gradient times change of these tokens, all experts rounded; added to by `chunk`.
        paid: part -> float64 [W], the prices of all experts over these tokens; added to by `chunk`.
    """

    stream: Stream
    name: str
    layout: ExpertsLayout
    module: Any
    routed: RoutedTokens
    slots: Slots
    weight_T: Tensor
    measure: Measure
    gradient: Tensor | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)
    paid: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gradient is not None:
            widths = len(self.measure.widths)
            self.moved.update({part: torch.zeros(widths, len(self.gradient), dtype=torch.float64) for part in self.parts})
            self.paid.update({part: torch.zeros(widths, dtype=torch.float64) for part in self.parts})

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """What is priced -> the projections that are rounded for it."""
        return {**{projection: (projection,) for projection in self.layout.projections}, WHOLE: self.layout.projections}

    def sensitivities(self) -> dict[str, Tensor]:
        """Return part -> float64 [W], nats per unit of price, once all chunks are done."""
        if self.gradient is None:
            return {}
        tokens, sample = len(self.weight_T), len(self.gradient)
        return {part: sensitivity(0.5 * self.moved[part].square().mean(1), self.paid[part] * tokens / sample) for part in self.parts}

    def chunk(self, weights: ExpertWeights, start: int, stop: int) -> dict[str, Tensor]:
        """Return part -> float64 [W, C], the prices of experts [start, stop), whose weights are float32."""
        count = self.slots.bounds[stop] - self.slots.bounds[start]
        out = self.stream.store.allocate((count, weights.first.shape[1]), torch.float32)
        y = self.stream.store.allocate((count, self.layout.hidden), torch.float32)
        chunk = _Chunk(weights, start, stop, out, y)
        moments = self._run(chunk)
        found: dict[str, list[Tensor]] = {part: [] for part in self.parts}
        for number, bits in enumerate(self.measure.widths):
            values = {p: self.measure.rounded(self.name, self._weight(weights, p), moments.get(p), bits) for p in self.layout.projections}
            for part, projections in self.parts.items():
                found[part].append(self._price(part, number, {p: values[p] for p in projections}, chunk))
        return {part: torch.stack(prices) for part, prices in found.items()}

    def _weight(self, weights: ExpertWeights, projection: str) -> Tensor:
        return weights.down if projection == "down_proj" else weights.first[:, self.layout.rows(projection)]

    def _run(self, chunk: _Chunk) -> dict[str, Tensor]:
        """Fill in what the experts put out; returns the second moments that GPTQ rounds with, by projection, none for other solvers."""
        solves, experts = self.measure.solver == "gptq", chunk.stop - chunk.start
        hidden, inner = (
            ExpertMoments.zeros(experts, self.layout.features(p)[1] if solves else 0, AFFINITY_POWER)
            for p in (self.layout.projections[0], "down_proj")
        )
        for x, piece in self._pieces(chunk):
            chunk.out[piece.place] = grouped_linear(x, chunk.weights.first, chunk.weights.first_bias, piece.bounds)
            h = self._gated(chunk.out[piece.place])
            chunk.y[piece.place] = finish(self.module, h, piece.affinity, chunk.weights, piece.bounds)
            if solves:
                hidden.add(x, piece.affinity, piece.bounds)
                inner.add(h, piece.affinity, piece.bounds)
        if not solves:
            return {}
        sample = self.routed.x[layer_sample(len(self.routed.x))].float()
        layer = second_moment(sample) / len(sample)
        of_first = hidden.shrunk(layer)
        of_down = inner.shrunk(down_layer_hessians(self.module, sample, chunk.weights, self.stream.slots))
        return {p: of_down if p == "down_proj" else of_first for p in self.layout.projections}

    def _pieces(self, chunk: _Chunk) -> Iterator[tuple[Tensor, Slots]]:
        for piece in self.slots.pieces(chunk.start, chunk.stop, self.stream.slots):
            yield self.routed.x[piece.tokens].float(), piece
            self.stream.store.release()

    def _gated(self, out: Tensor) -> Tensor:
        h: Tensor = self.module._apply_gate(out) if self.module.has_gate else self.module.act_fn(out)
        return h

    def _price(self, part: str, number: int, values: Mapping[str, Tensor], chunk: _Chunk) -> Tensor:
        """Return float64 [C], with the matrices of `values` in the place of the experts' own."""
        weights, experts = chunk.weights, chunk.stop - chunk.start
        changed = replace(weights, down=values["down_proj"]) if "down_proj" in values else weights
        missed = {p: value - self._weight(weights, p) for p, value in values.items() if p != "down_proj"}
        total = torch.zeros(experts, dtype=torch.float64)
        for x, piece in self._pieces(chunk):
            inner = chunk.out[piece.place]
            inner = inner.clone() if missed else inner
            for projection, error in missed.items():
                inner[:, self.layout.rows(projection)] += grouped_linear(x, error, None, piece.bounds)
            after = finish(self.module, self._gated(inner), piece.affinity, changed, piece.bounds)
            change = after - chunk.y[piece.place]
            cost = change.square().sum(1).double() * self.weight_T[piece.tokens]
            total.index_add_(0, torch.arange(experts).repeat_interleave(torch.tensor(piece.bounds).diff()), cost)
            self._reach(part, number, change, cost, piece.tokens)
        return total

    def _reach(self, part: str, number: int, change: Tensor, cost: Tensor, tokens: Tensor) -> None:
        """Note what the changes of tokens that have a gradient do to what the model predicts."""
        if self.gradient is None:
            return
        inside = tokens < len(self.gradient)
        along = (change[inside].double() * self.gradient[tokens[inside]].double()).sum(1)
        self.moved[part][number].index_add_(0, tokens[inside], along)
        self.paid[part][number] += cost[inside].sum()
