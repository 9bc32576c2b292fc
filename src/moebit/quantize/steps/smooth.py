"""Smoothing: what arrives at a layer's linears is looked at once, before anything in it is rounded, and becomes edits of its weights.

The scales are those of `methods/smoothing.py`; where they may stand is what `model/proof/sites.py` proved when the plan was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebit.methods.awq import representable
from moebit.methods.balance import draw
from moebit.methods.router import probabilities
from moebit.methods.smoothing import aggregated, centred, expert_extremes, outlier_factors, smooth_scale
from moebit.model.experts import ExpertsLayout, RoutedTokens, read_experts
from moebit.model.proof.flow import NormSite
from moebit.model.proof.sites import LayerScales, PairSite, scale_behind_norm, scale_pair
from moebit.model.structure import LayerSites, MoESite
from moebit.quantize.context import LayerContext, LayerState
from moebit.recipe import SmoothingSection
from moebit.storage.edits import Edit, joined
from moebit.storage.weights import Weights
from moebit.streaming.routing import router_bias
from moebit.streaming.stream import Stream

PIECE = 4096  # tokens at a time
NOTHING_ROUNDED = "nothing behind it is quantized"
AFFINITIES = "experts weigh by their affinities: it is not recognised how the router scores them"
BIASES = "the biases of its experts are written as they are, up's rows cannot be scaled"


def smooth(context: LayerContext, state: LayerState) -> LayerState:
    """Scale channels of a layer, in the loaded layer and in what is written."""
    assert state.stream is not None
    plan, balance = context.plan, context.recipe.calibration.balance
    smoothed = LayerSmoothing(
        state.stream, context.sites, plan.transforms.scales[context.sites.index], context.recipe.smoothing, context.sink.weights,
        frozenset((*plan.linears, *plan.experts)), context.chunk, state.pool, 0.0 if balance == "none" else float(balance),
    ).run()  # fmt: skip
    context.edit(smoothed.edits)
    reference = replace(state.reference, inputs=divided(state.reference.inputs, smoothed.divisors, f"{context.sites.name}."))
    return replace(state, reference=reference, report=replace(state.report, smoothing=smoothed.describe()))


def divided(inputs: Mapping[str, Tensor], divisors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """What full precision delivers to modules of a layer, in the channels' new scale, so that it can be compared with what arrives.

    Args:
        inputs: [T, N] by name in the layer; divided in place, a piece at a time. divisors: [N] by full name. prefix: of the full names.
    """
    for name, x_TN in inputs.items():
        if (s := divisors.get(prefix + name)) is not None:
            for piece in x_TN.split(PIECE):
                piece.copy_(piece.float() / s.float())
    return inputs


@dataclass(frozen=True)
class SmoothedLayer:
    """What is done to a layer.

    Attributes:
        edits: of its weights. report: per norm and pair, the range of its scales. skipped: what was left, with the reason.
        divisors: full name -> [N] what the channels of a module's input are divided by.
    """

    edits: dict[str, tuple[Edit, ...]]
    report: dict[str, Any]
    skipped: dict[str, str]
    divisors: dict[str, Tensor]

    def describe(self) -> dict[str, Any]:
        """What the report says of it."""
        return {"scales": self.report, "skipped": self.skipped}


@dataclass(frozen=True)
class _Seen:
    """What arrived at a layer's modules.

    Attributes:
        extremes: full name -> [2, N] largest and smallest x per channel. routed: what the experts were asked, None without experts.
        extra: further tokens for some experts: (x, ids with E for slots that do not count).
    """

    extremes: Mapping[str, Tensor]
    routed: RoutedTokens | None
    extra: tuple[Tensor, Tensor] | None

    def largest(self, name: str) -> Tensor:
        """[N] largest |x| per channel."""
        return self.extremes[name].abs().amax(0)


@dataclass(frozen=True)
class LayerSmoothing:
    """Finds one layer's scales.

    Attributes:
        stream: in front of the layer, which is loaded. weights: of the layer as it is. chunk: experts to read at a time.
        quantized: full names of what will be rounded.
        pool, ratio: further windows in front of the layer, of which experts with too few tokens draw some (`methods/balance.py`).
    """

    stream: Stream
    sites: LayerSites
    scales: LayerScales
    recipe: SmoothingSection
    weights: Weights
    quantized: frozenset[str]
    chunk: int
    pool: Stream | None = None
    ratio: float = 0.0

    def run(self) -> SmoothedLayer:
        """Scales behind every norm and, for `expert_aware`, behind linears (values in attention, up in dense layers)."""
        norms = [site for site in self.scales.norms if self._rounded(site)]
        pairs = [pair for pair in self.scales.pairs if pair.second in self.quantized] if self.recipe.kind == "expert_aware" else []
        skipped = {**self.scales.skipped, **self._biased(), **{s.norm: NOTHING_ROUNDED for s in self.scales.norms if s not in norms}}
        seen, edits, report, divisors = self._look(norms, pairs), [], dict[str, Any](), dict[str, Tensor]()
        for site in norms:
            scale, notes = self._behind_norm(site, seen)
            skipped |= notes
            s = representable(self.weights.parameter(f"{site.norm}.weight"), scale, site.offset)
            edits.append(scale_behind_norm(site, s, self._layouts))
            report[site.norm] = _range(s)
            divisors |= dict.fromkeys((*site.readers, *([site.experts] if site.experts else [])), s)
        for pair in pairs:
            s = self._between(pair, seen)
            edits.append(scale_pair(pair, s))
            report[pair.second] = _range(s)
            divisors[pair.second] = s[pair.channels]
        return SmoothedLayer(joined(*edits), report, skipped, divisors)

    @property
    def _experts(self) -> str:
        """Full name of the layer's experts module; "" where it has none."""
        return f"{self.sites.name}.{self.sites.moe.experts}" if self.sites.moe else ""

    @property
    def _layouts(self) -> dict[str, ExpertsLayout]:
        return {self._experts: self.sites.moe.layout} if self.sites.moe else {}

    def _biased(self) -> dict[str, str]:
        """Experts whose outliers cannot move from up to down."""
        left = self.sites.moe is not None and self.sites.moe.layout.bias and self.scales.experts
        return {f"{self._experts}.down_proj": BIASES} if left else {}

    def _rounded(self, site: NormSite) -> bool:
        return any(name in self.quantized for name in (*site.readers, *([site.experts] if site.experts else [])))

    def _look(self, norms: list[NormSite], pairs: list[PairSite]) -> _Seen:
        """Run the layer as it is, once."""
        extremes: dict[str, Tensor] = {}
        prefix = self.sites.name + "."

        def note(name: str, rows: Tensor) -> None:
            full, found = prefix + name, _extremes(rows)
            extremes[full] = _joined([extremes[full], found]) if full in extremes else found

        names = {*(site.readers[0] for site in norms if site.readers), *(pair.second for pair in pairs)}
        with self.stream.watching([name.removeprefix(prefix) for name in names], note):
            if self.sites.moe is None:
                outputs = self.stream.store.allocate(tuple(self.stream.hidden.shape), self.stream.dtype)
                self.stream.run(self.sites.index, outputs=outputs)
                return _Seen(extremes, None, None)
            routed = self.stream.capture_routing(self.sites.index)
        extremes[self._experts] = _joined([_extremes(piece) for piece in routed.x.split(PIECE)])
        return _Seen(extremes, routed, self._drawn(routed, self.sites.moe.layout.experts))

    def _drawn(self, routed: RoutedTokens, experts: int) -> tuple[Tensor, Tensor] | None:
        if self.pool is None or self.recipe.kind != "expert_aware" or self.recipe.aggregate == "none":
            return None
        more = self.pool.capture_routing(self.sites.index)
        return more.x, draw(routed.counts(experts), more.ids, self.pool.windows.shape[1], self.ratio).ids

    def _behind_norm(self, site: NormSite, seen: _Seen) -> tuple[Tensor, dict[str, str]]:
        """Scales of one norm, and what was done otherwise than the recipe asks, with the reason."""
        activation = seen.largest(site.readers[0] if site.readers else str(site.experts))
        aware = site.experts is not None and self.recipe.kind == "expert_aware" and self.recipe.aggregate != "none"
        if not aware or site.experts not in self.quantized:
            columns = [self._columns(name) for name in site.readers if name in self.quantized]
            columns += [self._experts_columns().amax(0)] if site.experts in self.quantized else []
            return centred(smooth_scale(activation, torch.stack(columns).amax(0), self.recipe.alpha)), {}
        assert self.sites.moe is not None
        assert seen.routed is not None
        own, say, notes = self._experts_extremes(seen, seen.routed, self.sites.moe)
        router = f"{self.sites.name}.{self.sites.moe.router}"
        shared = [self._columns(name) for name in site.readers if name in self.quantized]
        others = [self._columns(router)] if router in site.readers else []
        others += [torch.stack(shared).amax(0)] if shared else []
        candidates = [smooth_scale(activation, columns, self.recipe.alpha) for columns in others]
        experts = smooth_scale(own, self._experts_columns(), self.recipe.alpha)
        return centred(aggregated(experts, say, candidates, self.recipe.aggregate)), notes

    def _experts_extremes(self, seen: _Seen, routed: RoutedTokens, moe: MoESite) -> tuple[Tensor, Tensor, dict[str, str]]:
        """([E, H] largest inputs of every expert, [E] what it weighs, notes)."""
        experts = moe.layout.experts
        own = torch.zeros(experts, moe.layout.hidden)
        for x, ids in ((routed.x, routed.ids), *([seen.extra] if seen.extra else [])):
            for rows, chosen in zip(x.split(PIECE), ids.split(PIECE), strict=True):
                own = torch.maximum(own, expert_extremes(rows, chosen, experts))
                self.stream.store.release()
        counts = routed.counts(experts)[:experts].float()
        if self.recipe.aggregate != "router":
            return own, counts, {}
        mean = self._mean_probability(routed, moe)
        if mean is not None:
            return own, mean * (counts > 0), {}
        return own, _affinities(routed, experts) * (counts > 0), {f"{self.sites.name}.{moe.router}": AFFINITIES}

    def _mean_probability(self, routed: RoutedTokens, moe: MoESite) -> Tensor | None:
        """[E] of the router's probabilities over all tokens; None where they are not recognised."""
        experts = moe.layout.experts
        router = self.stream.layer(self.sites.index).get_submodule(moe.router) if moe.router else None
        weight = getattr(router, "weight", None)
        if router is None or not isinstance(weight, Tensor) or weight.shape != (experts, moe.layout.hidden):
            return None
        count = -(-len(routed.x) // PIECE)  # of equal pieces: a few tokens at the end would not tell score functions apart
        bias, pieces = router_bias(router, experts), [v.tensor_split(count) for v in (routed.x, routed.ids, routed.weights)]
        found = (probabilities(x, weight, bias, ids, g) for x, ids, g in zip(*pieces, strict=True))
        sums = [p.sum(0) for p in found if p is not None]
        return torch.stack(sums).sum(0) / len(routed.x) if len(sums) == len(pieces[0]) else None

    def _columns(self, name: str) -> Tensor:
        """[N] largest |w| of every input channel of a linear."""
        return self.weights.parameter(f"{name}.weight").abs().amax(0).float()

    def _experts_columns(self) -> Tensor:
        """[E, H] largest |w| of every input channel of every expert's gate and up."""
        ((name, layout),) = self._layouts.items()
        parts = []
        for start in range(0, layout.experts, self.chunk):
            experts = read_experts(self.weights, name, layout, start, min(start + self.chunk, layout.experts))
            parts.append(experts.first.abs().amax(1))
        return torch.cat(parts)

    def _between(self, pair: PairSite, seen: _Seen) -> Tensor:
        """[rows of the first] scales; one for all channels of the second that a row reaches, one where it reaches none.

        Behind up (of shared experts, of dense layers) only channels that stand out are scaled, as in the routed experts.
        """
        if not pair.attention:  # channel by channel: as many inputs of the second as rows of the first, in their order
            high, low = seen.extremes[pair.second]
            return outlier_factors(high[None], low[None])[0]
        into = torch.zeros(2, pair.rows).scatter_reduce_(
            1, pair.channels.expand(2, -1), torch.stack([seen.largest(pair.second), self._columns(pair.second)]), "amax"
        )
        reached = torch.zeros(pair.rows, dtype=torch.bool)
        reached[pair.channels] = True
        s = torch.ones(pair.rows, dtype=torch.float64)
        s[reached] = centred(smooth_scale(into[0, reached], into[1, reached], self.recipe.alpha))
        return s


def _affinities(routed: RoutedTokens, experts: int) -> Tensor:
    """float64 [E] sums of the chosen experts' affinities."""
    inside = routed.ids.clamp(0, experts - 1)
    there = (routed.weights.abs() * (inside == routed.ids)).flatten().double()
    return torch.zeros(experts, dtype=torch.float64).index_add_(0, inside.flatten(), there)


def _extremes(x_TN: Tensor) -> Tensor:
    """[2, N] largest and smallest value of every channel."""
    return torch.stack(torch.aminmax(x_TN, dim=0)[::-1]).float()


def _joined(extremes: list[Tensor]) -> Tensor:
    """[2, N] extremes of all of them together."""
    every = torch.stack(extremes)
    return torch.stack([every[:, 0].amax(0), every[:, 1].amin(0)])


def _range(s: Tensor) -> list[float]:
    return [float(s.min()), float(s.max())]
