"""One decoder layer on its way through the pipeline: attention, routing, experts chunk by chunk, and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moebit.calibration.statistics import ExpertMoments, down_layer_hessians, layer_sample, output_sensitivity
from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Sink
from moebit.methods.awq_layer import LayerAWQ, Rounding
from moebit.model.edits import EditedWeights
from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, Slots, dispatch, finish, intermediate
from moebit.model.files import ShardFile
from moebit.model.stream import Stream, experts_names, read_experts
from moebit.model.structure import LayerSites, LinearGroup
from moebit.planning import Plan
from moebit.recipe import Recipe
from moebit.tensor import QTensor, QuantScheme, SolveInfo, add_second_moment, mirror_, solve_gptq, solve_rtn
from moebit.tensor.linalg import filled_diagonal

Progress = Callable[[str, int, int], None]
ROWS = 4096  # tokens that are looked at together where nothing else sets a limit
ERROR_WEIGHTS = 2**20  # weights whose errors are summed together


@dataclass
class LayerReport:
    """What happened in one layer, as numbers.

    Attributes:
        linears: per quantized linear: bits, weight_error (|dW|^2 / |W|^2), damping, fallback.
        tokens_per_expert: routed slots in the calibration text.
        experts: per projection, lists over experts: bits, weight_error, damping, fallback.
        scales: AWQ's exponent behind every norm and linear, and for every expert's down.
    """

    layer: int
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens_per_expert: list[int] = field(default_factory=list)
    experts: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    scales: dict[str, Any] = field(default_factory=dict)

    @property
    def fallbacks(self) -> int:
        linears = sum(bool(row["fallback"]) for row in self.linears.values())
        return linears + sum(sum(map(bool, rows["fallback"])) for rows in self.experts.values())

    @property
    def unseen_experts(self) -> int:
        return sum(count == 0 for count in self.tokens_per_expert)


def scheme_of(recipe: Recipe, scale_dtype: torch.dtype) -> QuantScheme:
    """The recipe's grid, with scales of one type."""
    grid = recipe.weights
    return QuantScheme(grid.group_size, grid.symmetric, grid.signed, scale_dtype, grid.type == "fp8")


