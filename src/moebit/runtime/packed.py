"""Modules whose weights stay packed in memory and are dequantized as they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moebit.formats.native import PackedSpec, unpack_matrices
from moebit.model.experts import ExpertsLayout, ExpertWeights, dispatch, finish, intermediate, layout_of

EXPERTS_IMPLEMENTATION = "moebit"


class PackedMatrices(nn.Module):
    """A stack of packed matrices: buffers `codes`, `scale`, `zero_point`, `bits` as in the file."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: PackedSpec) -> None:
        super().__init__()
        self.spec = spec
        self._code_offsets, self._zero_offsets = spec.code_offsets(), spec.zero_offsets()
        for name, tensor in spec.specs("").items():
            self.register_buffer(name.removeprefix("."), torch.empty(tensor.shape, dtype=tensor.dtype))

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[stop - start, out, in] weights."""
        codes = self.codes[self._code_offsets[start] : self._code_offsets[stop]]
        zeros = None if self.spec.symmetric else self.zero_point[self._zero_offsets[start] : self._zero_offsets[stop]]
        return unpack_matrices(codes, self.scale[start:stop], zeros, list(self.spec.bits[start:stop]), self.spec.shape, dtype)


class PackedLinear(nn.Module):
    """A linear layer over a packed weight."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: nn.Parameter | None

    def __init__(self, spec: PackedSpec, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.out_features, self.in_features = spec.shape
        for name, tensor in spec.specs("").items():
            self.register_buffer(name.removeprefix("."), torch.empty(tensor.shape, dtype=tensor.dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.shape[0], dtype=dtype), requires_grad=False) if bias else None)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """[out, in] weights."""
        zeros = None if self.spec.symmetric else self.zero_point
        return unpack_matrices(self.codes.flatten(), self.scale.unsqueeze(0), zeros, list(self.spec.bits), self.spec.shape, dtype)[0]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at every access: some architectures read a linear's weight instead of calling it."""
        return self.unpacked(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec.bits[0]} bits, group {self.spec.group_size}"


def pack_experts(module: Any, path: str, specs: dict[str, PackedSpec]) -> None:
    """Replace the weights of an experts module by packed stacks, in place; its gating and its biases stay its own."""
    module.moebit_layout = layout_of(module, path)
    for leaf in (module.moebit_layout.first, "down_proj"):
        delattr(module, leaf)
    for projection, spec in specs.items():
        module.add_module(projection, PackedMatrices(spec))
    module._is_hf_initialized = True  # transformers would look for the weights that are gone, to initialise them


@torch.no_grad()
def packed_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output [T, H], one used expert's weights dequantized at a time. Packed weights have no gradient.

    Experts that a recipe left in full precision take the same way with the weights they have.
    """
    layout: ExpertsLayout = getattr(module, "moebit_layout", None) or layout_of(module, type(module).__name__)
    weights_of = _dequantized if hasattr(module, "moebit_layout") else _as_they_are
    slots = dispatch(top_k_index, top_k_weights, layout.experts)
    output = hidden_states.new_zeros(hidden_states.shape, dtype=torch.float32)
    used = [e for e in range(layout.experts) if slots.bounds[e] < slots.bounds[e + 1]]
    for e in used:  # one at a time: what is dequantized at once is what is resident
        own = slots.chunk(e, e + 1)
        weights = weights_of(module, layout, e, hidden_states.dtype)
        h = intermediate(module, hidden_states[own.tokens], weights, own.bounds)
        output.index_add_(0, own.tokens, finish(module, h, own.affinity, weights, own.bounds).float())
    return output.to(hidden_states.dtype)


def _as_they_are(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> ExpertWeights:
    first, down = (layout.stacked(getattr(module, leaf)[e : e + 1]).to(dtype) for leaf in (layout.first, "down_proj"))
    return ExpertWeights(first, down, *_biases(module, layout, e))


def _biases(module: Any, layout: ExpertsLayout, e: int) -> tuple[Tensor | None, Tensor | None]:
    if not layout.bias:
        return None, None
    return getattr(module, f"{layout.first}_bias")[e : e + 1], module.down_proj_bias[e : e + 1]


def _dequantized(module: Any, layout: ExpertsLayout, e: int, dtype: torch.dtype) -> ExpertWeights:
    down = module.down_proj.unpacked(e, e + 1, dtype)
    if layout.gated:
        first = down.new_empty(1, 2 * layout.intermediate, layout.hidden)
        for projection in ("gate_proj", "up_proj"):
            first[:, layout.rows(projection)] = getattr(module, projection).unpacked(e, e + 1, dtype)
    else:
        first = module.up_proj.unpacked(e, e + 1, dtype)
    return ExpertWeights(first, down, *_biases(module, layout, e))


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, packed_experts_forward)
