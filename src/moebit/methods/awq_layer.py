"""AWQ's scales of one layer: its inputs are sampled once, before anything is rounded, and the best scales become edits of its weights.

Where scales may stand is what `model/sites.py` proved when the plan was made. A site is judged by what is rounded behind it: behind a norm
all its quantized readers together, the routed experts among them with their affinities, shared experts behind a gate with sigmoid(gate x);
behind a linear the one that takes its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moebit.methods.awq import RATIOS, best, candidates, losses, magnitudes, representable, sampled_slots
from moebit.model.experts import ExpertsLayout, RoutedTokens, dispatch, intermediate
from moebit.model.proof.flow import NormSite
from moebit.model.proof.sites import LayerScales, PairSite, scale_behind_norm, scale_down, scale_pair
from moebit.model.structure import LayerSites
from moebit.storage.checkpoint import Weights
from moebit.storage.edits import Edit, joined
from moebit.streaming.stream import Stream, read_experts
from moebit.tensor import Grid

TOKENS = 512  # that everything outside of the routed experts is judged on
MATRIX_BYTES = 64 * 2**20  # of experts that are judged together


@dataclass(frozen=True)
class Rounding:
    """How a stack of matrices will be rounded: a width each, and the grid."""

    bits: tuple[int, ...]
    grid: Grid


@dataclass(frozen=True)
class ScaledLayer:
    """What is done to a layer: edits of its weights, and per site the exponents that were chosen."""

    edits: dict[str, tuple[Edit, ...]]
    report: dict[str, Any]


@dataclass(frozen=True)
class LayerAWQ:
    """Finds one layer's scales.

    Attributes:
        stream: in front of the layer, which is loaded. weights: of the layer as it is. chunk: experts to read at a time.
        linears: how quantized linears will be rounded, by full name. experts: the same for the experts' projections, none if kept.
        power: of the affinity. device: where the losses are computed.
        shared: full name of a gated shared expert's linear -> affinity [S] of the sampled tokens; found by `run`.
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
    shared: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def run(self) -> ScaledLayer:
        """Scales behind norms, behind linears, and in front of every expert's down."""
        norms = [site for site in self.scales.norms if self._rounded(site)]
        pairs = [pair for pair in self.scales.pairs if pair.second in self.linears]
        sampled, routed = self._look(norms, pairs)
        self._weigh_shared(routed)
        report: dict[str, Any] = {}
        edits = [self._behind_linear(pair, sampled[pair.second], report) for pair in pairs]
        mixed = next((site for site in norms if site.experts is not None), None)
        edits += [self._behind_norm(site, sampled[site.readers[0]], report) for site in norms if site is not mixed]
        if routed is not None and self.experts:
            edits += self._of_experts(mixed, routed, report)
        return ScaledLayer(joined(*edits), report)

    def _rounded(self, site: NormSite) -> bool:
        return any(name in self.linears for name in site.readers) or (site.experts is not None and bool(self.experts))

    def _look(self, norms: list[NormSite], pairs: list[PairSite]) -> tuple[dict[str, Tensor], RoutedTokens | None]:
        """Run the layer as it is, once: some of the inputs [S, N] of modules by full name, and what the experts were asked."""
        layer, prefix = self.stream.layer(self.sites.index), self.sites.name + "."
        names = {*(site.readers[0] for site in norms if site.readers), *(pair.second for pair in pairs)}
        wanted = self._sample()
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        seen = dict.fromkeys(names, 0)

        def watch(name: str) -> Any:
            def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                rows = x.reshape(-1, x.shape[-1])
                here = wanted[(wanted >= seen[name]) & (wanted < seen[name] + len(rows))] - seen[name]
                kept[name].append(rows[here].float())
                seen[name] += len(rows)

            return layer.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(on_call, with_kwargs=True)

        with ExitStack() as stack:
            for name in names:
                stack.callback(watch(name).remove)
            if self.sites.moe is not None:
                routed = self.stream.capture_routing(self.sites.index)
            else:
                routed = None
                self.stream.run(self.sites.index, outputs=self.stream.store.allocate(tuple(self.stream.hidden.shape), self.stream.dtype))
        return {name: torch.cat(parts) for name, parts in kept.items()}, routed

    def _sample(self) -> Tensor:
        """int64 [S] the tokens that are looked at, evenly spaced."""
        total = self.stream.windows.numel()
        count = min(TOKENS, total)
        return (torch.arange(count) * total) // count

    def _weigh_shared(self, routed: RoutedTokens | None) -> None:
        """Shared experts behind a gate of one output count with its sigmoid, as routed experts do with their affinity."""
        layer, prefix = self.stream.layer(self.sites.index), f"{self.sites.name}."
        gates = [
            name for name, why in self.sites.kept.items() if why == "gate" and getattr(layer.get_submodule(name), "out_features", 0) == 1
        ]
        if routed is None or self.sites.moe is None or len(gates) != 1 or not self.power:
            return
        x = routed.x[self._sample()]
        weight = layer.get_submodule(gates[0])(x).float().sigmoid().flatten().pow(self.power)
        self.shared.update({f"{prefix}{name}": weight for name in self.sites.moe.shared})

    def _whole(self, x_SN: Tensor, name: str = "") -> Tensor:
        """[1, S] weights with which sampled tokens stand for all, in the loss of a linear."""
        every = torch.full((1, len(x_SN)), self.stream.windows.numel() / max(1, len(x_SN)))
        return every * self.shared[name] if name in self.shared else every

    def _linear_losses(self, name: str, s_R1N: Tensor, x_SN: Tensor) -> Tensor:
        """[R] of one linear."""
        w, rounding = self.weights.parameter(f"{name}.weight").unsqueeze(0).to(self.device), self.linears[name]
        return self._losses(w, s_R1N, x_SN.unsqueeze(0), self._whole(x_SN, name), rounding, 0, 1)[:, 0]

    def _losses(self, w: Tensor, s: Tensor, x: Tensor, weight: Tensor, rounding: Rounding, start: int, stop: int) -> Tensor:
        device, bits = self.device, torch.tensor(rounding.bits[start:stop])
        return losses(w.to(device), s.to(device), x.to(device), weight.to(device), bits.to(device), rounding.grid).cpu()

    def _behind_linear(self, pair: PairSite, x_SN: Tensor, report: dict[str, Any]) -> dict[str, tuple[Edit, ...]]:
        """Rows of the first that reach several channels of the second have one scale for all of them."""
        channel = magnitudes(x_SN.unsqueeze(0), self._whole(x_SN, pair.second))[0]
        rows = torch.zeros(pair.rows).scatter_reduce_(0, pair.channels, channel, "amax")
        s_RO = torch.ones(len(RATIOS), pair.rows)
        s_RO[:, pair.reached] = candidates(rows[pair.reached].unsqueeze(0))[:, 0]
        loss_R = self._linear_losses(pair.second, s_RO[:, None, pair.channels], x_SN)
        report[pair.second] = RATIOS[int(loss_R.argmin())]
        return scale_pair(pair, s_RO[int(loss_R.argmin())].double())

    def _behind_norm(self, site: NormSite, x_SN: Tensor, report: dict[str, Any]) -> dict[str, tuple[Edit, ...]]:
        s_R1N = candidates(magnitudes(x_SN.unsqueeze(0), self._whole(x_SN)))
        total = sum(self._linear_losses(name, s_R1N, x_SN) for name in site.readers if name in self.linears)
        assert isinstance(total, Tensor)
        return self._chosen(site, s_R1N, total, report)

    def _chosen(self, site: NormSite, s_R1N: Tensor, loss_R: Tensor, report: dict[str, Any]) -> dict[str, tuple[Edit, ...]]:
        index, gain = int(loss_R.argmin()), self.weights.parameter(f"{site.norm}.weight")
        report[site.norm] = RATIOS[index]
        layouts = {site.experts: self._layout} if site.experts is not None else {}
        return scale_behind_norm(site, representable(gain, s_R1N[index, 0], site.offset), layouts)

    @property
    def _layout(self) -> ExpertsLayout:
        assert self.sites.moe is not None
        return self.sites.moe.layout

    def _of_experts(self, site: NormSite | None, routed: RoutedTokens, report: dict[str, Any]) -> list[dict[str, tuple[Edit, ...]]]:
        """One scale for all that read the experts' norm, and one for every expert's down; every expert is read once."""
        assert self.sites.moe is not None
        layout, name = self._layout, f"{self.sites.name}.{self.sites.moe.experts}"
        module = self.stream.checkpoint.model.get_submodule(name)
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        x = routed.x[self._sample()].float()
        s_R1N = candidates(magnitudes(x.unsqueeze(0), self._whole(x)))
        total, s_down, ratios = torch.zeros(len(RATIOS), dtype=torch.float64), [], []
        for start, stop in self._steps(layout):
            piece = slots.chunk(start, stop)
            tokens_CS, weight_CS = sampled_slots(piece.tokens, piece.affinity, piece.bounds, self.power)
            weights = read_experts(self.weights, name, layout, start, stop)
            own = routed.x[tokens_CS.flatten()].float()
            x_CSN = own.view(stop - start, -1, layout.hidden)
            for projection in layout.projections[:-1] if site is not None else ():
                rows = weights.first[:, layout.rows(projection)]
                total += self._losses(rows, s_R1N, x_CSN, weight_CS, self.experts[projection], start, stop).sum(1)
            if self.scales.experts:
                places = [tokens_CS.shape[1] * c for c in range(stop - start + 1)]
                h = intermediate(module, own, weights, places).view(stop - start, tokens_CS.shape[1], -1)
                s_RCI = candidates(magnitudes(h, weight_CS))
                loss_RC = self._losses(weights.down, s_RCI, h, weight_CS, self.experts["down_proj"], start, stop)
                s_down.append(best(s_RCI, loss_RC))
                ratios += [RATIOS[index] for index in loss_RC.argmin(0).tolist()]
            self.stream.store.release()
        edits = []
        if site is not None:
            total += sum(self._linear_losses(reader, s_R1N, x) for reader in site.readers if reader in self.linears)
            edits.append(self._chosen(site, s_R1N, total, report))
        if s_down:
            edits.append(scale_down(name, layout, torch.cat(s_down).double()))
            report[f"{name}.down_proj"] = ratios
        return edits

    def _steps(self, layout: ExpertsLayout) -> Iterator[tuple[int, int]]:
        widest = 4 * layout.hidden * layout.intermediate * (2 if layout.gated else 1)
        step = max(1, min(self.chunk, MATRIX_BYTES // widest))
        for start in range(0, layout.experts, step):
            yield start, min(start + step, layout.experts)