def solve(
    recipe: Recipe, w_EOI: Tensor, h_EII: Tensor | None, bits_E: Tensor, scale_dtype: torch.dtype, device: str
) -> tuple[QTensor, SolveInfo | None]:
    """Round a stack of matrices as the recipe says: to nearest without a Hessian (awq: with it, for the clipping), else with GPTQ."""
    solver = recipe.solver
    scheme = scheme_of(recipe, scale_dtype)
    if solver.method == "awq" and h_EII is not None:
        importance = filled_diagonal(h_EII.to(device))
        return solve_rtn(w_EOI.to(device), bits_E, scheme, importance_EI=importance, clip_search=solver.clip_search), None
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
        if self.plan.recipe.solver.method == "awq" and self.stream is not None:
            self._scale(self.stream)
        before, beside, behind = self._in_order()
        inputs: dict[int, Tensor] = {}
        for number in before:
            self._quantize_group(number, inputs)
        if self.sites.moe is None:
            self._finish_layer(None, None)
            return
        # What the layer puts out without its experts is worth keeping only if nothing in it changes any more.
        final = self.stream is not None and not any(self._quantized(self.sites.groups[number]) for number in (*beside, *behind))
        without = self.stream.store.allocate(tuple(self.stream.hidden.shape), self.stream.dtype) if self.stream and final else None
        routed = self.stream.capture_routing(self.sites.index, without) if self.stream else None
        for number in beside:
            self._quantize_group(number, inputs, routed)
        outputs = self._experts(routed)
        for number in behind:
            self._quantize_group(number, inputs, outputs=outputs)
        self._finish_layer(outputs, without)

    def _scale(self, stream: Stream) -> None:
        """Scale channels up where that spares the large ones some rounding (methods/awq.py), in the loaded layer and what is written."""
        weights, name, plan = self.sink.weights, self.sites.name, self.plan
        assert isinstance(weights, EditedWeights)
        assert self.layer is not None

        def rounding(spec: PackedSpec) -> Rounding:
            return Rounding(spec.bits, scheme_of(plan.recipe, spec.scale_dtype))

        linears = {full: rounding(spec) for full, spec in plan.linears.items() if full.startswith(f"{name}.")}
        parts = plan.experts.get(f"{name}.{self.sites.moe.experts}", {}) if self.sites.moe else {}
        experts = {projection: rounding(spec) for projection, spec in parts.items()}
        scales, chunk = plan.transforms.scales[self.sites.index], plan.chunk.get(self.sites.index, 1)
        power = plan.recipe.solver.affinity_power
        found = LayerAWQ(stream, self.sites, scales, weights, linears, experts, chunk, power, self.device).run()
        weights.add(found.edits)
        weights.refresh(self.layer, name, found.edits)
        self.report.scales = found.report

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
            return self._moment(routed.x, self._affinity(group))
        if group.replay is not None:
            origin = self.sites.groups[group.replay_of] if group.replay_of is not None else None
            if routed is not None and (origin is None or origin.moe_input):
                return self._replayed_hessian(group, routed.x, self._affinity(group))
            if group.replay_of in inputs:
                return self._replayed_hessian(group, inputs[group.replay_of])
        total = torch.zeros(group.in_features, group.in_features)
        stream, seen = self.stream, 0
        keep = any(other.replay_of == number for other in self.sites.groups)
        kept = stream.store.allocate((stream.windows.numel(), group.in_features), stream.dtype) if keep else None

        def on_input(x: Tensor) -> None:
            nonlocal seen
            flat = x.reshape(-1, x.shape[-1])
            add_second_moment(total, flat)
            if kept is not None:
                kept[seen : seen + len(flat)] = flat
                seen += len(flat)

        before = _no_experts(self.sites) if group.behind_experts else _zeros  # what experts put out doesn't reach this group
        experts = stream.replay(outputs) if outputs is not None else lambda rows: before
        stream.run(self.sites.index, inputs={group.names[0]: on_input}, experts=experts)
        if kept is not None:
            inputs[number] = kept
        return mirror_(total)

    def _affinity(self, group: LinearGroup) -> Callable[[Tensor], Tensor] | None:
        """How much inputs [T, H] of the experts' block count for shared experts behind a gate: sigmoid(gate x)^p; None for no such gate.

        MoEQuant's affinity (2505.03804, §3.3), which routed experts get from the router.
        """
        moe, power = self.sites.moe, self.plan.recipe.solver.affinity_power
        gate = shared_gate(self.sites, self.layer) if self.layer is not None else None
        if not power or gate is None or moe is None or not set(group.names) <= set(moe.shared):
            return None
        return lambda x: gate(x).float().sigmoid().flatten().pow(power)

    def _moment(self, x_TN: Tensor, affinity: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[N, N] second moment of stored inputs, which may lie in a file."""
        assert self.stream is not None
        total = torch.zeros(x_TN.shape[1], x_TN.shape[1])
        for piece in x_TN.split(ROWS):
            add_second_moment(total, piece, affinity(piece) if affinity else None)
            self.stream.store.release()
        return mirror_(total)

    def _replayed_hessian(self, group: LinearGroup, x_TN: Tensor, affinity: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The same for a group behind an already quantized one, by running only the module around it (a shared expert, a dense MLP)."""
        assert self.stream is not None
        assert self.layer is not None
        assert group.replay is not None
        module, total = self.layer.get_submodule(group.replay), torch.zeros(group.in_features, group.in_features)
        weights: Tensor | None = None

        def on_call(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            add_second_moment(total, args[0].reshape(-1, args[0].shape[-1]), weights)

        hook = self.layer.get_submodule(group.names[0]).register_forward_pre_hook(on_call)
        try:
            with torch.no_grad():
                for piece in x_TN.split(self.stream.batch_tokens):
                    weights = affinity(piece) if affinity else None
                    module(piece.unsqueeze(0))
                    self.stream.store.release()
        finally:
            hook.remove()
        return mirror_(total)

    @property
    def _dtype(self) -> torch.dtype:
        """What the layer is computed in; without a stream nothing is."""
        return self.stream.dtype if self.stream is not None else torch.float32

    def _solve(self, w: Tensor, h: Tensor | None, bits: Tensor, scale_dtype: torch.dtype) -> tuple[QTensor, SolveInfo | None]:
        return solve(self.plan.recipe, w, h, bits, scale_dtype, self.device)

    def _quantized(self, group: LinearGroup) -> list[str]:
        return [name for name in group.names if f"{self.sites.name}.{name}" in self.plan.linears]

    def _quantize_group(
        self, number: int, inputs: dict[int, Tensor], routed: RoutedTokens | None = None, outputs: Tensor | None = None
    ) -> None:
        """Solve linears that share an input, those of one width as one matrix: their rows stacked, one factorisation."""
        group, hessian = self.sites.groups[number], self._group_hessian(number, inputs, routed, outputs)
        by_grid: dict[tuple[tuple[int, ...], torch.dtype], list[str]] = {}
        for name in self._quantized(group):
            spec = self.plan.linears[f"{self.sites.name}.{name}"]
            by_grid.setdefault((spec.bits, spec.scale_dtype), []).append(name)
        for (bits, scale_dtype), names in by_grid.items():
            matrices = [self.sink.weights.parameter(f"{self.sites.name}.{name}.weight") for name in names]
            h = None if hessian is None else hessian.unsqueeze(0)
            together = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
            q, info = self._solve(together.unsqueeze(0), h, torch.tensor(bits), scale_dtype)
            begin = 0
            for name, matrix in zip(names, matrices, strict=True):
                self._put_linear(name, matrix, _rows(q, slice(begin, begin + len(matrix))), info)
                begin += len(matrix)

    def _put_linear(self, name: str, matrix: Tensor, q: QTensor, info: SolveInfo | None) -> None:
        """Write one quantized linear, report it, and put it in place for what runs after it."""
        self.sink.put_linear(self.shard, f"{self.sites.name}.{name}", q)
        value = self.sink.used(q, self._dtype)[0]
        self.report.linears[name] = {
            "bits": int(q.bits[0]),
            "weight_error": relative_error(value.unsqueeze(0), matrix.unsqueeze(0))[0],
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
        wanted = experts_names(name, layout)
        inputs = self._chunk_inputs(routed, layout) if routed is not None else None
        for start in range(0, layout.experts, step):
            stop = min(start + step, layout.experts)
            self.sink.weights.expect(wanted, stop, min(stop + step, layout.experts))
            self._solve_chunk(name, layout, module, start, stop, inputs)
            self.progress("experts", stop, layout.experts)
        return inputs.outputs if inputs else None

    def _chunk_inputs(self, routed: RoutedTokens, layout: ExpertsLayout) -> _ExpertInputs:
        assert self.stream is not None
        self.report.tokens_per_expert = routed.counts(layout.experts).tolist()
        sample = routed.x[layer_sample(len(routed.x))]
        h_layer = self._moment(routed.x).div_(len(routed.x))
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        return _ExpertInputs(self.stream, routed.x, slots, sample, h_layer, self.stream.new_outputs(routed))

    def _solve_chunk(
        self, name: str, layout: ExpertsLayout, module: nn.Module, start: int, stop: int, inputs: _ExpertInputs | None
    ) -> None:
        """Experts [start, stop): gate and up from their shared Hessian, then down from what the quantized gate and up deliver.

        Their outputs are added to those of the layer.
        """
        parts = self.plan.experts.get(name)
        weights = read_experts(self.sink.weights, name, layout, start, stop, self._stored_dtype(name, layout))
        quantized: dict[str, QTensor] = {}
        power, aware = self.plan.recipe.solver.affinity_power, self.plan.recipe.solver.output_aware
        if parts:
            sensitive = (module, layout, weights.to(self._dtype)) if aware else None
            hessian = inputs.hessians(start, stop, power, sensitive) if inputs else None
            first = self._solve_first(layout, weights.first, hessian, parts, start, stop, quantized)
            weights = ExpertWeights(first, weights.down, weights.first_bias, weights.down_bias)
            del hessian, sensitive
        stored_down, weights = weights.down, weights.to(self._dtype)
        if inputs is None or parts is None:
            h = inputs.through_first(module, weights, start, stop, None) if inputs else None
            hessian = None
        else:
            moments = ExpertMoments.zeros(stop - start, layout.intermediate, 2.0 if aware else power)
            h = inputs.through_first(module, weights, start, stop, moments)
            hessian = moments.shrunk(down_layer_hessians(module, inputs.sample, weights, inputs.stream.slots))
        if parts:
            spec = parts["down_proj"]
            q, info = self._solve(stored_down, hessian, torch.tensor(spec.bits[start:stop]), spec.scale_dtype)
            down = self._note("down_proj", q, info, stored_down)
            quantized["down_proj"] = q
            weights = ExpertWeights(weights.first, down, weights.first_bias, weights.down_bias)
            self.sink.put_experts(self.shard, name, layout, start, quantized)
        if inputs and h is not None:
            inputs.through_down(module, weights, start, stop, h)

    def _stored_dtype(self, name: str, layout: ExpertsLayout) -> torch.dtype:
        """Experts are solved from the values that are stored, not from what they are rounded to for computing."""
        return self.sink.weights.specs[f"{name}.{layout.first}"].dtype

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
        result = torch.empty(w.shape, dtype=self._dtype)
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
        value = self.sink.used(q, self._dtype)
        rows = self.report.experts.setdefault(projection, {"bits": [], "weight_error": [], "damping": [], "fallback": []})
        rows["bits"] += q.bits.tolist()
        rows["weight_error"] += relative_error(value, w)
        rows["damping"] += info.damping.tolist() if info else [None] * len(q.bits)
        rows["fallback"] += info.fallback.tolist() if info else [False] * len(q.bits)
        return value

    def _finish_layer(self, outputs: Tensor | None, without: Tensor | None) -> None:
        """Write what is not quantized and advance the stream through the layer as it now is."""
        self.sink.put_plain(self.shard, self.sink.parameters(self.sites.name + "."))
        if self.stream is None:
            return
        if outputs is None:
            self.stream.run(self.sites.index, advance=True)
        else:
            self.stream.advance_by(self.sites.index, outputs, without)


@dataclass(frozen=True)
class _ExpertInputs:
    """What a layer's experts are calibrated on, a limited number of routed slots at a time.

    Attributes:
        x: [T, H] inputs of the block; slots: all routed slots. sample: some of the layer's tokens; h_layer: the moment of all, [H, H].
        outputs: [T, H] float32, added to.
    """

    stream: Stream
    x: Tensor
    slots: Slots
    sample: Tensor
    h_layer: Tensor
    outputs: Tensor

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
            x, weight = self.x[piece.tokens], piece.affinity
            if sensitive:
                module, layout, weights = sensitive
                weight = output_sensitivity(module, layout, x, weight, weights, piece.bounds)
            moments.add(x, weight, piece.bounds)
        return moments.shrunk(self.h_layer)

    def through_first(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int, moments: ExpertMoments | None) -> Tensor:
        """[S, I] inputs of down, for all slots of these experts; their moments are added to `moments`."""
        count = self.slots.bounds[stop] - self.slots.bounds[start]
        h = self.stream.store.allocate((count, weights.down.shape[2]), self.stream.dtype)
        for piece in self._pieces(start, stop):
            h[piece.place] = inner = intermediate(module, self.x[piece.tokens], weights, piece.bounds)
            if moments is not None:
                moments.add(inner, piece.affinity, piece.bounds)
        return h

    def through_down(self, module: nn.Module, weights: ExpertWeights, start: int, stop: int, h: Tensor) -> None:
        """Add the experts' outputs."""
        for piece in self._pieces(start, stop):
            y = finish(module, h[piece.place], piece.affinity, weights, piece.bounds)
            self.outputs.index_add_(0, piece.tokens, y.float())


def shared_gate(sites: LayerSites, layer: nn.Module) -> nn.Module | None:
    """The linear [1, H] beside a layer's experts that scales its shared experts, behind a sigmoid; None where there is none."""
    if sites.moe is None or not sites.moe.shared:
        return None
    block = sites.moe.experts.rpartition(".")[0] + "."
    gates = [layer.get_submodule(name) for name, why in sites.kept.items() if why == "gate" and name.startswith(block)]
    scalar = [gate for gate in gates if isinstance(gate, nn.Linear) and gate.out_features == 1]
    return scalar[0] if len(scalar) == 1 else None


def relative_error(value_EOI: Tensor, w_EOI: Tensor) -> list[float]:
    """|value - w|^2 / |w|^2 per matrix, a few rows at a time."""
    missed, whole = torch.zeros(len(w_EOI), dtype=torch.float64), torch.zeros(len(w_EOI), dtype=torch.float64)
    step = max(1, ERROR_WEIGHTS // (w_EOI.shape[0] * w_EOI.shape[2]))
    for start in range(0, w_EOI.shape[1], step):
        w = w_EOI[:, start : start + step].float()
        missed += torch.linalg.vector_norm(value_EOI[:, start : start + step] - w, dim=(1, 2)).double().square()
        whole += torch.linalg.vector_norm(w, dim=(1, 2)).double().square()
    return (missed / whole.clamp(min=1e-30)).tolist()


def _no_experts(sites: LayerSites) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    def handler(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise BadInputError(
            f"{sites.name}: a linear that runs behind the experts cannot be calibrated before them; keep it with weights.ignore"
        )

    return handler


def _zeros(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _rows(q: QTensor, rows: slice) -> QTensor:
    return QTensor(q.codes[:, rows].contiguous(), q.scale[:, rows].contiguous(), q.zero_point[:, rows].contiguous(), q.bits, q.scheme)
