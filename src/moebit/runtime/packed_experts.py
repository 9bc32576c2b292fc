"""Experts whose weights stay packed: few tokens are multiplied with packed rows, many with one expert at a time, dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moebit.formats.names import EXPERTS_IMPLEMENTATION
from moebit.formats.native import PackedSpec
from moebit.formats.overlay import OverlaySpec
from moebit.model.expert_gradients import experts_output
from moebit.model.experts import ExpertsLayout, ExpertWeights, Slots, dispatch, finish, intermediate, layout_of
from moebit.runtime import gradients
from moebit.runtime.packed import FullChannels, PackedChannels, PackedMatrices
from moebit.runtime.paths import (
    multiplied_in,
    packed_product,
)


def pack_experts(module: Any, path: str, specs: dict[str, PackedSpec], overlays: Mapping[str, OverlaySpec] | None = None) -> None:
    """Replace the weights of an experts module by packed stacks, in place; its gating and its biases stay its own."""
    module.moebit_layout = layout_of(module, path)
    for leaf in (module.moebit_layout.first, "down_proj"):
        delattr(module, leaf)
    for projection, spec in specs.items():
        module.add_module(projection, PackedMatrices(spec))
    if overlays:
        parts = {p: PackedChannels(spec.packed) if spec.packed else FullChannels(spec) for p, spec in overlays.items()}
        module.overlay = nn.ModuleDict(parts)
    module._is_hf_initialized = True  # transformers would look for the weights that are gone, to initialise them


@torch.compiler.disable
def packed_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output [T, H], differentiable with respect to everything but packed weights, which have no gradient.

    Experts that a recipe left in full precision run with the weights they have. torch.compile leaves all of it out of its graphs.
    """
    packed = hasattr(module, "moebit_layout")
    layout: ExpertsLayout = module.moebit_layout if packed else layout_of(module, type(module).__name__)
    slots = dispatch(top_k_index, top_k_weights, layout.experts)
    if not torch.is_grad_enabled() or not gradients.wanted(hidden_states, top_k_weights, *module.parameters()):
        with torch.no_grad():
            return _forward_only(module, layout, hidden_states, slots, packed)
    if packed:
        return _differentiable(module, layout, hidden_states, slots)
    weights = _all_as_they_are(module, layout, hidden_states.dtype)
    answers = experts_output(module, hidden_states[slots.tokens], slots.affinity, weights, slots.bounds)
    return torch.zeros_like(hidden_states, dtype=torch.float32).index_add(0, slots.tokens, answers.float()).to(hidden_states.dtype)


def _differentiable(module: Any, layout: ExpertsLayout, x_TH: Tensor, slots: Slots) -> Tensor:
    biases = (getattr(module, f"{layout.first}_bias"), module.down_proj_bias) if layout.bias else (None, None)
    first_of, down_of = (partial(made, module, layout, dtype=x_TH.dtype) for made in (_first, _down))
    return gradients.experts_output(module, x_TH, slots, biases, first_of, down_of).to(x_TH.dtype)


def _forward_only(module: Any, layout: ExpertsLayout, hidden_states: Tensor, slots: Slots, packed: bool) -> Tensor:
    """Experts with few tokens in one call, the others' weights dequantized one at a time."""
    output = hidden_states.new_zeros(hidden_states.shape, dtype=torch.float32)
    counts = [high - low for low, high in zip(slots.bounds, slots.bounds[1:], strict=False)]
    used = [e for e, count in enumerate(counts) if count]
    few = [e for e in used if packed and counts[e] <= _few_rows(module, layout, e, hidden_states.dtype)]
    if few:
        own = _gather(slots, few)
        output.index_add_(0, own.tokens, _few(module, layout, hidden_states, few, own).float())
    dtype = _work_type(module, hidden_states) if packed else hidden_states.dtype
    for e in sorted(set(used) - set(few)):  # one at a time: what is dequantized at once is what is resident
        own = slots.chunk(e, e + 1)
        weights = (_dequantized if packed else _as_they_are)(module, layout, e, dtype)
        h = intermediate(module, hidden_states[own.tokens].to(dtype), weights, own.bounds)
        output.index_add_(0, own.tokens, finish(module, h, own.affinity, weights, own.bounds))
    return output.to(hidden_states.dtype)


def _work_type(module: Any, x_TH: Tensor) -> torch.dtype:
    """What dequantized experts are computed in; where something stands in their way (rounded inputs, a norm), the input's own type."""
    if getattr(module, "moebit_inputs", None) is not None or module.has_post_expert_norm:
        return x_TH.dtype
    return multiplied_in(x_TH.dtype, x_TH.device)


