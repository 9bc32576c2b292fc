"""The routed experts: solved and written chunk by chunk, gate and up first, then down from what the quantized gate and up deliver.

Behind that their rounding is learned, where the recipe says so (`quantize/refine.py`).

Shape suffixes: C experts of a chunk, O outputs, I inputs, S routed slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moebit.calibration.statistics import ExpertMoments, layer_sample
from moebit.formats.native import PackedSpec
from moebit.methods.input_drift import InputDriftMoments, correct_input_drift
from moebit.methods.smoothing import outlier_factors
from moebit.model.experts import ExpertsLayout, ExpertWeights, experts_names, read_experts
from moebit.model.inputs import DOWN, FIRST
from moebit.quantize.chunk import SAMPLED_SLOTS, ExpertChunk, ExpertInputs
from moebit.quantize.context import LayerContext, LayerState
from moebit.quantize.expert_inputs import expert_inputs
from moebit.quantize.layer_target import LayerTarget, layer_target
from moebit.quantize.online import Transforms, chunk_transform, on_plain_inputs, transformed, with_transform
from moebit.quantize.refine import refine_chunk
from moebit.quantize.solve import relative_error, widths_of
from moebit.quantize.statistics import drift_moments
from moebit.storage.shards import Collected
from moebit.tensor import QTensor, SolveInfo
from moebit.tensor.blocks import BlockTransform

SAMPLED_EXPERTS = 16  # that the shared transform of down projections is made from


@torch.no_grad()
def quantize_experts(context: LayerContext, state: LayerState) -> LayerState:
    """Solve and write the routed experts, and add up their outputs for every token of the calibration set and of the pool."""
    inputs, state = expert_inputs(context, state)
    work = _work(context, state, inputs)
    work = replace(work, transforms=_shared_transforms(work))
    work = replace(work, target=_target(work, state))
    experts, done = work.layout.experts, list[_ChunkReport]()
    # What is learned of a chunk depends on what those before it put out: one rank does it, chunk after chunk.
    turn = context.part * (context.ranks.size if work.target is None else 1)
    for start in range(0, experts, turn):
        done += _quantize_turn(work, range(start, min(start + turn, experts), context.part))
        context.progress("experts", min(start + turn, experts), experts)
    outputs = inputs.outputs.total if inputs else None
    pool_outputs = inputs.pool.outputs.total if inputs and inputs.pool else None
    return replace(_reported(state, done), outputs=outputs, pool_outputs=pool_outputs, transforms=work.transforms)


@dataclass(frozen=True)
class _Work:
    """What is the same for all chunks of a layer.

    Attributes:
        name: of the experts module. parts: how its projections are quantized, None where they are kept.
        inputs: what they are calibrated on. transforms: online transforms that were made. dtype: what the layer is computed in.
        outliers: whether channels that stand out between up and down are scaled.
        target: what the layer should put out, where rounding is learned.
    """

    context: LayerContext
    name: str
    layout: ExpertsLayout
    module: Any
    parts: Mapping[str, PackedSpec] | None
    inputs: ExpertInputs | None
    transforms: Transforms
    dtype: torch.dtype
    outliers: bool
    target: LayerTarget | None = None

    def read(self, start: int, stop: int, dtype: torch.dtype) -> ExpertChunk:
        """Experts [start, stop) from the checkpoint."""
        weights = read_experts(self.context.sink.weights, self.name, self.layout, start, stop, dtype)
        return ExpertChunk(self.module, self.layout, start, stop, weights)

    def chunks(self, dtype: torch.dtype) -> Iterator[ExpertChunk]:
        """All experts from the checkpoint, a chunk at a time."""
        for start in range(0, self.layout.experts, self.context.part):
            yield self.read(start, min(start + self.context.part, self.layout.experts), dtype)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Experts are solved from the values that are stored, not from what they are rounded to for computing."""
        return self.context.sink.weights.spec(f"{self.name}.{self.layout.first}").dtype


def _work(context: LayerContext, state: LayerState, inputs: ExpertInputs | None) -> _Work:
    moe = context.sites.moe
    assert moe is not None
    name = context.full(moe.experts)
    parts, scales = context.plan.experts.get(name), context.plan.transforms.scales
    outliers = (
        context.recipe.smoothing.kind == "expert_aware"
        and parts is not None
        and scales[context.sites.index].experts
        and not moe.layout.bias  # a bias is stored as it is
    )
    module = context.sink.weights.model.get_submodule(name)
    return _Work(context, name, moe.layout, module, parts, inputs, state.transforms, state.dtype, outliers)


