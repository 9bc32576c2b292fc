"""One decoder layer on its way through the pipeline: attention, routing, experts chunk by chunk, and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebit.calibration.statistics import ExpertMoments, layer_sample
from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.formats.sink import Sink
from moebit.methods.alignment import AdjustedRouter, adjust_router, search_rounded
from moebit.methods.awq_layer import LayerAWQ, Rounding
from moebit.methods.balance import Drawn, draw
from moebit.methods.drift import DriftMoments, correct_drift
from moebit.methods.online import check_orthogonal, duquant_transform, hadamard_transform, site_generator
from moebit.methods.smooth_layer import LayerSmoothing
from moebit.methods.smoothing import outlier_factors
from moebit.methods.soft_coverage import NO_SCORE, NOT_ONCE, SoftCoverage, soft_coverage
from moebit.model.experts import ExpertsLayout, ExpertWeights, RoutedTokens, dispatch, intermediate
from moebit.model.inputs import DOWN, FIRST
from moebit.model.structure import LayerSites, LinearGroup
from moebit.plan.plan import Plan
from moebit.quantize.layer_inputs import SAMPLED_SLOTS, ExpertInputs, PoolInputs, Statistics
from moebit.recipe import Recipe
from moebit.storage.edits import EditedWeights
from moebit.storage.files import ShardFile
from moebit.streaming.routing import Replace, Routing, not_linear, router_bias, router_inputs
from moebit.streaming.shortcut import KeptInput
from moebit.streaming.stream import Stream, experts_names, read_experts
from moebit.tensor import Float8Grid, Grid, QTensor, SolveInfo, UniformGrid, add_second_moment, mirror_, refit_scales, solve_gptq, solve_rtn
from moebit.tensor.blocks import BlockTransform
from moebit.tensor.linalg import filled_diagonal

Progress = Callable[[str, int, int], None]
ROWS = 4096  # tokens that are looked at together where nothing else sets a limit
NOT_COMPARED = "its input is not delivered once for every token"
ERROR_WEIGHTS = 2**20  # weights whose errors are summed together
SAMPLED_EXPERTS = 16  # that the shared transform of down projections is made from


@dataclass
class LayerReport:
    """What happened in one layer, as numbers.

    Attributes:
        linears: per quantized linear: bits, weight_error (|dW|^2 / |W|^2), damping, fallback.
        tokens_per_expert: routed slots in the calibration text.
        experts: per projection, lists over experts: bits, weight_error, damping, fallback.
        smoothing: which channels were scaled (methods/smooth_layer.py).
        router: what was done to the router (methods/alignment.py). balance: which experts drew further tokens (methods/balance.py).
        coverage: over how many tokens soft coverage was taken, or why it was not (methods/soft_coverage.py).
        drift: by linear, and for experts by projection's input, how weights were corrected (methods/drift.py).
        scales: AWQ's exponent behind every norm and linear, and for every expert's down.
        peak_memory_bytes: the most that the process has had resident until the layer's end.
    """

    layer: int
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens_per_expert: list[int] = field(default_factory=list)
    experts: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    smoothing: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def fallbacks(self) -> int:
        linears = sum(bool(row["fallback"]) for row in self.linears.values())
        return linears + sum(sum(map(bool, rows["fallback"])) for rows in self.experts.values())

    @property
    def unseen_experts(self) -> int:
        return sum(count == 0 for count in self.tokens_per_expert)


def grid_of(recipe: Recipe, scale_dtype: torch.dtype) -> Grid:
    """The recipe's grid, with scales of one type."""
    chosen = recipe.weights
    if chosen.type == "fp8":
        return Float8Grid(chosen.group_size, scale_dtype)
    return UniformGrid(chosen.group_size, chosen.symmetric, chosen.signed, scale_dtype)