def _few_rows(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> int:
    parts: list[PackedMatrices] = [getattr(module, projection) for projection in layout.projections]
    return min(part.few_rows(e, dtype) for part in parts)


def _gather(slots: Slots, chosen: list[int]) -> Slots:
    """The slots of some experts, which count from 0 there."""
    parts = [slice(slots.bounds[e], slots.bounds[e + 1]) for e in chosen]
    bounds = [0, *accumulate(part.stop - part.start for part in parts)]
    tokens, affinity = (torch.cat([values[part] for part in parts]) for values in (slots.tokens, slots.affinity))
    return Slots(tokens, affinity, bounds, slice(0, bounds[-1]))


def _few(module: Any, layout: ExpertsLayout, x_TH: Tensor, chosen: list[int], own: Slots) -> Tensor:
    """[S, H]: what `intermediate` and `finish` make, by products with the packed codes of all chosen experts at once."""
    steps = getattr(module, "moebit_inputs", None)
    if steps is not None:
        x_TH = steps.first(x_TH)
    wide = torch.empty(len(own.tokens), layout.intermediate * (2 if layout.gated else 1), device=x_TH.device)
    for projection in layout.projections[:-1]:
        part = getattr(module, projection)
        packed_product(part.path, part.stack(), x_TH, chosen, own.bounds, own.tokens, wide, layout.rows(projection))
        for slots, channels, values in _channels(module, projection, chosen, own, x_TH.dtype):
            columns = torch.arange(wide.shape[1], device=wide.device)[layout.rows(projection)]
            wide[slots, columns[channels, None]] = (values @ x_TH[own.tokens[slots]].T).float()
    first_bias, down_bias = _slot_biases(module, layout, chosen, own)
    first = wide.to(x_TH.dtype) + first_bias
    h = module._apply_gate(first) if module.has_gate else module.act_fn(first)
    if steps is not None:
        h = _down_step(steps, h, chosen, own)
    y = torch.empty(len(own.tokens), layout.hidden, device=h.device)
    down, apart = module.down_proj, []
    for slots, channels, values in _channels(module, "down_proj", chosen, own, x_TH.dtype):  # the base's columns count as zero
        apart.append((slots, h[slots, channels[:, None]].T @ values))
        h[slots, channels[:, None]] = 0
    packed_product(down.path, down.stack(), h, chosen, own.bounds, torch.arange(len(own.tokens), device=h.device), y)
    for slots, added in apart:
        y[slots] += added.float()
    y = y.to(x_TH.dtype) + down_bias
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    return y * own.affinity.to(y.dtype).unsqueeze(1)


def _down_step(steps: Any, h_SI: Tensor, chosen: list[int], own: Slots) -> Tensor:
    """What happens to the inputs of down, whose slots are those of the chosen experts."""
    counts = dict.fromkeys(range(max(chosen) + 1), 0) | {e: own.bounds[i + 1] - own.bounds[i] for i, e in enumerate(chosen)}
    stepped: Tensor = steps.down(h_SI, [0, *accumulate(counts.values())], 0)
    return stepped


def _channels(module: Any, projection: str, chosen: list[int], own: Slots, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(slots, channels, values [n, H]) of the chosen experts that have channels apart."""
    for number, e in enumerate(chosen):
        found = _channels_of(module, projection, e, dtype)
        if found is not None:
            yield torch.arange(own.bounds[number], own.bounds[number + 1], device=own.tokens.device), *found


def _channels_of(module: Any, projection: str, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """(channels int64 [n], values [n, H]) that stand in for some of expert e's; None where there are none."""
    overlays: Any = getattr(module, "overlay", None)
    if overlays is None or projection not in overlays:
        return None
    overlay = overlays[projection]
    own = (overlay.expert == e).nonzero()[:, 0]
    if not len(own):
        return None
    return overlay.channel[own].long(), overlay.values_of(int(own[0]), int(own[-1]) + 1, dtype)


def _slot_biases(module: Any, layout: ExpertsLayout, chosen: list[int], own: Slots) -> tuple[Any, Any]:
    if not layout.bias:
        return 0, 0
    counts = torch.tensor(own.bounds).diff()
    expert = torch.tensor(chosen).repeat_interleave(counts).to(own.tokens.device)
    return getattr(module, f"{layout.first}_bias")[expert], module.down_proj_bias[expert]


def _as_they_are(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> ExpertWeights:
    first, down = (layout.stacked(getattr(module, leaf)[e : e + 1]).to(dtype) for leaf in (layout.first, "down_proj"))
    return ExpertWeights(first, down, *_biases(module, layout, e), e)


def _all_as_they_are(module: Any, layout: ExpertsLayout, dtype: torch.dtype) -> ExpertWeights:
    first, down = (layout.stacked(getattr(module, leaf)).to(dtype) for leaf in (layout.first, "down_proj"))
    if not layout.bias:
        return ExpertWeights(first, down)
    return ExpertWeights(first, down, getattr(module, f"{layout.first}_bias").to(dtype), module.down_proj_bias.to(dtype))


def _biases(module: Any, layout: ExpertsLayout, e: int) -> tuple[Tensor | None, Tensor | None]:
    if not layout.bias:
        return None, None
    return getattr(module, f"{layout.first}_bias")[e : e + 1], module.down_proj_bias[e : e + 1]


def _dequantized(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> ExpertWeights:
    first, down = _first(module, layout, e, dtype), _down(module, layout, e, dtype)
    return ExpertWeights(first.unsqueeze(0), down.unsqueeze(0), *_biases(module, layout, e), e)


def _first(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> Tensor:
    """[2I or I, H] of expert e, dequantized, with the channels that stand in for some of its own."""
    rows = layout.intermediate * (2 if layout.gated else 1)
    first = torch.empty(rows, layout.hidden, dtype=dtype, device=module.down_proj.codes.device)
    for projection in layout.projections[:-1]:
        getattr(module, projection).unpack_into(e, first, layout.rows(projection))
        found = _channels_of(module, projection, e, dtype)
        if found is not None:
            first[layout.rows(projection)][found[0]] = found[1]
    return first


def _down(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> Tensor:
    """[H, I] of expert e, dequantized, with the channels that stand in for some of its own."""
    down: Tensor = module.down_proj.unpacked(e, e + 1, dtype)[0]
    found = _channels_of(module, "down_proj", e, dtype)
    if found is not None:
        down.T[found[0]] = found[1]
    return down


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, packed_experts_forward)