def _target(work: _Work, state: LayerState) -> LayerTarget | None:
    """What the layer should put out, where the recipe asks for learned rounding and that is known."""
    context = work.context
    if not context.recipe.refine.active or work.inputs is None or work.parts is None:
        return None
    return layer_target(context, state, work.inputs, work.chunks(work.dtype) if context.part < work.layout.experts else iter(()))


@dataclass(frozen=True)
class _ChunkReport:
    """What happened to a chunk.

    Attributes:
        rows: projection -> lists over experts for the report. drift: the same by projection's input. outliers: scaled channels, by expert.
        refine: experts module -> lists of one entry, how rounding was learned.
    """

    rows: Mapping[str, Mapping[str, list[Any]]]
    drift: Mapping[str, Mapping[str, list[Any]]]
    outliers: list[int]
    refine: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)


def _reported(state: LayerState, done: list[_ChunkReport]) -> LayerState:
    """The state with the reports of all chunks."""
    outliers = [count for chunk in done for count in chunk.outliers]
    state = state.noting(smoothing={"outliers": outliers}) if outliers else state
    state = state.noting(refine=_concatenated([chunk.refine for chunk in done]))
    return state.noting(experts=_concatenated([chunk.rows for chunk in done]), drift=_concatenated([chunk.drift for chunk in done]))


def _concatenated(several: list[Mapping[str, Mapping[str, list[Any]]]]) -> dict[str, dict[str, list[Any]]]:
    """Lists of the same names, one after the other."""
    result: dict[str, dict[str, list[Any]]] = {}
    for rows in several:
        for name, lists in rows.items():
            into = result.setdefault(name, {})
            for key, values in lists.items():
                into[key] = [*into.get(key, []), *values]
    return result


def _quantize_turn(work: _Work, starts: range) -> list[_ChunkReport]:
    """Quantize and write as many chunks as there are ranks, one each; all ranks know afterwards what came of all of them."""
    context, experts, ranks = work.context, work.layout.experts, work.context.ranks
    collected, mine = Collected(context.shard), list[dict[str, Any]]()
    if ranks.rank < len(starts):
        start = starts[ranks.rank]
        stop, following = min(start + starts.step, experts), start + starts.step * ranks.size
        context.sink.weights.expect(experts_names(work.name, work.layout), min(following, experts), min(following + starts.step, experts))
        mine.append(asdict(_quantize_chunk(replace(work, context=replace(context, shard=collected)), start, stop)))
    collected.settle(ranks)
    if work.inputs is not None:
        work.inputs.settle()
    return [_ChunkReport(**report) for reports in ranks.told(mine) for report in reports]


def _quantize_chunk(work: _Work, start: int, stop: int) -> _ChunkReport:
    """Quantize and write experts [start, stop), and add their outputs to those of the layer."""
    chunk, outliers = _without_outliers(work, work.read(start, stop, work.stored_dtype))
    if work.parts is None:
        _pass_through(work, chunk.to(work.dtype))
        return _ChunkReport({}, {}, outliers)
    exact = chunk.to(work.dtype) if work.inputs and work.inputs.drifts else None
    if work.target is not None and work.inputs is not None and work.context.part < work.layout.experts:
        work.target.reach(chunk.to(work.dtype), work.inputs)
    first = _solve_first(work, work.parts, chunk)
    stored, chunk = chunk, chunk.with_first(first.value).to(work.dtype)
    seen = _through_first(work, chunk, exact)
    down = _solve_down(work, work.parts["down_proj"], chunk, stored.weights.down, seen)
    quantized, rows, h = {**first.quantized, **down.quantized}, {**first.rows, **down.rows}, seen.h
    chunk, learned = chunk.with_down(down.value), dict[str, list[Any]]()
    if work.context.recipe.refine.active and work.inputs:
        refined, learned = refine_chunk(work.context, work.inputs, work.target, stored, quantized)
        if learned.get("step", [0])[0]:
            quantized, chunk = refined, _with_projections(work, chunk, refined)
            rows = {p: {**rows[p], "weight_error": relative_error(chunk.projection(p), stored.projection(p))} for p in rows}
            h = work.inputs.through_first(chunk, None)
    work.context.sink.put_experts(work.context.shard, work.name, work.layout, start, quantized)
    if work.inputs and h is not None:
        work.inputs.through_down(chunk, h)
    return _ChunkReport(rows, {**first.drift, **down.drift}, outliers, {work.name: learned} if learned else {})


