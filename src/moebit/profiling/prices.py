"""The price of a width: how much rounding one matrix changes what its decoder layer puts out, measured.

A projection of an expert is rounded and the expert runs again over its own tokens. A linear outside of the experts is rounded and the
whole layer runs again over a sample of tokens, with routing and experts as they follow from the changed attention: the router may choose
other experts, and the experts see other inputs. Nothing is linearised, so that gate, up, down and attention share one unit:

    price = mean over tokens of |change of the layer's output|^2 / |the layer's output|^2,

where the output includes the residual. The norm in front of the next layer divides every token by its own length, so this is what the
next layer sees; a few tokens of huge norm (attention sinks) weigh as much as any others.

How much of it reaches what the model predicts depends on where the change points. On a sample of tokens the same changes are also
multiplied with gradients (sensitivity.py), which predicts their divergence; its ratio to the price above is the matrix's sensitivity.

Shape suffixes: C experts of a chunk, S routed slots, T tokens, H hidden, I intermediate, W candidate widths, M trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, Slots, add_outputs, dispatch, finish, grouped_linear
from moebit.model.seam import ExpertsHandler
from moebit.model.structure import LayerSites
from moebit.profiling.sensitivity import predicted_kl
from moebit.streaming.stream import Stream
from moebit.tensor import UniformGrid, add_second_moment, mirror_, solve_gptq, solve_rtn

LINEAR_TOKENS = 1024  # that a linear outside of the experts is measured on; every width of it runs the layer twice over them


@dataclass(frozen=True)
class Measure:
    """How prices are measured.

    Attributes:
        widths: candidates, rising.
        scheme: the grid, but for the type of the scales.
        solver: `rtn` rounds to nearest with the clipping search alone, so that the rounding is the same whatever the data; `gptq` rounds
            the experts with GPTQ on this data set.
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

    def rounded(self, name: str, w_COI: Tensor, moment_CII: Tensor | None, bits: int) -> Tensor:
        """Return [C, out, in] float32, the matrices of the module `name` rounded to `bits`."""
        scheme = replace(self.scheme, scale_dtype=self.dtypes[name])
        if self.solver == "gptq" and moment_CII is not None:
            return solve_gptq(w_COI, moment_CII, bits, scheme, clip_search=self.clip_search)[0].dequantize()
        return solve_rtn(w_COI, bits, scheme, clip_search=self.clip_search).dequantize()


def token_weights(output_NLH: Tensor) -> Tensor:
    """Return float64 [T]: one over the squared length of every token of a layer's output, divided by the number of tokens."""
    lengths = torch.cat([piece.double().flatten(2).square().sum(2).flatten() for piece in output_NLH.split(1)])
    return 1 / (lengths.clamp(min=1e-30) * len(lengths))