def solve(
    recipe: Recipe, w_EOI: Tensor, h_EII: Tensor | None, bits_E: Tensor, scale_dtype: torch.dtype, device: str
) -> tuple[QTensor, SolveInfo | None]:
    """Round a stack of matrices as the recipe says: to nearest without a Hessian (awq: with it, for the clipping), else with GPTQ."""
    solver = recipe.solver
    grid = grid_of(recipe, scale_dtype)
    if solver.method == "awq" and h_EII is not None:
        importance = filled_diagonal(h_EII.to(device))
        return solve_rtn(w_EOI.to(device), bits_E, grid, importance_EI=importance, clip_search=solver.clip_search), None
    if h_EII is None:
        return solve_rtn(w_EOI.to(device), bits_E, grid, clip_search=solver.clip_search), None
    w, h = w_EOI.to(device), h_EII.to(device)
    q, info = solve_gptq(
        w,
        h,
        bits_E,
        grid,
        scales=solver.scales,
        act_order=solver.act_order,
        damping=solver.damping,
        clip_search=solver.clip_search,
    )
    if not solver.refit:
        return q, info
    q, fallen = refit_scales(q, w, h, ~info.fallback)
    return q, replace(info, loss=info.loss - fallen)


@dataclass
class LayerJob:
    """Quantizes one decoder layer.

    Attributes:
        stream: the calibration windows before this layer; None rounds to nearest without data.
        layer: the loaded layer, where there is a stream.
        device: where matrices are solved.
        progress: called with ("experts", done, total) after every chunk.
        reference: what the router of the full-precision model says to the calibration tokens, where the recipe compares with it.
        pool: further windows before this layer, for experts that get too few tokens.
        outliers: channels between up and down that were scaled, by expert.
        soft: how near tokens came to experts, where the recipe asks for soft coverage.
        exact: what full precision delivers to the modules of `drifting`, where the recipe corrects for drift.
        seed: of the online transforms; those that are made, by name.
        kept: what entered the last linear before the experts, until it has been run through the rest of the layer.
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
    seed: int = 0
    transforms: dict[str, BlockTransform] = field(default_factory=dict)
    reference: Routing | None = None
    pool: Stream | None = None
    outliers: dict[int, int] = field(default_factory=dict)
    soft: SoftCoverage | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    kept: KeptInput | None = None

    def run(self) -> None:
        """Attention and whatever else runs before the experts, then shared experts, routed experts, and what runs behind them."""
        self._smooth()
        if self.plan.recipe.solver.method == "awq" and self.stream is not None:
            self._scale(self.stream)
        before, beside, behind = self._in_order()
        inputs: dict[int, Tensor] = {}
        for number in before:
            self._quantize_group(number, inputs)
        if self.sites.moe is None:
            self._finish_layer(None, None)
            if self.pool:
                self.pool.run(self.sites.index, advance=True)
            return
        adjusted = self._adjust_router()
        # What the layer puts out without its experts is worth keeping only if nothing in it changes any more.
        final = self.stream is not None and not any(self._quantized(self.sites.groups[number]) for number in (*beside, *behind))
        routed, without = self._capture_routed(final) if self.stream else (None, None)
        self.kept = None
        pooled, pool_without = _capture(self.pool, self.sites.index, final) if self.pool else (None, None)
        if adjusted and routed:
            self.report.router = adjusted.described(routed.ids)
        for number in beside:
            self._quantize_group(number, inputs, routed)
        outputs, pool_outputs = self._experts(routed, pooled)
        for number in behind:
            self._quantize_group(number, inputs, outputs=outputs)
        self._finish_layer(outputs, without)
        if self.pool and pool_outputs is not None:
            self.pool.advance_by(self.sites.index, pool_outputs, pool_without)

    def _capture_routed(self, final: bool) -> tuple[RoutedTokens, Tensor | None]:
        """What the layer's experts are asked, as `_capture`; with soft coverage, what the router says of all experts is kept, too."""
        assert self.stream is not None
        assert self.layer is not None
        assert self.sites.moe is not None
        if self.plan.recipe.calibration.coverage != "soft":
            return _capture(self.stream, self.sites.index, final, self.kept)
        if reason := not_linear(self.layer, self.sites):
            self.report.coverage = {"skipped": reason}
            return _capture(self.stream, self.sites.index, final, self.kept)
        with router_inputs(self.stream, self.sites) as kept:
            routed, without = _capture(self.stream, self.sites.index, final)
        assert self.sites.moe.router is not None
        router = self.layer.get_submodule(self.sites.moe.router)
        bias = router_bias(router, self.sites.moe.layout.experts)
        self.soft = soft_coverage(kept[0], router.get_parameter("weight"), bias, routed) if kept else None
        said = {"soft": len(self.soft.positions)} if self.soft else {"skipped": NO_SCORE if kept else NOT_ONCE}
        self.report.coverage = said
        return routed, without

    def _smooth(self) -> None:
        """Scale channels, where the recipe says so, before anything is rounded."""
        recipe, plan = self.plan.recipe.smoothing, self.plan
        if recipe.kind == "none" or self.stream is None or self.layer is None:
            return
        weights, balance = self.sink.weights, plan.recipe.calibration.balance
        assert isinstance(weights, EditedWeights)
        smoothed = LayerSmoothing(
            self.stream, self.sites, plan.transforms.scales[self.sites.index], recipe, weights, frozenset((*plan.linears, *plan.experts)),
            plan.chunk.get(self.sites.index, 1), self.pool, 0.0 if balance == "none" else float(balance),
        ).run()  # fmt: skip
        weights.add(smoothed.edits)
        weights.refresh(self.layer, self.sites.name, smoothed.edits)
        self.report.smoothing = smoothed.describe()

    def _without_outliers(
        self, name: str, module: nn.Module, weights: ExpertWeights, inputs: ExpertInputs, start: int, stop: int
    ) -> ExpertWeights:
        """Outlier channels between up and down moved into down, where the recipe says so and h is linear in up."""
        scales = self.plan.transforms.scales
        wanted = self.plan.recipe.smoothing.kind == "expert_aware" and name in self.plan.experts
        if not wanted or not scales[self.sites.index].experts or inputs.layout.bias:  # a bias is stored as it is
            return weights
        factors = outlier_factors(*inputs.extremes(module, weights.to(self._dtype), start, stop)).float()
        self.outliers |= dict(zip(range(start, stop), (factors > 1).sum(1).tolist(), strict=True))
        first = weights.first.float().clone()
        first[:, inputs.layout.rows("up_proj")] /= factors.unsqueeze(2)
        return ExpertWeights(first, weights.down.float() * factors.unsqueeze(1))

    def _adjust_router(self) -> AdjustedRouter | None:
        """Correct and round the router, where the recipe says so: from here on it runs, and is written, as it will be."""
        moe, recipe = self.sites.moe, self.plan.recipe.router
        if not recipe.active or moe is None:
            return None
        reason, name = self.plan.routers[self.sites.index], f"{self.sites.name}.{moe.router}.weight"
        if moe.router is None or name in self.sink.weights.stored_together() or (reason and recipe.bits == 16):
            self.report.router = {"skipped": dict.fromkeys(recipe.wanted, reason)}
            return None
        weight = self.sink.weights.parameter(name)
        if self.stream is None:
            self._replace(name, search_rounded(weight, recipe.bits, weight.dtype))
            self.report.router = {"bits": recipe.bits}
            return None
        adjusted = adjust_router(self.stream, self.sites, recipe, weight, self.reference, reason)
        if adjusted.weight is not None:
            self._replace(name, adjusted.weight)
        return adjusted

    def _replace(self, name: str, value: Tensor) -> None:
        """Another value for a parameter, in the layer and in what is written."""
        weights = self.sink.weights
        assert isinstance(weights, EditedWeights)
        weights.add({name: (Replace(value),)})
        if self.layer is not None:
            weights.refresh(self.layer, self.sites.name, [name])

    def _scale(self, stream: Stream) -> None:
        """Scale channels up where that spares the large ones some rounding (methods/awq.py), in the loaded layer and what is written."""
        weights, name, plan = self.sink.weights, self.sites.name, self.plan
        assert isinstance(weights, EditedWeights)
        assert self.layer is not None

        def rounding(spec: PackedSpec) -> Rounding:
            return Rounding(spec.bits, grid_of(plan.recipe, spec.scale_dtype))

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

    def _group_statistics(
        self, number: int, inputs: dict[int, Tensor], routed: RoutedTokens | None = None, outputs: Tensor | None = None
    ) -> Statistics | None:
        """Of a group's input: from a stored input where there is one, else by running the layer up to it.

        Args:
            inputs: stored inputs of groups that others are replayed from, by number; added to.
            outputs: of the routed experts, for what runs behind them.
        """
        group = self.sites.groups[number]
        recipe = self.plan.recipe
        if self.stream is None or not self._quantized(group) or not (recipe.needs_hessians or recipe.rotation.online == "duquant"):
            return None
        seen_by = self._new_statistics(group)
        if routed is not None and group.moe_input:
            return self._over_stored(seen_by, routed.x, self._affinity(group))
        if group.replay is not None:
            origin = self.sites.groups[group.replay_of] if group.replay_of is not None else None
            if routed is not None and (origin is None or origin.moe_input):
                return self._replayed(seen_by, group, routed.x, self._affinity(group))
            if group.replay_of in inputs:
                return self._replayed(seen_by, group, inputs[group.replay_of])
        stream, seen = self.stream, 0
        replayed, last = any(other.replay_of == number for other in self.sites.groups), self._last_before_experts(number)
        kept = stream.store.allocate((stream.windows.numel(), group.in_features), stream.dtype) if replayed or last else None

        def on_input(x: Tensor) -> None:
            nonlocal seen
            flat = x.reshape(-1, x.shape[-1])
            seen_by.add(flat)
            if kept is not None and seen + len(flat) <= len(kept):
                kept[seen : seen + len(flat)] = flat
            seen += len(flat)

        before = _no_experts(self.sites) if group.behind_experts else _zeros  # what experts put out doesn't reach this group
        experts = stream.replay(outputs) if outputs is not None else lambda rows: before
        stream.run(self.sites.index, inputs={group.names[0]: on_input}, experts=experts)
        if kept is not None and seen == len(kept):
            if replayed:
                inputs[number] = kept
            if last:
                self.kept = KeptInput(group.names[0], kept)
        return seen_by

    def _last_before_experts(self, number: int) -> bool:
        """Whether a group is one linear, the last that runs before the experts, and what enters it can be kept until they are asked.

        It is where it needs no file, and no more memory than the experts' outputs, which come when it has gone.
        """
        assert self.stream is not None
        group, stream, moe = self.sites.groups[number], self.stream, self.sites.moe
        run = [n for n in self._in_order()[0] if self.sites.groups[n].replay is None]
        if moe is None or run[-1:] != [number] or len(group.names) > 1 or "." not in group.names[0]:
            return False
        size = stream.windows.numel() * group.in_features * stream.dtype.itemsize
        return size <= 4 * stream.windows.numel() * moe.layout.hidden and stream.store.in_memory(size)

    def _new_statistics(self, group: LinearGroup) -> Statistics:
        assert self.stream is not None
        positions = layer_sample(self.stream.windows.numel())
        if self.plan.recipe.solver.drift != "none":
            exact = self.exact.get(_input_of(self.sites, group))
            if exact is not None:
                return Statistics(None, positions, drift=self._drift_moments(1, group.in_features), exact=exact)
            self.report.drift |= {name: {"skipped": NOT_COMPARED} for name in self._quantized(group)}
        total = torch.zeros(group.in_features, group.in_features) if self.plan.recipe.needs_hessians else None
        return Statistics(total, positions)

    def _drift_moments(self, matrices: int, size: int) -> DriftMoments:
        assert self.stream is not None
        return DriftMoments.zeros(matrices, size, self.stream.windows.numel(), self.stream.windows.shape[1])

    def _over_stored(self, seen_by: Statistics, x_TN: Tensor, affinity: Callable[[Tensor], Tensor] | None = None) -> Statistics:
        """Of stored inputs, which may lie in a file."""
        assert self.stream is not None
        for piece in x_TN.split(ROWS):
            seen_by.add(piece, affinity(piece) if affinity else None)
            self.stream.store.release()
        return seen_by

    def _affinity(self, group: LinearGroup) -> Callable[[Tensor], Tensor] | None:
        """How much inputs [T, H] of the experts' block count for shared experts behind a gate: sigmoid(gate x)^p; None for no such gate.

        MoEQuant's affinity (2505.03804, §3.3), which routed experts get from the router.
        """
        moe, power = self.sites.moe, self.plan.recipe.solver.affinity_power
        gate = shared_gate(self.sites, self.layer) if self.layer is not None else None
        if not power or gate is None or moe is None or not set(group.names) <= set(moe.shared):
            return None
        return lambda x: gate(x).float().sigmoid().flatten().pow(power)

    def _moment(self, x_TN: Tensor) -> Tensor:
        """[N, N] second moment of stored inputs, which may lie in a file."""
        assert self.stream is not None
        total = torch.zeros(x_TN.shape[1], x_TN.shape[1])
        for piece in x_TN.split(ROWS):
            add_second_moment(total, piece)
            self.stream.store.release()
        return mirror_(total)

    def _replayed(
        self, seen_by: Statistics, group: LinearGroup, x_TN: Tensor, affinity: Callable[[Tensor], Tensor] | None = None
    ) -> Statistics:
        """The same for a group behind an already quantized one, by running only the module around it (a shared expert, a dense MLP)."""
        assert self.stream is not None
        assert self.layer is not None
        assert group.replay is not None
        module = self.layer.get_submodule(group.replay)
        weights: Tensor | None = None

        def on_call(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen_by.add(args[0].reshape(-1, args[0].shape[-1]), weights)

        hook = self.layer.get_submodule(group.names[0]).register_forward_pre_hook(on_call)
        try:
            with torch.no_grad():
                for piece in x_TN.split(self.stream.batch_tokens):
                    weights = affinity(piece) if affinity else None
                    module(piece.unsqueeze(0))
                    self.stream.store.release()
        finally:
            hook.remove()
        return seen_by

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
        group, statistics = self.sites.groups[number], self._group_statistics(number, inputs, routed, outputs)
        hessian = statistics.hessian if statistics else None
        matrices = self._corrected_linears(group, statistics)
        transform = self._transform_of(group, statistics)
        if transform is not None and hessian is not None:
            hessian = transform.moments(hessian)
        by_grid: dict[tuple[tuple[int, ...], torch.dtype], list[str]] = {}
        for name in self._quantized(group):
            spec = self.plan.linears[f"{self.sites.name}.{name}"]
            by_grid.setdefault((spec.bits, spec.scale_dtype), []).append(name)
        for (bits, scale_dtype), names in by_grid.items():
            h = None if hessian is None else hessian.unsqueeze(0)
            together = torch.cat([matrices[name] for name in names]) if len(names) > 1 else matrices[names[0]]
            together = together if transform is None else transform.apply(together.float())
            q, info = self._solve(together.unsqueeze(0), h, torch.tensor(bits), scale_dtype)
            begin = 0
            for name in names:
                matrix = matrices[name]
                self._put_linear(name, matrix, q.rows(slice(begin, begin + len(matrix))), info, transform)
                begin += len(matrix)

    def _corrected_linears(self, group: LinearGroup, statistics: Statistics | None) -> dict[str, Tensor]:
        """The weights of a group as they are to be rounded: corrected for the drift of their input, where the recipe says so."""
        matrices = {name: self.sink.weights.parameter(f"{self.sites.name}.{name}.weight") for name in self._quantized(group)}
        if statistics is None or statistics.drift is None:
            return matrices
        corrected = correct_drift(torch.cat(list(matrices.values())).unsqueeze(0), statistics.drift)
        self.report.drift |= {name: {"mu": corrected.mu[0], "gain": corrected.gain[0]} for name in matrices}
        rows = corrected.weight[0].split([len(matrix) for matrix in matrices.values()])
        return dict(zip(matrices, rows, strict=True))

    def _corrected_experts(self, what: str, w: Tensor, moments: DriftMoments | None) -> Tensor:
        """Stacked weights [C, out, in] of a chunk, corrected for the drift of their inputs."""
        if moments is None:
            return w
        corrected = correct_drift(w, moments)
        rows = self.report.drift.setdefault(what, {"mu": [], "gain": []})
        rows["mu"] += corrected.mu
        rows["gain"] += corrected.gain
        return corrected.weight

    def _transform_of(self, group: LinearGroup, statistics: Statistics | None) -> BlockTransform | None:
        """The online transform of a group's input."""
        reads = {self.plan.activations.reads.get(f"{self.sites.name}.{name}") for name in self._quantized(group)}
        name = next(iter(reads - {None}), None)
        return None if name is None else self._transform(name, statistics.sample if statistics else None)

    def _transform(self, name: str, sample: Tensor | None) -> BlockTransform:
        """An online transform, made from a sample [S, N] of the input where it wants one, and written, when it is first asked for."""
        if name not in self.transforms:
            spec, generator = self.plan.activations.transforms[name], site_generator(self.seed, name)
            if spec.kind == "hadamard":
                made = hadamard_transform(spec.channels, generator, spec.count)
            else:
                assert sample is not None
                made = duquant_transform(sample.unsqueeze(0), generator)
            self._keep_transform(name, made)
            self.transforms[name] = made
        return self.transforms[name]

    def _keep_transform(self, name: str, made: BlockTransform, start: int = 0) -> None:
        check_orthogonal(made, self.plan.activations.transforms[name].channels, name)
        self.sink.put_transform(self.shard, name, made, start)

    def _put_linear(self, name: str, matrix: Tensor, q: QTensor, info: SolveInfo | None, transform: BlockTransform | None) -> None:
        """Write one quantized linear, report it, and put it in place for what runs after it: on inputs as they are."""
        self.sink.put_linear(self.shard, f"{self.sites.name}.{name}", q)
        value = self._on_plain_inputs(self.sink.used(q, self._dtype), transform)[0]
        self.report.linears[name] = {
            "bits": int(q.bits[0]),
            "weight_error": relative_error(value.unsqueeze(0), matrix.unsqueeze(0))[0],
            "damping": float(info.damping[0]) if info else None,
            "fallback": bool(info.fallback[0]) if info else False,
        }
        if self.layer is not None:
            self.layer.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def _experts(self, routed: RoutedTokens | None, pooled: RoutedTokens | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Solve and write the routed experts chunk by chunk; returns their outputs [T, H] for every token, and for those of the pool."""
        moe = self.sites.moe
        assert moe is not None
        name = f"{self.sites.name}.{moe.experts}"
        layout, step = moe.layout, self.plan.chunk[self.sites.index]
        module = self.sink.weights.model.get_submodule(name)
        wanted = experts_names(name, layout)
        inputs = self._chunk_inputs(routed, layout, pooled) if routed is not None else None
        self._experts_transforms(name, layout, module, inputs)
        for start in range(0, layout.experts, step):
            stop = min(start + step, layout.experts)
            self.sink.weights.expect(wanted, stop, min(stop + step, layout.experts))
            self._solve_chunk(name, layout, module, start, stop, inputs)
            self.progress("experts", stop, layout.experts)
        if self.outliers:
            self.report.smoothing["outliers"] = [self.outliers[e] for e in range(layout.experts)]
        return (inputs.outputs if inputs else None), (inputs.pool.outputs if inputs and inputs.pool else None)

    def _experts_transforms(self, name: str, layout: ExpertsLayout, module: nn.Module, inputs: ExpertInputs | None) -> None:
        """The online transforms that all experts share, before the first of them is solved.

        That of the down projections is made from what the gate and up projections of some experts, not quantized yet, deliver.
        """
        specs = self.plan.activations.transforms
        if f"{name}.{FIRST}" in specs:
            self._transform(f"{name}.{FIRST}", inputs.sample if inputs else None)
        spec = specs.get(f"{name}.{DOWN}")
        if spec is None or (spec.count > 1 and spec.kind == "duquant"):  # the latter: chunk by chunk, from each expert's own tokens
            return
        sample = None
        if spec.kind == "duquant":
            assert inputs is not None
            some = layer_sample(layout.experts, SAMPLED_EXPERTS).tolist()
            sample = torch.cat([self._down_sample(name, layout, module, inputs, e) for e in some])
        self._transform(f"{name}.{DOWN}", sample)

    def _down_sample(self, name: str, layout: ExpertsLayout, module: nn.Module, inputs: ExpertInputs, expert: int) -> Tensor:
        """[S, I] some inputs of an expert's down projection as the checkpoint has it; of the layer's tokens if it has none of its own."""
        weights = read_experts(self.sink.weights, name, layout, expert, expert + 1, self._dtype)
        weights = self._without_outliers(name, module, weights, inputs, expert, expert + 1).to(self._dtype)
        own = inputs.slots.chunk(expert, expert + 1).tokens
        x = inputs.x[own[layer_sample(len(own), SAMPLED_SLOTS)]] if len(own) else inputs.sample[:SAMPLED_SLOTS]
        return intermediate(module, x, weights, [0, len(x)])

    def _expert_transforms(
        self, name: str, module: nn.Module, weights: ExpertWeights, start: int, inputs: ExpertInputs | None, h: Tensor | None
    ) -> BlockTransform | None:
        """Of the down projections of some experts: the shared one, or their own."""
        spec = self.plan.activations.transforms.get(name)
        if spec is None:
            return None
        stop = start + len(weights.down)
        if name in self.transforms:
            return self.transforms[name].of(start, stop)
        assert inputs is not None
        assert h is not None
        made = duquant_transform(inputs.down_samples(module, weights, start, stop, h), site_generator(self.seed, f"{name}.{start}"))
        self._keep_transform(name, made, start)
        return made

    def _chunk_inputs(self, routed: RoutedTokens, layout: ExpertsLayout, pooled: RoutedTokens | None = None) -> ExpertInputs:
        assert self.stream is not None
        self.report.tokens_per_expert = routed.counts(layout.experts).tolist()
        sample = routed.x[layer_sample(len(routed.x))]
        wanted = self.plan.recipe.needs_hessians and self.soft is None
        h_layer = self._moment(routed.x).div_(len(routed.x)) if wanted else torch.empty(0)
        slots = dispatch(routed.ids, routed.weights, layout.experts)
        balanced = self.plan.recipe.calibration.balance != "none"
        pool = self._pool_inputs(routed, layout, pooled) if pooled is not None else None
        if balanced and pool is None:  # the texts have no further windows
            self.report.balance = self._drawn(routed, layout, routed.ids[:0]).describe()
        return ExpertInputs(
            self.stream, layout, routed.x, slots, sample, h_layer, self.stream.new_outputs(routed), pool, self.soft, self._exact_experts()
        )

    def _exact_experts(self) -> Tensor | None:
        """[T, H] what full precision delivers to the experts, where weights are corrected for drift."""
        assert self.sites.moe is not None
        name = self.sites.moe.experts
        if self.plan.recipe.solver.drift != "none" and f"{self.sites.name}.{name}" in self.plan.experts and name not in self.exact:
            self.report.drift[name] = {"skipped": NOT_COMPARED}
        return self.exact.get(name)

    def _pool_inputs(self, routed: RoutedTokens, layout: ExpertsLayout, pooled: RoutedTokens) -> PoolInputs:
        assert self.pool is not None
        drawn = self._drawn(routed, layout, pooled.ids)
        self.report.balance = drawn.describe()
        extra, slots = (dispatch(ids, pooled.weights, layout.experts) for ids in (drawn.ids, pooled.ids))
        return PoolInputs(self.pool, pooled.x, slots, extra, self.pool.new_outputs(pooled))

    def _drawn(self, routed: RoutedTokens, layout: ExpertsLayout, pool_ids: Tensor) -> Drawn:
        calibration = self.plan.recipe.calibration
        return draw(routed.counts(layout.experts), pool_ids, calibration.seq_len, float(calibration.balance))

    def _solve_chunk(self, name: str, layout: ExpertsLayout, module: nn.Module, start: int, stop: int, inputs: ExpertInputs | None) -> None:
        """Experts [start, stop): gate and up from their shared Hessian, then down from what the quantized gate and up deliver.

        Their outputs are added to those of the layer.
        """
        parts, wanted = self.plan.experts.get(name), self.plan.recipe.needs_hessians
        weights = read_experts(self.sink.weights, name, layout, start, stop, self._stored_dtype(name, layout))
        if inputs is not None:
            weights = self._without_outliers(name, module, weights, inputs, start, stop)
        quantized: dict[str, QTensor] = {}
        exact = weights.to(self._dtype) if parts and inputs and inputs.exact is not None else None
        power, aware = self.plan.recipe.solver.affinity_power, self.plan.recipe.solver.output_aware
        if parts:
            sensitive = (module, layout, weights.to(self._dtype)) if aware else None
            hessian = inputs.hessians(start, stop, power, sensitive) if inputs and wanted else None
            transform = self.transforms.get(f"{name}.{FIRST}")
            drift = inputs.first_drift(start, stop, power, sensitive) if inputs and exact else None
            corrected = self._corrected_experts(layout.first, weights.first, drift)
            first = self._solve_first(layout, corrected, hessian, parts, start, stop, quantized, transform)
            weights = ExpertWeights(first, weights.down, weights.first_bias, weights.down_bias)
            del hessian, sensitive, drift, corrected
        stored_down, weights = weights.down, weights.to(self._dtype)
        h, hessian, drift = self._through_first(module, weights, exact, start, stop, inputs, wanted and parts is not None)
        if parts:
            spec = parts["down_proj"]
            stored_down = self._corrected_experts("down_proj", stored_down, drift)
            transform = self._expert_transforms(f"{name}.{DOWN}", module, weights, start, inputs, h)
            stored_down, hessian = _transformed(transform, stored_down, hessian)
            q, info = self._solve(stored_down, hessian, torch.tensor(spec.bits[start:stop]), spec.scale_dtype)
            down = self._on_plain_inputs(self._note("down_proj", q, info, stored_down), transform)
            quantized["down_proj"] = q
            weights = ExpertWeights(weights.first, down, weights.first_bias, weights.down_bias)
            self.sink.put_experts(self.shard, name, layout, start, quantized)
        if inputs and h is not None:
            inputs.through_down(module, weights, start, stop, h)
        if inputs and inputs.pool:
            inputs.pool.through(module, weights, start, stop)

    def _through_first(
        self,
        module: nn.Module,
        weights: ExpertWeights,
        exact: ExpertWeights | None,
        start: int,
        stop: int,
        inputs: ExpertInputs | None,
        wanted: bool,
    ) -> tuple[Tensor | None, Tensor | None, DriftMoments | None]:
        """What enters down [S, I] behind the quantized gate and up; where it is wanted, its second moments, and those of its drift.

        Args:
            exact: the experts in full precision, where they are compared with.
        """
        if inputs is None or not wanted:
            return (inputs.through_first(module, weights, start, stop, None) if inputs else None), None, None
        solver, size = self.plan.recipe.solver, weights.down.shape[2]
        moments = ExpertMoments.zeros(stop - start, size, 2.0 if solver.output_aware else solver.affinity_power)
        drift = self._drift_moments(stop - start, size) if exact else None
        h = inputs.through_first(module, weights, start, stop, moments, (drift, exact) if drift and exact else None)
        return h, moments.shrunk(inputs.down_target(module, weights, start, stop)), drift

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
        transform: BlockTransform | None,
    ) -> Tensor:
        """Gate and up (or the lone up): one solve where their widths agree, since they share their inputs.

        Returns dequantized [C, 2I, H].
        """
        projections = [p for p in layout.projections if p != "down_proj"]
        widths = {p: torch.tensor(parts[p].bits[start:stop]) for p in projections}
        result = torch.empty(w.shape, dtype=self._dtype)
        w, hessian = _transformed(transform, w, hessian)
        same = all(torch.equal(widths[p], widths[projections[0]]) for p in projections)
        if same:
            together, info = self._solve(w, hessian, widths[projections[0]], parts[projections[0]].scale_dtype)
        for p in projections:
            rows = layout.rows(p)
            q = together.rows(rows) if same else None
            if q is None:
                q, info = self._solve(w[:, rows], hessian, widths[p], parts[p].scale_dtype)
            quantized[p] = q
            result[:, rows] = self._on_plain_inputs(self._note(p, q, info, w[:, rows]), transform)
        return result

    def _on_plain_inputs(self, value: Tensor, transform: BlockTransform | None) -> Tensor:
        """Weights [C, out, in] that were quantized for transformed inputs, as they act on inputs as they are."""
        return value if transform is None else transform.undo(value.float()).to(self._dtype)

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


def _capture(stream: Stream, index: int, final: bool, kept: KeptInput | None = None) -> tuple[RoutedTokens, Tensor | None]:
    """What a layer's experts are asked, and, where nothing else in the layer changes any more, what it puts out without them."""
    without = stream.store.allocate(tuple(stream.hidden.shape), stream.dtype) if final else None
    return stream.capture_routing(index, without, kept), without


def drifting(plan: Plan, sites: LayerSites) -> list[str]:
    """Modules of a layer at whose inputs full precision is asked what should arrive, where weights are corrected for drift."""
    groups = [group for group in sites.groups if any(f"{sites.name}.{name}" in plan.linears for name in group.names)]
    names = [_input_of(sites, group) for group in groups]
    if sites.moe is not None and f"{sites.name}.{sites.moe.experts}" in plan.experts:
        names.append(sites.moe.experts)
    return list(dict.fromkeys(names))


def _input_of(sites: LayerSites, group: LinearGroup) -> str:
    """The module that is asked for a group's input."""
    return sites.moe.experts if group.moe_input and sites.moe is not None else group.names[0]


def _transformed(transform: BlockTransform | None, w_EOI: Tensor, h_EII: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and second moments for transformed inputs."""
    if transform is None:
        return w_EOI, h_EII
    return transform.apply(w_EOI.float()), None if h_EII is None else transform.moments(h_EII)


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