def _with_projections(work: _Work, chunk: ExpertChunk, quantized: Mapping[str, QTensor]) -> ExpertChunk:
    """The chunk with these projections, as who loads the output will have them."""
    value = {p: work.context.sink.used(q, work.dtype) for p, q in quantized.items()}
    first = chunk.weights.first.clone()
    for projection in chunk.layout.projections[:-1]:
        first[:, chunk.layout.rows(projection)] = value[projection]
    return chunk.with_first(first).with_down(value["down_proj"])


def _pass_through(work: _Work, chunk: ExpertChunk) -> None:
    """Add the outputs of experts that are kept as they are."""
    if work.inputs is not None:
        work.inputs.through_down(chunk, work.inputs.through_first(chunk, None))


def _without_outliers(work: _Work, chunk: ExpertChunk) -> tuple[ExpertChunk, list[int]]:
    """Outlier channels between up and down moved into down, where the recipe says so and h is linear in up; how many, by expert."""
    if not work.outliers or work.inputs is None:
        return chunk, []
    factors = outlier_factors(*work.inputs.extremes(chunk.to(work.dtype))).float()
    first = chunk.weights.first.float().clone()
    first[:, chunk.layout.rows("up_proj")] /= factors.unsqueeze(2)
    weights = ExpertWeights(first, chunk.weights.down.float() * factors.unsqueeze(1), begin=chunk.start)
    return replace(chunk, weights=weights), (factors > 1).sum(1).tolist()


@dataclass(frozen=True)
class _Solved:
    """Quantized projections of a chunk.

    Attributes:
        value: [C, O, I] what acts on plain inputs, in the type that the layer is computed in. quantized: by projection.
        rows, drift: for the report.
    """

    value: Tensor
    quantized: Mapping[str, QTensor]
    rows: Mapping[str, Mapping[str, list[Any]]]
    drift: Mapping[str, Mapping[str, list[Any]]]


def _solve_first(work: _Work, parts: Mapping[str, PackedSpec], chunk: ExpertChunk) -> _Solved:
    """Gate and up from the Hessian that they share, corrected for the drift of their inputs where the recipe says so."""
    w, hessian, drift = _first_problem(work, chunk)
    transform = work.transforms.get(f"{work.name}.{FIRST}")
    w, hessian = transformed(transform, w, hessian)
    value, quantized, rows = torch.empty(w.shape, dtype=work.dtype), dict[str, QTensor](), dict[str, dict[str, list[Any]]]()
    for projection, (q, info) in _solve_projections(work, parts, chunk, w, hessian).items():
        span = chunk.layout.rows(projection)
        used, rows[projection] = _used(work, q, info, w[:, span])
        quantized[projection], value[:, span] = q, on_plain_inputs(used, transform)
    return _Solved(value, quantized, rows, drift)


def _first_problem(work: _Work, chunk: ExpertChunk) -> tuple[Tensor, Tensor | None, dict[str, dict[str, list[Any]]]]:
    """(gate and up as they are to be rounded [C, O, I], their Hessians, what drift correction did)."""
    inputs, aware = work.inputs, work.context.recipe.solver.output_aware
    if inputs is None or not work.context.recipe.needs_hessians:
        return chunk.weights.first, None, {}
    computed = chunk.to(work.dtype) if aware else chunk
    hessian = inputs.hessians(computed)
    if not inputs.drifts:
        return chunk.weights.first, hessian, {}
    w, drift = _corrected(chunk.layout.first, chunk.weights.first, inputs.first_drift(computed))
    return w, hessian, drift


def _corrected(what: str, w_COI: Tensor, moments: InputDriftMoments | None) -> tuple[Tensor, dict[str, dict[str, list[Any]]]]:
    """Weights corrected for the drift of their inputs, and what that did."""
    if moments is None:
        return w_COI, {}
    corrected = correct_input_drift(w_COI, moments)
    return corrected.weight, {what: {"mu": list(corrected.mu), "gain": list(corrected.gain)}}


def _solve_projections(
    work: _Work, parts: Mapping[str, PackedSpec], chunk: ExpertChunk, w: Tensor, hessian: Tensor | None
) -> dict[str, tuple[QTensor, SolveInfo | None]]:
    """Gate and up, or the lone up: one solve where their widths agree, since they share their inputs."""
    layout = chunk.layout
    projections = [p for p in layout.projections if p != "down_proj"]
    bits = {p: widths_of(parts[p], chunk.start, chunk.stop) for p in projections}
    lead = projections[0]
    if all(torch.equal(bits[p], bits[lead]) for p in projections):
        stacked, info = work.context.solve(w, hessian, bits[lead], parts[lead])
        return {p: (stacked.rows(layout.rows(p)), info) for p in projections}
    return {p: work.context.solve(w[:, layout.rows(p)], hessian, bits[p], parts[p]) for p in projections}


