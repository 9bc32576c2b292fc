"""Modules whose weights stay packed in memory: multiplied as they are, or dequantized one matrix at a time.

On a CUDA device everything here stays there but the number of tokens of each expert, which the host waits for once per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moebit.errors import BadInputError
from moebit.formats.names import EXPERTS_IMPLEMENTATION
from moebit.formats.native import PackedSpec, unpack_matrices
from moebit.formats.overlay import OverlaySpec
from moebit.model.expert_gradients import experts_output
from moebit.model.experts import ExpertsLayout, ExpertWeights, Slots, dispatch, finish, intermediate, layout_of
from moebit.model.inputs import InputStep
from moebit.runtime import gradients
from moebit.runtime.kernels import Stack
from moebit.runtime.paths import (
    ALWAYS,
    PATHS,
    Path,
    by_triton,
    compiled,
    dequantized,
    few_rows,
    multiplied_in,
    packed_product,
    taken,
    why_not,
)


class PackedModule(nn.Module):
    """Packed matrices: buffers `codes`, `scale`, `zero_point` and, of a stack, `bits`, as in the file; nothing else is kept of them.

    Attributes:
        path: how they are multiplied; `use` sets it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    path: Path = "auto"

    def __init__(self, spec: PackedSpec) -> None:
        super().__init__()
        self.spec = spec
        self._code_offsets, self._zero_offsets = spec.code_offsets(), spec.zero_offsets()
        self._bits, self._code_at, self._zero_at = (np.array(a, np.int64) for a in (spec.bits, self._code_offsets, self._zero_offsets))
        self._prepared: tuple[tuple[Tensor | None, ...], Stack] | None = None
        for name, tensor in spec.specs("").items():
            self.register_buffer(name.removeprefix("."), torch.empty(tensor.shape, dtype=tensor.dtype))

    def stack(self) -> Stack:
        """The buffers as the compiled kernels take them; made anew when one of them was replaced."""
        buffers = (self.codes, self.scale, None if self.spec.symmetric else self.zero_point)
        if self._prepared is None or any(a is not b for a, b in zip(self._prepared[0], buffers, strict=True)):
            codes, scale, zeros = buffers
            scale = scale if self.spec.stacked else scale.unsqueeze(0)
            stack = Stack(codes.flatten(), scale, zeros, self._bits, self._code_at, self._zero_at, self.spec.shape)
            self._prepared = (buffers, stack)
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy's arrays would not be views of its buffers

    def few_rows(self, e: int, dtype: torch.dtype) -> int:
        """Up to how many rows of input matrix e is multiplied as it is packed."""
        if by_triton(self.path, self.codes.device, dtype):
            return ALWAYS
        if not compiled(self.path, self.codes.device, dtype):
            return 0
        return few_rows(self.path, self.stack(), self.spec.bits[e], dtype, matrices=8 if self.spec.stacked else 1)

    def matrices(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[stop - start, out, in] weights."""
        stack = self.stack()
        if compiled(self.path, self.codes.device, dtype):
            result = torch.empty(stop - start, *self.spec.shape, dtype=dtype)
            for e in range(start, stop):
                dequantized(stack, e, result[e - start])
            return result
        codes = stack.codes[self._code_offsets[start] : self._code_offsets[stop]]
        zeros = None if stack.zeros is None else stack.zeros[self._zero_offsets[start] : self._zero_offsets[stop]]
        return unpack_matrices(codes, stack.scale[start:stop], zeros, list(self.spec.bits[start:stop]), self.spec.shape, dtype)


class PackedMatrices(PackedModule):
    """A stack of packed matrices: one projection of all experts."""

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[stop - start, out, in] weights."""
        return self.matrices(start, stop, dtype)

    def unpack_into(self, e: int, target: Tensor, rows: slice) -> None:
        """Write matrix e to target[rows]; target is [rows, in]."""
        if compiled(self.path, self.codes.device, target.dtype):
            dequantized(self.stack(), e, target, rows)
        else:
            target[rows] = self.matrices(e, e + 1, target.dtype)[0]


class PackedLinear(PackedModule):
    """A linear layer over a packed weight. What happens to its input comes in front, as a hook (`model/inputs.py`)."""

    bias: nn.Parameter | None

    def __init__(self, spec: PackedSpec, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(spec)
        self.dtype = dtype
        self.out_features, self.in_features = spec.shape
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.shape[0], dtype=dtype), requires_grad=False) if bias else None)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """[out, in] weights."""
        return self.matrices(0, 1, dtype)[0]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at every access: some architectures read a linear's weight instead of calling it.

        It is for inputs as they are, whatever the packed one expects.
        """
        step: InputStep | None = getattr(self, "moebit_inputs", None)
        if step is None or step.transform is None:
            return self.unpacked(self.dtype)
        return step.transform.value().undo(self.unpacked(torch.float32)).to(self.dtype)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """[..., out]; differentiable with respect to the input and the bias. torch.compile leaves it out of its graphs."""
        if gradients.wanted(x, self.bias):
            return gradients.linear(x, self.bias, self.out_features, partial(self.unpacked, x.dtype))
        rows = x.numel() // self.in_features
        if not 0 < rows <= self.few_rows(0, x.dtype):
            return nn.functional.linear(x, self.unpacked(x.dtype), self.bias)
        y = torch.empty(rows, self.out_features, device=x.device)
        packed_product(self.path, self.stack(), x.reshape(rows, -1), [0], [0, rows], torch.arange(rows, device=x.device), y)
        result = y.view(*x.shape[:-1], self.out_features)
        return result.to(x.dtype) if self.bias is None else (result + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec.bits[0]} bits, group {self.spec.group_size}"


class PackedChannels(PackedMatrices):
    """Channels of one projection that stand in for the base's (formats/overlay.py): a stack of [1, H] matrices and their places.

    Attributes:
        expert, channel: int32 [n], rising.
    """

    expert: Tensor
    channel: Tensor

    def __init__(self, spec: PackedSpec) -> None:
        super().__init__(spec)
        _register_places(self, len(spec.bits))

    def values_of(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """[high - low, H] of some channels."""
        return self.matrices(low, high, dtype)[:, 0]


class FullChannels(nn.Module):
    """Channels of one projection that stand in for the base's, in full precision: values [n, H] and their places."""

    expert: Tensor
    channel: Tensor
    values: Tensor

    def __init__(self, spec: OverlaySpec) -> None:
        super().__init__()
        _register_places(self, spec.channels)
        self.register_buffer("values", torch.empty(spec.channels, spec.hidden, dtype=spec.dtype))

    def values_of(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """[high - low, H] of some channels."""
        return self.values[low:high].to(dtype)


def _register_places(module: nn.Module, count: int) -> None:
    for leaf in ("expert", "channel"):
        module.register_buffer(leaf, torch.empty(count, dtype=torch.int32))


def use(model: nn.Module, path: Path) -> nn.Module:
    """Have a model's packed modules multiply in one way (`moebit.runtime.PATHS`), in place; returns the model.

    Raises:
        BadInputError: no such way, one that this processor or a module's grid rules out, or a model without packed modules.
    """
    if path not in PATHS:
        raise BadInputError(f"no way of multiplying is called {path!r}: choose from {', '.join(PATHS)}")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    if not modules:
        raise BadInputError(f"{type(model).__name__} has no packed modules: load a native output of moebit")
    for name, module in modules.items():
        reason = why_not(path, module.stack())
        if reason:
            raise BadInputError(f"{name} cannot be multiplied by {path!r}: {reason}")
    for module in modules.values():
        module.path = path
    return model


def multiplied(model: nn.Module) -> tuple[Path, ...]:
    """The ways in which a model's packed modules multiply where they lie now; none if it has no packed modules."""
    found = {taken(module.path, module.codes.device) for module in model.modules() if isinstance(module, PackedModule)}
    return tuple(path for path in PATHS if path in found)


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
