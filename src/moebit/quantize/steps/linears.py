"""Linears outside of the routed experts: those that share an input are solved from one Hessian; then rounding may be learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moebit.methods.input_drift import correct_input_drift
from moebit.quantize.context import LayerContext, LayerState
from moebit.quantize.groups import in_order, quantized
from moebit.quantize.online import on_plain_inputs, with_transform
from moebit.quantize.refine_linears import SolvedLinear, refine_linears
from moebit.quantize.solve import relative_error, widths_of
from moebit.quantize.statistics import Statistics, group_statistics
from moebit.tensor import QTensor
from moebit.tensor.blocks import BlockTransform


def linears_before_experts(context: LayerContext, state: LayerState) -> LayerState:
    """Solve the linears of attention and of everything else that runs before the experts."""
    return _solve_groups(context, state, in_order(context.sites).before)


def linears_beside_experts(context: LayerContext, state: LayerState) -> LayerState:
    """Solve shared experts, from the input that the routed experts get."""
    return _solve_groups(context, state, in_order(context.sites).beside)


def linears_behind_experts(context: LayerContext, state: LayerState) -> LayerState:
    """Solve what runs on the experts' outputs."""
    return _solve_groups(context, state, in_order(context.sites).behind, refined=False)


def _solve_groups(context: LayerContext, state: LayerState, numbers: list[int], refined: bool = True) -> LayerState:
    """Solve some groups, one after the other; where the recipe says so, learn their rounding together before they are written."""
    refined, waiting = refined and context.recipe.refine.active and state.stream is not None, dict[str, SolvedLinear]()
    for number in numbers:
        if names := quantized(context, context.sites.groups[number]):
            solved, state = _solve_group(context, state, number, names)
            if refined:
                waiting |= solved
                for name, one in solved.items():
                    _place(context, state.dtype, name, one, one.quantized)
            else:
                state = state.noting(linears={name: _put(context, state, name, one, one.quantized) for name, one in solved.items()})
    return _learned(context, state, waiting) if waiting else state


def _learned(context: LayerContext, state: LayerState, solved: dict[str, SolvedLinear]) -> LayerState:
    """Learn the rounding of linears that are in place, and write them."""
    assert state.stream is not None
    final, report = refine_linears(context, state.stream, state.reference.without, solved)
    state = state.noting(refine={context.full(name): row for name, row in report.items()})
    if any(final[name] is not one.quantized for name, one in solved.items()):
        state = replace(state, inputs={}, kept=None)  # they came from linears that have changed
    return state.noting(linears={name: _put(context, state, name, one, final[name]) for name, one in solved.items()})


def _solve_group(context: LayerContext, state: LayerState, number: int, names: list[str]) -> tuple[dict[str, SolvedLinear], LayerState]:
    """Solve linears that share an input, those of one width as one matrix: their rows stacked, one factorisation."""
    statistics, state = group_statistics(context, state, number)
    hessian = statistics.hessian if statistics else None
    matrices, drift = _corrected(context, names, statistics)
    transform, state = _transform(context, state, names, statistics)
    if transform is not None and hessian is not None:
        hessian = transform.moments(hessian)
    h, solved = None if hessian is None else hessian.unsqueeze(0), dict[str, SolvedLinear]()
    for some in _by_grid(context, names):
        spec = context.plan.linears[context.full(some[0])]
        stacked = torch.cat([matrices[name] for name in some]) if len(some) > 1 else matrices[some[0]]
        stacked = stacked if transform is None else transform.apply(stacked.float())
        q, info = context.solve(stacked.unsqueeze(0), h, widths_of(spec), spec)
        begin = 0
        for name in some:
            rows = slice(begin, begin + len(matrices[name]))
            solved[name] = SolvedLinear(matrices[name], stacked[rows], q.rows(rows), info, transform)
            begin = rows.stop
    return solved, state.noting(drift=drift)


def _by_grid(context: LayerContext, names: list[str]) -> list[list[str]]:
    """The names by width, type and number of scales, and block type."""
    found: dict[tuple[tuple[int, ...], torch.dtype, int, str], list[str]] = {}
    for name in names:
        spec = context.plan.linears[context.full(name)]
        found.setdefault((spec.bits, spec.scale_dtype, spec.group_size, spec.ggml), []).append(name)
    return list(found.values())


def _corrected(context: LayerContext, names: list[str], statistics: Statistics | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights as they are to be rounded, corrected for the drift of their input where the recipe says so, and what that did."""
    matrices = {name: context.sink.weights.parameter(context.full(f"{name}.weight")) for name in names}
    if statistics is None or statistics.drift is None:
        return matrices, {}
    corrected = correct_input_drift(torch.cat(list(matrices.values())).unsqueeze(0), statistics.drift)
    rows = corrected.weight[0].split([len(matrix) for matrix in matrices.values()])
    return dict(zip(matrices, rows, strict=True)), {name: {"mu": corrected.mu[0], "gain": corrected.gain[0]} for name in matrices}


def _transform(
    context: LayerContext, state: LayerState, names: list[str], statistics: Statistics | None
) -> tuple[BlockTransform | None, LayerState]:
    """The online transform of a group's input, None where it has none."""
    reads = {context.plan.activations.reads.get(context.full(name)) for name in names}
    name = next(iter(reads - {None}), None)
    if name is None:
        return None, state
    sample = statistics.sample if statistics else None
    state = replace(state, transforms=with_transform(context, state.transforms, name, sample))
    return state.transforms[name], state


def _place(context: LayerContext, dtype: torch.dtype, name: str, solved: SolvedLinear, q: QTensor) -> Tensor:
    """Put a linear in place for what runs after it; returns its weight [O, I], for inputs as they are, as who loads the output has it."""
    value = on_plain_inputs(context.sink.used(q, dtype), solved.transform)[0]
    if context.layer is not None:
        context.layer.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)
    return value


def _put(context: LayerContext, state: LayerState, name: str, solved: SolvedLinear, q: QTensor) -> dict[str, Any]:
    """Write one quantized linear and put it in place; returns its row of the report."""
    context.sink.put_linear(context.shard, context.full(name), q)
    value, info = _place(context, state.dtype, name, solved, q), solved.info
    return {
        "bits": int(q.bits[0]),
        "weight_error": relative_error(value.unsqueeze(0), solved.matrix.unsqueeze(0))[0],
        "damping": float(info.damping[0]) if info else None,
        "fallback": bool(info.fallback[0]) if info else False,
    }