@dataclass(frozen=True)
class _Seen:
    """What enters down behind the quantized gate and up.

    Attributes:
        h: [S, I], None without calibration. hessian, drift: its second moments and those of its drift, where they are wanted.
    """

    h: Tensor | None
    hessian: Tensor | None = None
    drift: InputDriftMoments | None = None


def _through_first(work: _Work, chunk: ExpertChunk, exact: ExpertChunk | None) -> _Seen:
    """Run the tokens through the quantized gate and up; `exact` has the experts in full precision, where they are compared with."""
    inputs, size = work.inputs, chunk.layout.intermediate
    if inputs is None:
        return _Seen(None)
    if not work.context.recipe.needs_hessians:
        return _Seen(inputs.through_first(chunk, None))
    moments = ExpertMoments.zeros(chunk.count, size, inputs.weighing.down_power)
    drift = drift_moments(inputs.stream, chunk.count, size) if exact else None
    h = inputs.through_first(chunk, moments, (drift, exact) if drift and exact else None)
    return _Seen(h, moments.shrunk(inputs.target.down(chunk, inputs.stream.slots)), drift)


def _solve_down(work: _Work, spec: PackedSpec, chunk: ExpertChunk, stored: Tensor, seen: _Seen) -> _Solved:
    """Down from the inputs that the quantized gate and up deliver."""
    w, drift = _corrected("down_proj", stored, seen.drift)
    transform = _down_transform(work, chunk, seen.h)
    w, hessian = transformed(transform, w, seen.hessian)
    q, info = work.context.solve(w, hessian, widths_of(spec, chunk.start, chunk.stop), spec)
    used, rows = _used(work, q, info, w)
    return _Solved(on_plain_inputs(used, transform), {"down_proj": q}, {"down_proj": rows}, drift)


def _used(work: _Work, q: QTensor, info: SolveInfo | None, w_COI: Tensor) -> tuple[Tensor, dict[str, list[Any]]]:
    """A projection's weights as who loads the output will have them, and its rows of the report."""
    value = work.context.sink.used(q, work.dtype)
    return value, {
        "bits": q.bits.tolist(),
        "weight_error": relative_error(value, w_COI),
        "damping": info.damping.tolist() if info else [None] * len(q.bits),
        "fallback": info.fallback.tolist() if info else [False] * len(q.bits),
    }


def _shared_transforms(work: _Work) -> Transforms:
    """The online transforms that all experts share, made before the first of them is solved.

    That of the down projections is made from what the gate and up projections of some experts, not quantized yet, deliver.
    """
    context, specs, known = work.context, work.context.plan.activations.transforms, work.transforms
    if f"{work.name}.{FIRST}" in specs:
        known = with_transform(context, known, f"{work.name}.{FIRST}", work.inputs.target.sample if work.inputs else None)
    spec = specs.get(f"{work.name}.{DOWN}")
    if spec is None or (spec.count > 1 and spec.kind == "duquant"):  # the latter: chunk by chunk, from each expert's own tokens
        return known
    sample = None
    if spec.kind == "duquant":
        assert work.inputs is not None
        some = layer_sample(work.layout.experts, SAMPLED_EXPERTS).tolist()
        sample = torch.cat([_down_sample(work, work.inputs, expert) for expert in some])
    return with_transform(context, known, f"{work.name}.{DOWN}", sample)


def _down_sample(work: _Work, inputs: ExpertInputs, expert: int) -> Tensor:
    """[S, I] some inputs of an expert's down projection as the checkpoint has it; of the layer's tokens if it has none of its own."""
    chunk, _ = _without_outliers(work, work.read(expert, expert + 1, work.dtype))
    own = inputs.slots.chunk(expert, expert + 1).tokens
    x = inputs.x[own[layer_sample(len(own), SAMPLED_SLOTS)]] if len(own) else inputs.target.sample[:SAMPLED_SLOTS]
    return chunk.to(work.dtype).intermediate(x, [0, len(x)])


def _down_transform(work: _Work, chunk: ExpertChunk, h_SI: Tensor | None) -> BlockTransform | None:
    """The online transform of these experts' down projections, shared or their own; None where there is none."""
    name = f"{work.name}.{DOWN}"
    if work.context.plan.activations.transforms.get(name) is None:
        return None
    if name in work.transforms:
        return work.transforms[name].of(chunk.start, chunk.stop)
    assert work.inputs is not None
    assert h_SI is not None
    return chunk_transform(work.context, name, work.inputs.down_samples(chunk, h_SI), chunk.start)
