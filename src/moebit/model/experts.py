"""Routed experts as stacked tensors, whatever their storage, and their forward over routed tokens.

Shape suffixes: E experts, C experts of a chunk, H hidden, I intermediate, T tokens, k experts per token, S = T*k routed slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.storage.weights import Weights

SLOTS = 16384  # routed slots that go through the experts at a time, unless a budget says less
LARGEST_BLOCK, OVERLAPPED_BLOCK, SMALLEST_BLOCK = 512, 256, 32  # rows of one product (`row_blocks`)


@dataclass(frozen=True)
class ExpertsLayout:
    """How one experts module stores what it stores (the flags of transformers' experts interface).

    Attributes:
        experts, hidden, intermediate: E, H, I.
        gated: gate and up projections in one parameter `gate_up_proj`; else a lone `up_proj`.
        interleaved: gate and up rows alternate instead of standing one after the other.
        transposed: stored [E, in, out].
        bias: per-expert biases.
    """

    experts: int
    hidden: int
    intermediate: int
    gated: bool
    interleaved: bool
    transposed: bool
    bias: bool

    @property
    def first(self) -> str:
        """Name of the first projection's parameter."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    def features(self, projection: str) -> tuple[int, int]:
        """(out, in) features of one expert's projection."""
        return (self.hidden, self.intermediate) if projection == "down_proj" else (self.intermediate, self.hidden)

    def rows(self, projection: str) -> slice:
        """Where a projection's rows stand in the first parameter's [E, out, in] form."""
        if not self.gated:
            return slice(None)
        offset = 0 if projection == "gate_proj" else 1
        if self.interleaved:
            return slice(offset, None, 2)
        return slice(offset * self.intermediate, (offset + 1) * self.intermediate)

    def stacked(self, stored: Tensor) -> Tensor:
        """[C, out, in] view of a stored weight."""
        return stored.transpose(1, 2) if self.transposed else stored

    @property
    def input_axis(self) -> int:
        """Where the input channels lie in the parameters as they are stored, from the end."""
        return -2 if self.transposed else -1

    @property
    def output_axis(self) -> int:
        """Where the output channels lie in the parameters as they are stored, from the end."""
        return -1 if self.transposed else -2

    @property
    def slot_bytes(self) -> int:
        """Memory of one routed slot on its way through an expert, at most: input, weighted input, gate and up, down's input, output."""
        return 4 * (4 * self.hidden + 5 * self.intermediate)

    @property
    def parameters_per_expert(self) -> int:
        return len(self.projections) * self.hidden * self.intermediate


def layout_of(module: nn.Module, path: str) -> ExpertsLayout:
    """The layout of an experts module.

    Raises:
        BadInputError: parameters that don't have the interface's names or shapes.
    """
    gated = bool(module.has_gate)
    first = getattr(module, "gate_up_proj" if gated else "up_proj", None)
    down = getattr(module, "down_proj", None)
    if not isinstance(first, Tensor) or not isinstance(down, Tensor) or first.ndim != 3 or down.ndim != 3:
        raise BadInputError(
            f"{path}: the experts of {type(module).__name__} are not stacked as transformers' interface has them; "
            "moebit does not understand this layer"
        )
    transposed = bool(module.is_transposed)
    experts, hidden, intermediate = down.shape if not transposed else (down.shape[0], down.shape[2], down.shape[1])
    expected = (experts, intermediate * (2 if gated else 1), hidden)
    actual = tuple(first.shape) if not transposed else (first.shape[0], first.shape[2], first.shape[1])
    if actual != expected:
        raise BadInputError(
            f"{path}: first projection is {actual}, expected {expected} from down_proj; moebit does not understand this layer"
        )
    return ExpertsLayout(
        experts, hidden, intermediate, gated, not bool(module.is_concatenated) and gated, transposed, bool(module.has_bias)
    )


@dataclass(frozen=True)
class ExpertWeights:
    """A chunk of experts, unpacked for computing.

    Attributes:
        first: [C, 2I or I, H], rows in the module's own order.
        down: [C, H, I].
        first_bias, down_bias: [C, 2I or I], [C, H] or None.
        begin: number of the first of them among all experts of the module.
    """

    first: Tensor
    down: Tensor
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None
    begin: int = 0

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """These experts in another type; tensors that have it already are not copied."""
        first_bias = None if self.first_bias is None else self.first_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return ExpertWeights(self.first.to(dtype), self.down.to(dtype), first_bias, down_bias, self.begin)

    def experts(self, start: int, stop: int) -> ExpertWeights:
        """Experts [start, stop) of these, as views."""
        first_bias = None if self.first_bias is None else self.first_bias[start:stop]
        down_bias = None if self.down_bias is None else self.down_bias[start:stop]
        return ExpertWeights(self.first[start:stop], self.down[start:stop], first_bias, down_bias, self.begin + start)


@dataclass(frozen=True)
class RoutedTokens:
    """Everything that calibrating an MoE layer needs, captured once.

    Attributes:
        x: [T, H] inputs of the MoE block.
        ids: int64 [T, k] selected experts.
        weights: [T, k] affinities: the weights with which the experts' outputs are added up.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor

    def counts(self, experts: int) -> Tensor:
        """int64 [E] tokens per expert."""
        return torch.bincount(self.ids.flatten(), minlength=experts)


@dataclass(frozen=True)
class Slots:
    """Routed slots sorted by expert: expert e owns positions [bounds[e], bounds[e + 1]).

    Attributes:
        tokens: int64 [S] token of every slot; affinity: [S]; bounds: E + 1 positions.
        place: where these slots lie among those they were cut from.
    """

    tokens: Tensor
    affinity: Tensor
    bounds: list[int]
    place: slice

    def chunk(self, start: int, stop: int) -> Slots:
        """The slots of experts [start, stop), which count from 0 there."""
        low, high = self.bounds[start], self.bounds[stop]
        return Slots(self.tokens[low:high], self.affinity[low:high], [b - low for b in self.bounds[start : stop + 1]], slice(low, high))

    def pieces(self, start: int, stop: int, limit: int) -> Iterator[Slots]:
        """The slots of experts [start, stop), at most `limit` at a time: a busy expert is cut, too. `place` counts in the chunk."""
        chunk = self.chunk(start, stop)
        for low in range(0, len(chunk.tokens), limit):
            high = min(low + limit, len(chunk.tokens))
            bounds = [min(max(b, low), high) - low for b in chunk.bounds]
            yield Slots(chunk.tokens[low:high], chunk.affinity[low:high], bounds, slice(low, high))


def dispatch(ids_Tk: Tensor, weights_Tk: Tensor, experts: int) -> Slots:
    """Sort the routed slots by expert, tokens in order within each. Ids outside [0, E) (unused slots) are left out."""
    flat = ids_Tk.flatten()
    order = flat.argsort(stable=True)
    sorted_ids = flat[order]
    bounds = torch.searchsorted(sorted_ids, torch.arange(experts + 1, device=flat.device)).tolist()
    order = order[: bounds[-1]]
    return Slots(order // ids_Tk.shape[1], weights_Tk.flatten()[order], bounds, slice(0, len(order)))


def grouped_linear(x_SI: Tensor, w_COI: Tensor, bias_CO: Tensor | None, bounds: list[int]) -> Tensor:
    """[S, O]: rows [bounds[c], bounds[c+1]) times matrix c.

    The groups are ragged, so on the CPU these are products of a group's rows, some at a time; CUDA has a grouped kernel.
    """
    if x_SI.is_cuda and x_SI.dtype == torch.bfloat16 and w_COI.shape[1] % 8 == 0 and w_COI.shape[2] % 8 == 0:
        offsets = torch.tensor(bounds[1:], dtype=torch.int32, device=x_SI.device)
        y = torch.nn.functional.grouped_mm(x_SI, w_COI.transpose(1, 2), offs=offsets)
        return y if bias_CO is None else y + bias_CO.repeat_interleave(_lengths(bounds, x_SI.device), 0)
    y = x_SI.new_empty(x_SI.shape[0], w_COI.shape[1])
    for c, (low, high) in enumerate(pairwise(bounds)):
        for start, stop in row_blocks(low, high):
            torch.mm(x_SI[start:stop], w_COI[c].T, out=y[start:stop])
        if bias_CO is not None:
            y[low:high] += bias_CO[c]
    return y


def row_blocks(low: int, high: int) -> Iterator[tuple[int, int]]:
    """Cut rows [low, high) into blocks of few different sizes: the last may begin inside the one before it.

    oneDNN compiles a kernel for every shape it has not seen, which for ragged groups takes longer than the products themselves, and blocks
    of this size are also the fastest.
    """
    start, size = low, LARGEST_BLOCK
    while start < high:
        if high - start >= size:
            yield start, start + size
            start += size
        elif size > SMALLEST_BLOCK and not (size == OVERLAPPED_BLOCK and high - low >= size):
            size //= 2
        else:
            yield max(low, high - size), high
            return


def _lengths(bounds: list[int], device: torch.device) -> Tensor:
    return torch.tensor(bounds, device=device).diff()


def intermediate(module: Any, x_SH: Tensor, weights: ExpertWeights, bounds: list[int]) -> Tensor:
    """[S, I]: what enters the down projection, with the architecture's own gating.

    Where the module's inputs are rounded or transformed (`model/inputs.py`), they are here; what comes out is neither yet.
    """
    steps = getattr(module, "moebit_inputs", None)
    if steps is not None:
        x_SH = steps.first(x_SH)
    out = grouped_linear(x_SH, weights.first, weights.first_bias, bounds)
    h: Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    return h


def gating_slopes(module: Any, out_SO: Tensor) -> tuple[Tensor, Tensor]:
    """(h [S, I], its slope [S, 2I or I] in every output of the first projections), by differentiating the architecture's own gating.

    Gating works channel by channel, so that one derivative of the sum gives all of them.
    """
    with torch.enable_grad():
        out = out_SO.detach().requires_grad_()
        h = module._apply_gate(out) if module.has_gate else module.act_fn(out)
        (slope,) = torch.autograd.grad(h.sum(), out)
    return h.detach(), slope


def finish(module: Any, h_SI: Tensor, affinity_S: Tensor, weights: ExpertWeights, bounds: list[int]) -> Tensor:
    """[S, H] float32: the experts' outputs from the inputs of down, scaled by the affinities."""
    steps = getattr(module, "moebit_inputs", None)
    if steps is not None:
        h_SI = steps.down(h_SI, bounds, weights.begin)
    y = grouped_linear(h_SI, weights.down, weights.down_bias, bounds)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    return y.float().mul_(affinity_S.unsqueeze(1))


def experts_names(name: str, layout: ExpertsLayout) -> list[str]:
    """The parameters of the experts module called `name`."""
    leaves = [layout.first, "down_proj"]
    return [f"{name}.{leaf}" for leaf in leaves + ([f"{layout.first}_bias", "down_proj_bias"] if layout.bias else [])]


def read_experts(
    weights: Weights, name: str, layout: ExpertsLayout, start: int, stop: int, dtype: torch.dtype = torch.float32
) -> ExpertWeights:
    """Experts [start, stop) of the module called `name`, in `dtype`."""
    first, down, *biases = (weights.expert_rows(full, start, stop).to(dtype) for full in experts_names(name, layout))
    first_bias, down_bias = biases or (None, None)
    return ExpertWeights(layout.stacked(first), layout.stacked(down), first_bias, down_bias, start)


@torch.no_grad()
def add_outputs(module: nn.Module, x_TH: Tensor, weights: ExpertWeights, slots: Slots, outputs_TH: Tensor) -> None:
    """Add what some experts contribute to every token's output; `slots` are theirs, or a piece of them."""
    h = intermediate(module, x_TH[slots.tokens], weights, slots.bounds)
    y = finish(module, h, slots.affinity, weights, slots.bounds)
    outputs_TH.index_add_(0, slots.tokens, y.to(outputs_TH.dtype))
