"""Prices of linears outside of the experts: each is rounded and the rest of its layer runs again, routing and experts included.

The router may choose other experts, and the experts see other inputs: what attention does to them is most of what its rounding costs.
The unit is that of prices.py. Shape suffixes: S routed slots, T tokens, H hidden, W candidate widths, M trials, N inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moebit.model.experts import ExpertWeights, Slots, add_outputs, dispatch
from moebit.model.seam import ExpertsHandler
from moebit.model.structure import LayerSites
from moebit.profiling.prices import LINEAR_TOKENS, Measure, sensitivity, token_weights
from moebit.profiling.sensitivity import predicted_kl
from moebit.streaming.stream import Stream
from moebit.tensor import add_second_moment, mirror_


@dataclass
class LinearTrials:
    """The linears of one loaded layer, each rounded to each candidate width: what the experts are asked then, and what the layer puts out.

    Attributes:
        stream: the windows in front of the layer.
        gradient: [T, H] of the sample (`layer_gradients`), for sensitivities; None leaves them out.
        names: the linears, by their names in the layer.
        x, ids, weights: [M·S, ...] what the experts are asked, one trial after the other; empty in a layer without experts.
        outputs: [M·S, H] float32, what the experts answer: `run` adds to it.
        moments: linear -> [1, N, N] second moments of its input, where GPTQ rounds; none for linears behind the experts, whose inputs
            are not known before the experts answer: they are rounded to nearest.
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
    moments: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        full = {f"{self.sites.name}.{name}": name for group in self.sites.groups for name in group.names}
        self.names = [name for whole, name in full.items() if whole in self.measure.linears]
        self.moments = self._seen() if self.measure.solver == "gptq" else {}
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

    def _seen(self) -> dict[str, Tensor]:
        """Second moments of the linears' inputs, over all windows in one run of the layer."""
        groups = [g for g in self.sites.groups if set(g.names) & set(self.names) and not g.behind_experts]
        sums = {group.names[0]: torch.zeros(group.in_features, group.in_features) for group in groups}
        if not sums:
            return {}

        def note(total: Tensor) -> Callable[[Tensor], None]:
            return lambda x: add_second_moment(total, x.reshape(-1, x.shape[-1]))

        self.stream.run(self.sites.index, experts=lambda rows: _silent, inputs={name: note(total) for name, total in sums.items()})
        return {name: mirror_(sums[group.names[0]]).unsqueeze(0) for group in groups for name in group.names}

    def _trials(self) -> Iterator[tuple[int, str, int]]:
        """(number, linear, width), with the linear rounded in the layer while the caller looks at it."""
        number = 0
        for name in self.names:
            linear: Any = self.layer.get_submodule(name)
            kept = linear.weight
            for bits in self.measure.widths:
                value = self.measure.rounded(f"{self.sites.name}.{name}", kept.unsqueeze(0), self.moments.get(name), bits)[0]
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
            **{
                f"{self.sites.name}.{name}.sensitivity": sensitivity(torch.tensor(kls), torch.tensor(found[name]))
                for name, kls in reached.items()
                if kls
            },
        }


def _silent(module: nn.Module, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(states)
