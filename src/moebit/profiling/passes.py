"""One streaming pass of a data set over a model: what its tokens say about every expert, and what rounding would cost them.

The model is the one that is given: full precision where widths are measured, an output of moebit where its experts' use is looked at.
Only one layer's part outside of the experts and a chunk of experts are in memory at a time.

The error of a linear outside of the experts has no closed form (a query passes through a softmax). It is measured: the layer is run
with this linear rounded and the rest as it is, routing and experts' outputs unchanged, over the first tokens; the squared change of what
the layer puts out is the error, in the same unit as the experts'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebit.methods.significance import ExpertEvidence, coactivation, output_error
from moebit.model.capture import Call, observed
from moebit.model.experts import (
    ExpertWeights,
    RoutedTokens,
    dispatch,
    experts_names,
    finish,
    gating_slopes,
    grouped_linear,
    intermediate,
    read_experts,
)
from moebit.model.structure import LayerSites, Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import Budget
from moebit.streaming.store import ActivationStore
from moebit.streaming.stream import Stream
from moebit.tensor import UniformGrid, solve_gptq, solve_rtn

Progress = Callable[[str, int, int], None]
LINEAR_TOKENS = 1024  # that linears outside of the experts are measured on: a run of the layer each, and width


@dataclass(frozen=True)
class Measure:
    """How errors are measured.

    Attributes:
        widths: candidates, rising. scheme: the grid, but for the type of the scales.
        solver: `rtn` rounds to nearest with the clipping search alone, so that the rounding is the same whatever the data; `gptq` rounds
            with GPTQ on this data set.
        linears: full names of linears outside of the experts to be measured. dtypes: of the scales, by module.
    """

    widths: tuple[int, ...]
    scheme: UniformGrid
    solver: str
    clip_search: bool
    linears: frozenset[str]
    dtypes: Mapping[str, torch.dtype]

    def rounding(self, name: str, w_COI: Tensor, moment_CII: Tensor | None, bits: int) -> Tensor:
        """[C, out, in] what rounding to `bits` changes."""
        scheme = replace(self.scheme, scale_dtype=self.dtypes[name])
        if self.solver == "gptq" and moment_CII is not None:
            q, _ = solve_gptq(w_COI, moment_CII, bits, scheme, clip_search=self.clip_search)
        else:
            q = solve_rtn(w_COI, bits, scheme, clip_search=self.clip_search)
        return q.dequantize() - w_COI.float()


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
    batch = budget.batch_tokens if measure is None else min(budget.batch_tokens, LINEAR_TOKENS)
    stream = Stream(checkpoint, structure, windows, store, batch, budget.slots)
    found: dict[str, Tensor] = {}
    for sites in structure.layers:
        progress("layers", sites.index, len(structure.layers))
        with stream.loaded(sites.index) as layer:
            found |= _LayerPass(stream, sites, layer, budget.chunk.get(sites.index, 1), measure).run()
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

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        outputs = None
        if self.sites.moe is not None:
            routed = self.stream.capture_routing(self.sites.index)
            outputs = self.stream.new_outputs(routed)
            found |= self._experts(routed, outputs)
        if self.measure is not None:
            found |= self._linears(outputs)
        found[f"{self.sites.name}.output"] = self._advance(outputs)
        return found

    def _experts(self, routed: RoutedTokens, outputs: Tensor) -> dict[str, Tensor]:
        """Statistics of the routed experts, chunk by chunk; their outputs are added to `outputs`."""
        moe = self.sites.moe
        assert moe is not None
        name, layout = self.sites.experts, moe.layout
        module, weights_of = self.layer.get_submodule(moe.experts), self.stream.checkpoint.weights
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        step = max(1, self.chunk // 2) if self.measure else self.chunk  # rounded copies take the place of solver's work space, and more
        significance: list[Tensor] = []
        errors: dict[str, list[Tensor]] = {p: [] for p in layout.projections} if self.measure else {}
        for start in range(0, layout.experts, step):
            stop = min(start + step, layout.experts)
            weights_of.expect(experts_names(name, layout), stop, min(stop + step, layout.experts))
            weights = read_experts(weights_of, name, layout, start, stop, self.stream.dtype)
            evidence = ExpertEvidence.zeros(layout, weights, self.measure is not None)
            for piece in slots.pieces(start, stop, self.stream.slots):
                x = routed.x[piece.tokens]
                h, slope = _through_first(module, x, weights, piece.bounds, self.measure is not None)
                evidence.add(x, h, slope, piece)
                y = finish(module, h, piece.affinity, weights, piece.bounds)
                outputs.index_add_(0, piece.tokens, y.float())
                self.stream.store.release()
            significance.append(evidence.significance)
            for projection, parts in errors.items():
                w = weights.down if projection == "down_proj" else weights.first[:, layout.rows(projection)]
                parts.append(self._errors(f"{name}.{projection}", w, evidence, projection))
        affinity = torch.zeros(layout.experts).index_add_(0, routed.ids.flatten(), routed.weights.float().abs().flatten())
        return {
            f"{name}.tokens": routed.counts(layout.experts),
            f"{name}.affinity": affinity,
            f"{name}.significance": torch.cat(significance),
            f"{name}.coactivation": coactivation(routed.ids, layout.experts),
            **{f"{name}.{projection}.error": torch.cat(parts, 1).float() for projection, parts in errors.items()},
        }

    def _errors(self, name: str, w_COI: Tensor, evidence: ExpertEvidence, projection: str) -> Tensor:
        """[W, C] error of every candidate width."""
        assert self.measure is not None
        moment, rows = evidence.moment(projection), evidence.rows.get(projection)
        owner = name.rpartition(".")[0]
        return torch.stack([output_error(self.measure.rounding(owner, w_COI, moment, bits), moment, rows) for bits in self.measure.widths])

    def _linears(self, outputs: Tensor | None) -> dict[str, Tensor]:
        """LINEAR.error [W] of those that are to be measured."""
        assert self.measure is not None
        names = [n for group in self.sites.groups for n in group.names if f"{self.sites.name}.{n}" in self.measure.linears]
        if not names:
            return {}
        stream = self.stream
        # The same windows however many of them run through a layer together: --memory must not choose the sample.
        count = min(len(stream.windows), -(-LINEAR_TOKENS // stream.windows.shape[1]))
        covering = [rows for rows in stream.batches() if rows.start < count]
        plain, changed = (torch.empty(stream.hidden[: covering[-1].stop].shape, dtype=stream.dtype) for _ in range(2))
        experts = stream.replay(outputs) if outputs is not None else None
        stream.run(self.sites.index, experts=experts, outputs=plain, stop=len(covering))
        found = {}
        for name in names:
            linear: Any = self.layer.get_submodule(name)
            weight, errors = linear.weight, []
            for bits in self.measure.widths:
                missed = self.measure.rounding(f"{self.sites.name}.{name}", weight.unsqueeze(0), None, bits)[0]
                linear.weight = nn.Parameter((weight.float() + missed).to(weight.dtype), requires_grad=False)
                stream.run(self.sites.index, experts=experts, outputs=changed, stop=len(covering))
                errors.append(len(stream.windows) / count * _distance(changed[:count], plain[:count]))
            linear.weight = weight
            found[f"{self.sites.name}.{name}.error"] = torch.tensor(errors, dtype=torch.float32)
        return found

    def _advance(self, outputs: Tensor | None) -> Tensor:
        """Move the windows through the layer; returns the squared length of what it adds, by which its errors are divided.

        That is the output of the block that holds the experts, shared ones included; of the layer less its input where it has none.
        """
        stream, index, total = self.stream, self.sites.index, torch.zeros(1, dtype=torch.float64)
        if self.sites.moe is None or outputs is None:
            after = stream.store.allocate(tuple(stream.hidden.shape), stream.dtype)
            stream.run(index, outputs=after)
            for rows in stream.batches():
                total += _distance(after[rows], stream.hidden[rows])
            stream.run(index, advance=True)
            return total
        block = self.sites.moe.experts.rpartition(".")[0]

        def on_block(call: Call) -> None:
            y = call.output[0] if isinstance(call.output, Sequence) else call.output
            total.add_(y.double().square().sum())

        with observed({block: self.layer.get_submodule(block)} if block else {}, on_block, outputs=True):
            stream.run(index, experts=stream.replay(outputs), advance=True)
        if not block:
            total += sum(float(piece.double().square().sum()) for piece in outputs.split(4096))
        return total


def _through_first(module: Any, x_SH: Tensor, weights: ExpertWeights, bounds: list[int], slopes: bool) -> tuple[Tensor, Tensor | None]:
    """(what enters down [S, I], its slope in every output of the first projections, where it is wanted)."""
    if not slopes:
        return intermediate(module, x_SH, weights, bounds), None
    return gating_slopes(module, grouped_linear(x_SH, weights.first, weights.first_bias, bounds))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())