@dataclass
class LinearTrials:
    """The linears of one loaded layer, each rounded to each candidate width: what the experts are asked then, and what the layer puts out.

    Attributes:
        stream: the windows in front of the layer.
        gradient: [T, H] of the sample (`layer_gradients`), for sensitivities; None leaves them out.
        names: the linears, by their names in the layer.
        x, ids, weights: [M·S, ...] what the experts are asked, one trial after the other; empty in a layer without experts.
        outputs: [M·S, H] float32, what the experts answer: `run` adds to it.
    """

    stream: Stream
    sites: LayerSites
    layer: nn.Module
    measure: Measure
    gradient: Tensor | None = None
    names: list[str] = field(init=False)
    x: Tensor = field(init=False)
    ids: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    outputs: Tensor = field(init=False)

    def __post_init__(self) -> None:
        full = {f"{self.sites.name}.{name}": name for group in self.sites.groups for name in group.names}
        self.names = [name for whole, name in full.items() if whole in self.measure.linears]
        if self.sites.moe is not None and self.names:
            self._ask()

    @property
    def windows(self) -> int:
        """The number of windows that are measured, whatever `--memory` lets run together."""
        return min(len(self.stream.windows), -(-LINEAR_TOKENS // self.stream.windows.shape[1]))

    @property
    def batches(self) -> int:
        """The number of batches that hold these windows."""
        return sum(rows.start < self.windows for rows in self.stream.batches())

    @property
    def tokens(self) -> int:
        """The number of tokens in these batches."""
        last = list(self.stream.batches())[self.batches - 1]
        return last.stop * self.stream.windows.shape[1]

    def _trials(self) -> Iterator[tuple[int, str, int]]:
        """(number, linear, width), with the linear rounded in the layer while the caller looks at it."""
        number = 0
        for name in self.names:
            linear: Any = self.layer.get_submodule(name)
            kept = linear.weight
            for bits in self.measure.widths:
                value = self.measure.rounded(f"{self.sites.name}.{name}", kept.unsqueeze(0), None, bits)[0]
                linear.weight = nn.Parameter(value.to(kept.dtype), requires_grad=False)
                try:
                    yield number, name, bits
                finally:
                    linear.weight = kept
                number += 1

    def _ask(self) -> None:
        """Run every trial up to the experts and keep what they are asked."""
        moe, stream = self.sites.moe, self.stream
        assert moe is not None
        total = len(self.names) * len(self.measure.widths) * self.tokens
        self.x = stream.store.allocate((total, moe.layout.hidden), stream.dtype)
        self.ids, self.weights = torch.empty(total, moe.top_k, dtype=torch.int64), torch.empty(total, moe.top_k)
        self.outputs = stream.store.allocate((total, moe.layout.hidden), torch.float32).zero_()
        for number, _, _ in self._trials():
            stream.run(self.sites.index, experts=self._noted(number * self.tokens), stop=self.batches)

    def _noted(self, offset: int) -> Any:
        def note(rows: slice) -> ExpertsHandler:
            span = self.stream.token_span(rows)
            place = slice(offset + span.start, offset + span.stop)

            def handler(module: nn.Module, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
                self.x[place], self.ids[place], self.weights[place] = states, ids, weights.float()
                return torch.zeros_like(states)

            return handler

        return note

    def slots(self) -> Slots:
        """The routed slots of all trials."""
        assert self.sites.moe is not None
        return dispatch(self.ids, self.weights, self.sites.moe.layout.experts)

    def run(self, module: nn.Module, weights: ExpertWeights, slots: Slots, start: int, stop: int) -> None:
        """Add what experts [start, stop) answer in all trials."""
        for piece in slots.pieces(start, stop, self.stream.slots):
            add_outputs(module, self.x, weights, piece, self.outputs)
            self.stream.store.release()

    def prices(self, outputs_TH: Tensor | None) -> dict[str, Tensor]:
        """Return LINEAR.error [W] by full name.

        Args:
            outputs_TH: what the experts put out for all tokens of the stream, unrounded; None in a layer without experts.
        """
        if not self.names:
            return {}
        stream, index, moe = self.stream, self.sites.index, self.sites.moe is not None
        plain, changed = (torch.empty(stream.hidden[: self.tokens // stream.windows.shape[1]].shape, dtype=stream.dtype) for _ in range(2))
        stream.run(index, experts=stream.replay(outputs_TH) if outputs_TH is not None else None, outputs=plain, stop=self.batches)
        weight_T = token_weights(plain[: self.windows])
        found: dict[str, list[float]] = {name: [] for name in self.names}
        reached: dict[str, list[float]] = {name: [] for name in self.names}
        for number, name, _ in self._trials():
            mine = slice(number * self.tokens, (number + 1) * self.tokens)
            stream.run(index, experts=stream.replay(self.outputs[mine]) if moe else None, outputs=changed, stop=self.batches)
            change = (changed[: self.windows].double() - plain[: self.windows].double()).flatten(2).flatten(0, 1)
            found[name].append(float(change.square().sum(1) @ weight_T))
            if self.gradient is not None:
                reached[name].append(predicted_kl(self.gradient[: len(change)], change))
        return {
            **{f"{self.sites.name}.{name}.error": torch.tensor(prices, dtype=torch.float32) for name, prices in found.items()},
            **{f"{self.sites.name}.{name}.sensitivity": _ratio(kls, found[name]) for name, kls in reached.items() if kls},
        }


def _ratio(kls: Sequence[float], prices: Sequence[float]) -> Tensor:
    """Return float64 [1], nats per unit of price: the mean over widths; 0 where nothing changes."""
    ratios = [kl / price if price else 0.0 for kl, price in zip(kls, prices, strict=True)]
    return torch.tensor([sum(ratios) / len(ratios)], dtype=torch.float64)


@dataclass(frozen=True)
class ExpertPrices:
    """The projections of one layer's experts, each rounded to each candidate width, over the tokens routed to its expert.

    Attributes:
        name: the full name of the experts module.
        routed, slots: what the experts are asked; slots are the layer's.
        weight_T: float64, what a token counts (`token_weights` of the layer's output).
        gradient: [S, H] of the first tokens (`layer_gradients`), for sensitivities; None leaves them out.
        changes: projection -> [W, S, H] float32, the changes of the output over these tokens, all experts rounded; added to by `chunk`.
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
    changes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gradient is not None:
            shape = (len(self.measure.widths), *self.gradient.shape)
            self.changes.update({p: self.stream.store.allocate(shape, torch.float32).zero_() for p in self.layout.projections})

    def sensitivities(self) -> dict[str, Tensor]:
        """Return projection -> float64 [1], nats per unit of price, once all chunks are done."""
        if self.gradient is None:
            return {}
        weight_S = self.weight_T[: len(self.gradient)]
        weight_S = weight_S * (len(self.weight_T) / len(weight_S))
        found = {}
        for projection, changes in self.changes.items():
            prices = [float(change.double().square().sum(1) @ weight_S) for change in changes]
            found[projection] = _ratio([predicted_kl(self.gradient, change) for change in changes], prices)
        return found

    def chunk(self, weights: ExpertWeights, start: int, stop: int) -> dict[str, Tensor]:
        """Return projection -> float64 [W, C], the prices of experts [start, stop), whose weights are float32."""
        count = self.slots.bounds[stop] - self.slots.bounds[start]
        out = self.stream.store.allocate((count, weights.first.shape[1]), torch.float32)
        y = self.stream.store.allocate((count, self.layout.hidden), torch.float32)
        moments = self._moments(stop - start)
        for x, piece in self._pieces(start, stop):
            out[piece.place] = grouped_linear(x, weights.first, weights.first_bias, piece.bounds)
            h = self._gated(out[piece.place])
            y[piece.place] = finish(self.module, h, piece.affinity, weights, piece.bounds)
            for projection, total in moments.items():
                _add_moments(total, h if projection == "down_proj" else x, piece)
        found = {}
        for projection in self.layout.projections:
            moment = mirror_(moments[projection]) if moments else None
            prices = [self._price(projection, bits, moment, weights, out, y, start, stop) for bits in self.measure.widths]
            found[projection] = torch.stack(prices)
        return found

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Tensor, Slots]]:
        for piece in self.slots.pieces(start, stop, self.stream.slots):
            yield self.routed.x[piece.tokens].float(), piece
            self.stream.store.release()

    def _moments(self, experts: int) -> dict[str, Tensor]:
        """Zeros for the second moments that GPTQ rounds with; none for rounding to nearest."""
        if self.measure.solver != "gptq":
            return {}
        sizes = {projection: self.layout.features(projection)[1] for projection in self.layout.projections}
        return {projection: torch.zeros(experts, size, size) for projection, size in sizes.items()}

    def _gated(self, out: Tensor) -> Tensor:
        h: Tensor = self.module._apply_gate(out) if self.module.has_gate else self.module.act_fn(out)
        return h

    def _price(
        self, projection: str, bits: int, moment: Tensor | None, weights: ExpertWeights, out: Tensor, y: Tensor, start: int, stop: int
    ) -> Tensor:
        """Return float64 [C]."""
        down, rows = projection == "down_proj", self.layout.rows(projection) if projection != "down_proj" else slice(0)
        w = weights.down if down else weights.first[:, rows]
        value = self.measure.rounded(self.name, w, moment, bits)
        changed = replace(weights, down=value) if down else weights
        missed = value - w.float()
        total = torch.zeros(stop - start, dtype=torch.float64)
        for x, piece in self._pieces(start, stop):
            inner = out[piece.place]
            if not down:
                inner = inner.clone()
                inner[:, rows] += grouped_linear(x, missed, None, piece.bounds)
            after = finish(self.module, self._gated(inner), piece.affinity, changed, piece.bounds)
            change = after - y[piece.place]
            cost = change.square().sum(1).double() * self.weight_T[piece.tokens]
            total.index_add_(0, torch.arange(stop - start).repeat_interleave(torch.tensor(piece.bounds).diff()), cost)
            if self.gradient is not None:
                inside = piece.tokens < len(self.gradient)
                self.changes[projection][self.measure.widths.index(bits)].index_add_(0, piece.tokens[inside], change[inside])
        return total


def _add_moments(moment_CNN: Tensor, x_SN: Tensor, piece: Slots) -> None:
    """Add x x^T, weighted by the squared affinity, to every expert's moment."""
    weight_S = piece.affinity.float().square()
    for c, (low, high) in enumerate(pairwise(piece.bounds)):
        if low < high:
            add_second_moment(moment_CNN[c], x_SN[low:high], weight_S[low:high])
