"""AWQ's scales: a layer's inputs are sampled once, before anything is rounded, and the best scales become edits of its weights.

Where scales may stand is what `model/proof/sites.py` proved when the plan was made. A site is judged by what is rounded behind it: behind
a norm all its quantized readers together, the routed experts among them with their affinities, shared experts behind a gate with
sigmoid(gate x); behind a linear the one that takes its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.statistics import shared_affinity
from moebit.formats.native import PackedSpec
from moebit.methods.awq import RATIOS, best, candidates, losses, magnitudes, representable, sampled_slots
from moebit.model.experts import ExpertsLayout, RoutedTokens, Slots, dispatch, intermediate, read_experts
from moebit.model.proof.flow import NormSite
from moebit.model.proof.sites import LayerScales, PairSite, scale_behind_norm, scale_down, scale_pair
from moebit.model.structure import LayerSites, MoESite
from moebit.quantize.context import LayerContext, LayerState
from moebit.quantize.solve import grid_of
from moebit.quantize.statistics import shared_gate
from moebit.storage.edits import Edit, joined
from moebit.storage.weights import Weights
from moebit.streaming.stream import Stream
from moebit.tensor import Grid
from moebit.tensor.spacing import evenly_spaced

TOKENS = 512  # that everything outside of the routed experts is judged on
MATRIX_BYTES = 64 * 2**20  # of experts that are judged together
Edits = dict[str, tuple[Edit, ...]]


def scale(context: LayerContext, state: LayerState) -> LayerState:
    """Scale channels up where that spares the large ones some rounding, in the loaded layer and in what is written."""
    assert state.stream is not None
    plan, recipe, moe = context.plan, context.recipe, context.sites.moe

    def rounding(spec: PackedSpec) -> Rounding:
        return Rounding(spec.bits, grid_of(recipe, spec), recipe.solver.clip_search)

    linears = {full: rounding(spec) for full, spec in plan.linears.items() if full.startswith(context.full(""))}
    parts = plan.experts.get(context.full(moe.experts), {}) if moe else {}
    experts = {projection: rounding(spec) for projection, spec in parts.items()}
    found = LayerAWQ(
        state.stream, context.sites, plan.transforms.scales[context.sites.index], context.sink.weights, linears, experts, context.chunk,
        recipe.solver.affinity_power, context.device,
    ).run()  # fmt: skip
    context.edit(found.edits)
    return replace(state, report=replace(state.report, scales=found.report))


@dataclass(frozen=True)
class Rounding:
    """How a stack of matrices will be rounded: a width each, the grid, and whether clipping ratios are searched for."""

    bits: tuple[int, ...]
    grid: Grid
    clip_search: bool = True


@dataclass(frozen=True)
class ScaledLayer:
    """What is done to a layer: edits of its weights, and per site the exponents that were chosen."""

    edits: Edits
    report: dict[str, Any]


@dataclass(frozen=True)
class _Inputs:
    """What arrives in the layer, sampled.

    Attributes:
        modules: full name -> [S, N] some of its inputs. routed: what the experts were asked, None without experts.
        shared: full name of a gated shared expert's linear -> affinity [S] of the sampled tokens.
    """

    modules: Mapping[str, Tensor]
    routed: RoutedTokens | None
    shared: Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerAWQ:
    """Finds one layer's scales.

    Attributes:
        stream: in front of the layer, which is loaded. weights: of the layer as it is. chunk: experts to read at a time.
        linears: how quantized linears will be rounded, by full name. experts: how the experts' projections will be, none if kept.
        power: of the affinity. device: where the losses are computed.
    """

    stream: Stream
    sites: LayerSites
    scales: LayerScales
    weights: Weights
    linears: Mapping[str, Rounding]
    experts: Mapping[str, Rounding]
    chunk: int
    power: float
    device: str = "cpu"

    @torch.no_grad()
    def run(self) -> ScaledLayer:
        """Scales behind norms, behind linears, and in front of every expert's down."""
        norms = [site for site in self.scales.norms if self._rounded(site)]
        pairs = [pair for pair in self.scales.pairs if pair.second in self.linears]
        inputs = self._look(norms, pairs)
        report: dict[str, Any] = {}
        edits = [self._behind_linear(pair, inputs, report) for pair in pairs]
        mixed = next((site for site in norms if site.experts is not None), None)
        edits += [self._behind_norm(site, inputs, report) for site in norms if site is not mixed]
        if inputs.routed is not None and self.sites.moe is not None and self.experts:
            edits += self._of_experts(self.sites.moe, mixed, inputs, inputs.routed, report)
        return ScaledLayer(joined(*edits), report)

    def _rounded(self, site: NormSite) -> bool:
        return any(name in self.linears for name in site.readers) or (site.experts is not None and bool(self.experts))

    def _look(self, norms: list[NormSite], pairs: list[PairSite]) -> _Inputs:
        """Run the layer as it is, once."""
        prefix = self.sites.name + "."
        names = {*(site.readers[0] for site in norms if site.readers), *(pair.second for pair in pairs)}
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        with self.stream.watching([name.removeprefix(prefix) for name in names], _sampler(self._sample, kept, prefix)):
            if self.sites.moe is not None:
                routed = self.stream.capture_routing(self.sites.index)
            else:
                routed = None
                self.stream.run(self.sites.index, outputs=self.stream.store.allocate(tuple(self.stream.hidden.shape), self.stream.dtype))
        return _Inputs({name: torch.cat(parts) for name, parts in kept.items()}, routed, self._shared(routed))

    @property
    def _sample(self) -> Tensor:
        """int64 [S] the tokens that are looked at."""
        return evenly_spaced(self.stream.windows.numel(), TOKENS)

    def _shared(self, routed: RoutedTokens | None) -> dict[str, Tensor]:
        """Shared experts behind a gate of one output count with its sigmoid, as routed experts do with their affinity."""
        gate = shared_gate(self.sites, self.stream.layer(self.sites.index))
        if routed is None or self.sites.moe is None or gate is None or not self.power:
            return {}
        weight = shared_affinity(gate, routed.x[self._sample], self.power)
        return {f"{self.sites.name}.{name}": weight for name in self.sites.moe.shared}

    def _whole(self, x_SN: Tensor, affinity_S: Tensor | None = None) -> Tensor:
        """[1, S] weights with which sampled tokens stand for all, in the loss of a linear."""
        every = torch.full((1, len(x_SN)), self.stream.windows.numel() / max(1, len(x_SN)))
        return every if affinity_S is None else every * affinity_S

    def _linear_losses(self, name: str, s_R1N: Tensor, x_SN: Tensor, inputs: _Inputs) -> Tensor:
        """[R] of one linear."""
        w, rounding = self.weights.parameter(f"{name}.weight").unsqueeze(0).to(self.device), self.linears[name]
        return self._losses(w, s_R1N, x_SN.unsqueeze(0), self._whole(x_SN, inputs.shared.get(name)), rounding, (0, 1))[:, 0]

    def _losses(self, w: Tensor, s: Tensor, x: Tensor, weight: Tensor, rounding: Rounding, span: tuple[int, int]) -> Tensor:
        """[R, C] of the matrices whose numbers are in a span."""
        device, bits = self.device, torch.tensor(rounding.bits[slice(*span)])
        return losses(w.to(device), s.to(device), x.to(device), weight.to(device), bits.to(device), rounding.grid, rounding.clip_search)

    def _behind_linear(self, pair: PairSite, inputs: _Inputs, report: dict[str, Any]) -> Edits:
        """Rows of the first that reach several channels of the second have one scale for all of them."""
        x_SN = inputs.modules[pair.second]
        channel = magnitudes(x_SN.unsqueeze(0), self._whole(x_SN, inputs.shared.get(pair.second)))[0]
        rows = torch.zeros(pair.rows).scatter_reduce_(0, pair.channels, channel, "amax")
        s_RO = torch.ones(len(RATIOS), pair.rows)
        s_RO[:, pair.reached] = candidates(rows[pair.reached].unsqueeze(0))[:, 0]
        loss_R = self._linear_losses(pair.second, s_RO[:, None, pair.channels], x_SN, inputs)
        report[pair.second] = RATIOS[int(loss_R.argmin())]
        return scale_pair(pair, s_RO[int(loss_R.argmin())].double())

    def _behind_norm(self, site: NormSite, inputs: _Inputs, report: dict[str, Any]) -> Edits:
        x_SN = inputs.modules[site.readers[0]]
        s_R1N = candidates(magnitudes(x_SN.unsqueeze(0), self._whole(x_SN)))
        total = sum(self._linear_losses(name, s_R1N, x_SN, inputs) for name in site.readers if name in self.linears)
        assert isinstance(total, Tensor)
        return self._chosen(site, s_R1N, total, report)

    def _chosen(self, site: NormSite, s_R1N: Tensor, loss_R: Tensor, report: dict[str, Any]) -> Edits:
        index, gain = int(loss_R.argmin()), self.weights.parameter(f"{site.norm}.weight")
        report[site.norm] = RATIOS[index]
        layouts = {site.experts: self.sites.moe.layout} if site.experts is not None and self.sites.moe is not None else {}
        return scale_behind_norm(site, representable(gain, s_R1N[index, 0], site.offset), layouts)

    def _of_experts(
        self, moe: MoESite, site: NormSite | None, inputs: _Inputs, routed: RoutedTokens, report: dict[str, Any]
    ) -> list[Edits]:
        """One scale for all that read the experts' norm, and one for every expert's down; every expert is read once."""
        name, slots = f"{self.sites.name}.{moe.experts}", dispatch(routed.ids, routed.weights, moe.layout.experts)
        x = routed.x[self._sample].float()
        s_R1N = candidates(magnitudes(x.unsqueeze(0), self._whole(x)))
        total, downs, edits = torch.zeros(len(RATIOS), dtype=torch.float64), list[tuple[Tensor, Tensor]](), list[Edits]()
        for span in self._spans(moe.layout):
            shared, down = self._of_chunk(moe, routed, slots, s_R1N if site is not None else None, span)
            for loss_R in shared:
                total += loss_R
            downs += down
            self.stream.store.release()
        if site is not None:
            total += sum(self._linear_losses(reader, s_R1N, x, inputs) for reader in site.readers if reader in self.linears)
            edits.append(self._chosen(site, s_R1N, total, report))
        if downs:
            edits.append(scale_down(name, moe.layout, torch.cat([s for s, _ in downs]).double()))
            report[f"{name}.down_proj"] = [RATIOS[index] for _, chosen in downs for index in chosen.tolist()]
        return edits

    def _of_chunk(
        self, moe: MoESite, routed: RoutedTokens, slots: Slots, s_R1N: Tensor | None, span: tuple[int, int]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """What some experts say.

        Returns:
            The losses [R] of the shared scales, one for each projection that reads the norm; and, where down can be scaled, its best
            scales [C, I] and their ratios' numbers [C].
        """
        layout, name, count = moe.layout, f"{self.sites.name}.{moe.experts}", span[1] - span[0]
        module, piece = self.stream.checkpoint.model.get_submodule(name), slots.chunk(*span)
        tokens_CS, weight_CS = sampled_slots(piece.tokens, piece.affinity, piece.bounds, self.power)
        weights = read_experts(self.weights, name, layout, *span)
        own = routed.x[tokens_CS.flatten()].float()
        x_CSN = own.view(count, -1, layout.hidden)
        shared, size = [], tokens_CS.shape[1]
        for projection in layout.projections[:-1] if s_R1N is not None else ():
            assert s_R1N is not None
            rows = weights.first[:, layout.rows(projection)]
            shared.append(self._losses(rows, s_R1N, x_CSN, weight_CS, self.experts[projection], span).sum(1))
        if not self.scales.experts:
            return shared, []
        h = intermediate(module, own, weights, [size * c for c in range(count + 1)]).view(count, size, -1)
        s_RCI = candidates(magnitudes(h, weight_CS))
        loss_RC = self._losses(weights.down, s_RCI, h, weight_CS, self.experts["down_proj"], span)
        return shared, [(best(s_RCI, loss_RC), loss_RC.argmin(0))]

    def _spans(self, layout: ExpertsLayout) -> Iterator[tuple[int, int]]:
        """[start, stop) of the experts that are judged together."""
        widest = 4 * layout.hidden * layout.intermediate * (2 if layout.gated else 1)
        step = max(1, min(self.chunk, MATRIX_BYTES // widest))
        for start in range(0, layout.experts, step):
            yield start, min(start + step, layout.experts)


def _sampler(wanted: Tensor, kept: Mapping[str, list[Tensor]], prefix: str) -> Callable[[str, Tensor], None]:
    """Keeps the wanted rows of every module's input, counted over all its calls."""
    seen = dict.fromkeys(kept, 0)

    def note(name: str, rows: Tensor) -> None:
        begin = seen[prefix + name]
        here = wanted[(wanted >= begin) & (wanted < begin + len(rows))] - begin
        kept[prefix + name].append(rows[here].float())
        seen[prefix + name] += len(rows)

    return note
