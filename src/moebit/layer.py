"""One decoder layer on its way through the pipeline: attention, routing, experts chunk by chunk, and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moebit.calibration.statistics import down_layer_hessians, expert_hessians, layer_sample
from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Sink
from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, dispatch, finish, intermediate
from moebit.model.files import ShardFile
from moebit.model.stream import Stream, allocate, read_experts
from moebit.model.structure import LayerSites, LinearGroup
from moebit.planning import Plan
from moebit.recipe import Recipe
from moebit.tensor import QTensor, QuantScheme, SolveInfo, second_moment, solve_gptq, solve_rtn

Progress = Callable[[str, int, int], None]


@dataclass
class LayerReport:
    """What happened in one layer, as numbers.

    Attributes:
        linears: per quantized linear: bits, weight_error (|dW|^2 / |W|^2), loss (tr dW H dW^T), damping, fallback.
        tokens_per_expert: routed slots in the calibration text.
        experts: per projection, lists over experts: bits, weight_error, damping, fallback.
    """

    layer: int
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens_per_expert: list[int] = field(default_factory=list)
    experts: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def fallbacks(self) -> int:
        linears = sum(bool(row["fallback"]) for row in self.linears.values())
        return linears + sum(sum(map(bool, rows["fallback"])) for rows in self.experts.values())

    @property
    def unseen_experts(self) -> int:
        return sum(count == 0 for count in self.tokens_per_expert)


def solve(
    recipe: Recipe, w_EOI: Tensor, h_EII: Tensor | None, bits_E: Tensor, scale_dtype: torch.dtype, device: str
) -> tuple[QTensor, SolveInfo | None]:
    """Round a stack of matrices as the recipe says: to nearest without a Hessian, else with GPTQ."""
    solver, grid = recipe.solver, recipe.weights
    scheme = QuantScheme(grid.group_size, grid.symmetric, grid.signed, scale_dtype, grid.type == "fp8")
    if h_EII is None:
        return solve_rtn(w_EOI.to(device), bits_E, scheme, clip_search=solver.clip_search), None
    return solve_gptq(
        w_EOI.to(device),
        h_EII.to(device),
        bits_E,
        scheme,
        scales=solver.scales,
        act_order=solver.act_order,
        damping=solver.damping,
        clip_search=solver.clip_search,
    )


@dataclass
class LayerJob:
    """Quantizes one decoder layer.

    Attributes:
        stream: the calibration windows before this layer; None rounds to nearest without data.
        layer: the loaded layer, where there is a stream.
        device: where matrices are solved.
        progress: called with ("experts", done, total) after every chunk.
    """

    plan: Plan
    sink: Sink
    sites: LayerSites
    shard: ShardFile
    report: LayerReport
    stream: Stream | None
    layer: nn.Module | None
    device: str
    progress: Progress

    def run(self) -> None:
        """Attention and whatever else runs before the experts, then shared experts, routed experts, and what runs behind them."""
        before, beside, behind = self._in_order()
        inputs: dict[int, Tensor] = {}
        for number in before:
            self._quantize_group(number, inputs)
        if self.sites.moe is None:
            self._finish_layer(None)
            return
        routed = self.stream.capture_routing(self.sites.index) if self.stream else None
        for number in beside:
            self._quantize_group(number, inputs, routed)
        outputs = self._experts(routed)
        for number in behind:
            self._quantize_group(number, inputs, outputs=outputs)
        self._finish_layer(outputs)

    def _in_order(self) -> tuple[list[int], list[int], list[int]]:
        """Groups by when they can be solved: before the experts, from the experts' own input, behind the experts."""
        groups, before, beside, behind = self.sites.groups, [], [], []
        for number, group in enumerate(groups):
            if group.behind_experts:
                behind.append(number)
            elif self.sites.moe and (group.moe_input or (group.replay and (group.replay_of is None or group.replay_of in beside))):
                beside.append(number)
            else:
                before.append(number)
        return before, beside, behind

    def _group_hessian(
        self, number: int, inputs: dict[int, Tensor], routed: RoutedTokens | None = None, outputs: Tensor | None = None
    ) -> Tensor | None:
        """Second moment [N, N] of a group's input: from a stored input where there is one, else by running the layer up to it.

        Args:
            inputs: stored inputs of groups that others are replayed from, by number; added to.
            outputs: of the routed experts, for what runs behind them.
        """
        group = self.sites.groups[number]
        if self.stream is None or not self._quantized(group):
            return None
        if routed is not None and group.moe_input:
            return second_moment(routed.x)
        if group.replay is not None:
            origin = self.sites.groups[group.replay_of] if group.replay_of is not None else None
            if routed is not None and (origin is None or origin.moe_input):
                return self._replayed_hessian(group, routed.x)
            if group.replay_of in inputs:
                return self._replayed_hessian(group, inputs[group.replay_of])
        total = torch.zeros(group.in_features, group.in_features)
        keep = any(other.replay_of == number for other in self.sites.groups)
        rows: list[Tensor] = []

        def on_input(x: Tensor) -> None:
            flat = x.reshape(-1, x.shape[-1]).float()
            total.add_(second_moment(flat))
            if keep:
                rows.append(flat)

        experts = self.stream.replay(outputs) if outputs is not None else lambda rows: _no_experts(self.sites)
        self.stream.run(self.sites.index, inputs={group.names[0]: on_input}, experts=experts)
        if keep:
            inputs[number] = torch.cat(rows)
        return total

    def _replayed_hessian(self, group: LinearGroup, x_TN: Tensor) -> Tensor:
        """The same for a group behind an already quantized one, by running only the module around it (a shared expert, a dense MLP)."""
        assert self.layer is not None
        assert group.replay is not None
        module, total = self.layer.get_submodule(group.replay), torch.zeros(group.in_features, group.in_features)

        def on_call(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(second_moment(args[0].reshape(-1, args[0].shape[-1])))

        hook = self.layer.get_submodule(group.names[0]).register_forward_pre_hook(on_call)
        try:
            with torch.no_grad():
                for piece in x_TN.split(4096):
                    module(piece.unsqueeze(0))
        finally:
            hook.remove()
        return total

    def _solve(self, w: Tensor, h: Tensor | None, bits: Tensor, scale_dtype: torch.dtype) -> tuple[QTensor, SolveInfo | None]:
        return solve(self.plan.recipe, w, h, bits, scale_dtype, self.device)

    def _quantized(self, group: LinearGroup) -> list[str]:
        return [name for name in group.names if f"{self.sites.name}.{name}" in self.plan.linears]

    def _quantize_group(
        self, number: int, inputs: dict[int, Tensor], routed: RoutedTokens | None = None, outputs: Tensor | None = None
    ) -> None:
        """Solve linears that share an input, those of one width as one matrix: their rows stacked, one factorisation."""
        group, hessian = self.sites.groups[number], self._group_hessian(number, inputs, routed, outputs)
        by_width: dict[tuple[int, ...], list[str]] = {}
        for name in self._quantized(group):
            by_width.setdefault(self.plan.linears[f"{self.sites.name}.{name}"].bits, []).append(name)
        for bits, names in by_width.items():
            matrices = [self.sink.weights.parameter(f"{self.sites.name}.{name}.weight").float() for name in names]
            scale_dtype = self.plan.linears[f"{self.sites.name}.{names[0]}"].scale_dtype
            h = None if hessian is None else hessian.unsqueeze(0)
            q, info = self._solve(torch.cat(matrices).unsqueeze(0), h, torch.tensor(bits), scale_dtype)
            begin = 0
            for name, matrix in zip(names, matrices, strict=True):
                self._put_linear(name, matrix, _rows(q, slice(begin, begin + len(matrix))), info)
                begin += len(matrix)

    def _put_linear(self, name: str, matrix: Tensor, q: QTensor, info: SolveInfo | None) -> None:
        """Write one quantized linear, report it, and put it in place for what runs after it."""
        self.sink.put_linear(self.shard, f"{self.sites.name}.{name}", q)
        value = self.sink.used(q)[0]
        self.report.linears[name] = {
            "bits": int(q.bits[0]),
            "weight_error": float((value - matrix).square().sum() / matrix.square().sum().clamp(min=1e-30)),
            "damping": float(info.damping[0]) if info else None,
            "fallback": bool(info.fallback[0]) if info else False,
        }
        if self.layer is not None:
            self.layer.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def _experts(self, routed: RoutedTokens | None) -> Tensor | None:
        """Solve and write the routed experts chunk by chunk; returns their outputs [T, H] for every token."""
        moe = self.sites.moe
        assert moe is not None
        name = f"{self.sites.name}.{moe.experts}"
        layout, step = moe.layout, self.plan.chunk[self.sites.index]
        module = self.sink.weights.model.get_submodule(name)
        if routed is None:
            for start in range(0, layout.experts, step):
                self._solve_chunk(name, layout, module, start, min(start + step, layout.experts), None)
            return None
        assert self.stream is not None
        counts = routed.counts(layout.experts)
        self.report.tokens_per_expert = counts.tolist()
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        sample = routed.x[layer_sample(len(routed.x))]
        h_layer = second_moment(routed.x) / len(routed.x)
        outputs = allocate(tuple(routed.x.shape), torch.float32, self.stream.directory).zero_()
        for start in range(0, layout.experts, step):
            stop = min(start + step, layout.experts)
            tokens, affinity, bounds = slots.chunk(start, stop)
            inputs = _ChunkInputs(routed.x[tokens], affinity, bounds, sample, h_layer)
            y = self._solve_chunk(name, layout, module, start, stop, inputs)
            outputs.index_add_(0, tokens, y)
            self.progress("experts", stop, layout.experts)
        return outputs

    def _solve_chunk(
        self, name: str, layout: ExpertsLayout, module: nn.Module, start: int, stop: int, inputs: _ChunkInputs | None
    ) -> Tensor:
        """Experts [start, stop): gate and up from their shared Hessian, then down from what the quantized gate and up deliver.

        Returns [S, H] outputs of the routed slots (empty without inputs).
        """
        parts = self.plan.experts.get(name)
        weights = read_experts(self.sink.weights, name, layout, start, stop)
        power = self.plan.recipe.solver.affinity_power
        quantized: dict[str, QTensor] = {}
        if parts:
            hessian = expert_hessians(inputs.x, inputs.affinity, inputs.bounds, power, inputs.h_layer) if inputs else None
            first = self._solve_first(layout, weights.first, hessian, parts, start, stop, quantized)
            weights = ExpertWeights(first, weights.down, weights.first_bias, weights.down_bias)
        h = intermediate(module, inputs.x, weights, inputs.bounds) if inputs else None
        if parts:
            hessian = None
            if inputs and h is not None:
                hessian = expert_hessians(h, inputs.affinity, inputs.bounds, power, down_layer_hessians(module, inputs.sample, weights))
            q, info = self._solve(weights.down, hessian, torch.tensor(parts["down_proj"].bits[start:stop]), parts["down_proj"].scale_dtype)
            down = self._note("down_proj", q, info, weights.down)
            quantized["down_proj"] = q
            weights = ExpertWeights(weights.first, down, weights.first_bias, weights.down_bias)
            self.sink.put_experts(self.shard, name, layout, start, quantized)
        if h is None or inputs is None:
            return torch.empty(0, layout.hidden)
        return finish(module, h, inputs.affinity, weights, inputs.bounds)

    def _solve_first(
        self,
        layout: ExpertsLayout,
        w: Tensor,
        hessian: Tensor | None,
        parts: Mapping[str, PackedSpec],
        start: int,
        stop: int,
        quantized: dict[str, QTensor],
    ) -> Tensor:
        """Gate and up (or the lone up): one solve where their widths agree, since they share their inputs.

        Returns dequantized [C, 2I, H].
        """
        projections = [p for p in layout.projections if p != "down_proj"]
        widths = {p: torch.tensor(parts[p].bits[start:stop]) for p in projections}
        result = torch.empty_like(w)
        same = all(torch.equal(widths[p], widths[projections[0]]) for p in projections)
        if same:
            together, info = self._solve(w, hessian, widths[projections[0]], parts[projections[0]].scale_dtype)
        for p in projections:
            rows = layout.rows(p)
            q = _rows(together, rows) if same else None
            if q is None:
                q, info = self._solve(w[:, rows], hessian, widths[p], parts[p].scale_dtype)
            quantized[p] = q
            result[:, rows] = self._note(p, q, info, w[:, rows])
        return result

    def _note(self, projection: str, q: QTensor, info: SolveInfo | None, w: Tensor) -> Tensor:
        """Report a chunk of one projection; returns its weights as they will be used."""
        value = self.sink.used(q)
        rows = self.report.experts.setdefault(projection, {"bits": [], "weight_error": [], "damping": [], "fallback": []})
        rows["bits"] += q.bits.tolist()
        rows["weight_error"] += ((value - w).square().sum((1, 2)) / w.square().sum((1, 2)).clamp(min=1e-30)).tolist()
        rows["damping"] += info.damping.tolist() if info else [None] * len(q.bits)
        rows["fallback"] += info.fallback.tolist() if info else [False] * len(q.bits)
        return value

    def _finish_layer(self, outputs: Tensor | None) -> None:
        """Write what is not quantized and advance the stream through the layer as it now is."""
        self.sink.put_plain(self.shard, self.sink.parameters(self.sites.name + "."))
        if self.stream is not None:
            experts = self.stream.replay(outputs) if outputs is not None else None
            self.stream.run(self.sites.index, experts=experts, advance=True)


@dataclass(frozen=True)
class _ChunkInputs:
    """What the experts of one chunk are calibrated on: routed slots sorted by expert, a sample of the layer's tokens and their moment."""

    x: Tensor
    affinity: Tensor
    bounds: list[int]
    sample: Tensor
    h_layer: Tensor


def _no_experts(sites: LayerSites) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    def handler(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise BadInputError(
            f"{sites.name}: a linear that runs behind the experts cannot be calibrated before them; keep it with weights.ignore"
        )

    return handler


def _rows(q: QTensor, rows: slice) -> QTensor:
    return QTensor(q.codes[:, rows].contiguous(), q.scale[:, rows].contiguous(), q.zero_point[:, rows].contiguous(), q.bits, q.scheme)
