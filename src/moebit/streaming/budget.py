"""How much of a model is in memory at a time, from shapes and the memory limit alone: never from the memory that happens to be free,
so that the same limit gives the same bytes.

The limit is for the whole process. What is left beside the interpreter with its libraries and one layer's part outside of the experts is
shared out between stored activations, a batch of tokens on its way through the layer, and a chunk of experts being solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moebit.model.experts import SLOTS, ExpertsLayout
from moebit.model.structure import LayerSites, Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.store import ActivationStore
from moebit.streaming.stream import BATCH_TOKENS

PROCESS_BYTES = 3 * 2**28  # python, torch, transformers and their thread pools, before any work
SOLVER_BYTES = 5 * 2**25  # rows of weights on their way through the solver
MIN_SLOTS = 64
# The largest temporary tensor of a forward, in float32, where the work can be cut finer: glibc gives allocations above 32 MiB back to
# the system at once, and filling fresh pages again takes longer than the work on them.
TEMPORARY_BYTES = 2**24
DRIFT_BYTES = 32  # of a pair of inputs: two sums of two parts, float32, and what is solved from them
CHANNEL_BYTES = 160  # of a token, for a channel of a recurrent mixer: a state of 16 numbers and a few copies


@dataclass(frozen=True)
class Budget:
    """Sizes of the pieces in which the work is done.

    Attributes:
        batch_tokens: tokens that run through a layer at a time. slots: routed slots that run through experts at a time.
        chunk: experts in memory at a time, by layer index.
        activation_allowance: bytes of a stored tensor of activations from which on it goes to a file.
        spill: whether the hidden states go to a file.
        limit: resident bytes from which on memory is handed back between two pieces of work.
        memory: what was asked for.
        peak_bytes: estimate of the process's peak.
    """

    batch_tokens: int
    slots: int
    chunk: dict[int, int]
    activation_allowance: int
    spill: bool
    limit: int
    memory: int
    peak_bytes: int

    def store(self, directory: Path, device: torch.device | None = None) -> ActivationStore:
        """Where activations live, with files in `directory`; those of a device stay there."""
        on_host = device is None or device.type == "cpu"
        return ActivationStore(directory if on_host else None, self.activation_allowance, self.limit)


def make_budget(
    checkpoint: Checkpoint,
    structure: Structure,
    memory: int,
    tokens: int,
    *,
    length: int = 1,
    solve: bool,
    hessians: bool,
    streams: int = 1,
    drift: bool = False,
    refine: int = 0,
) -> Budget:
    """Share `memory` bytes out.

    Args:
        tokens: that stream through the layers; 0 for none. length: of a window.
        solve: whether weights are solved, not only run. hessians: whether from second moments.
        streams: models that run side by side. drift: whether inputs are compared between them, everywhere in a layer.
        refine: bytes that learning takes for every weight whose rounding is learned, beside itself; 0 for none.
    """
    item = checkpoint.model.dtype.itemsize
    width = int(checkpoint.config.get_text_config().hidden_size)
    layer = max((_outside_experts(checkpoint.model.get_submodule(sites.name), sites) for sites in structure.layers), default=0) * item
    work = max(memory - PROCESS_BYTES, memory // 4)
    rest = max(work - layer, work // 4) // streams
    allowance = rest // 8
    stored = [
        tokens * width * size * streams for size in (item, item, item, 4)
    ]  # hidden states before and behind, experts' inputs and outputs
    stored += max(([tokens * size * item for size in _compared(sites, width)] for sites in structure.layers), key=sum) if drift else []
    if refine:  # what is still to come out, what comes out without experts in both models, and full precision's inputs
        stored += [tokens * width * size for size in ((4, item, item) if drift else (4, item, item, item))]
    activations = sum(min(size, allowance) for size in stored)
    per_token = max((_token_bytes(checkpoint, sites, width, item, length) for sites in structure.layers), default=1)
    batch = max(length, min(BATCH_TOKENS, rest // 4 // per_token, TEMPORARY_BYTES // (4 * width)))
    layouts = {sites.index: sites.moe.layout for sites in structure.layers if sites.moe}
    per_slot = max((layout.slot_bytes for layout in layouts.values()), default=1)
    widest = max((4 * max(layout.hidden, 2 * layout.intermediate) for layout in layouts.values()), default=1)
    slots = max(MIN_SLOTS, min(SLOTS, rest // 8 // per_slot, TEMPORARY_BYTES // widest))
    room = max(rest // 2 - (SOLVER_BYTES if solve else 0), rest // 8)
    kinds = {"solve": solve, "hessians": hessians, "drift": drift}
    each = {index: expert_bytes(layout, item, **kinds, refine=refine) for index, layout in layouts.items()}
    chunk = {index: max(1, min(layout.experts, room // each[index])) for index, layout in layouts.items()}
    experts = max((chunk[index] * each[index] for index in chunk), default=0) + (slots * per_slot if tokens else 0)
    linears = max((_linear_bytes(checkpoint.model, sites, item, hessians, drift) for sites in structure.layers), default=0) if solve else 0
    if refine:
        learned = max((_outside_experts(checkpoint.model.get_submodule(sites.name), sites) for sites in structure.layers), default=0)
        linears = max(linears, learned * (2 * item + 1 + refine) + batch * per_token)
    busiest = max(experts + (SOLVER_BYTES if solve else 0), linears + (SOLVER_BYTES if solve else 0), batch * per_token if tokens else 0)
    peak = PROCESS_BYTES + (layer if tokens else 0) + activations + busiest
    return Budget(batch, slots, chunk, allowance, stored[0] > allowance, memory * 6 // 10, memory, peak)


def expert_bytes(layout: ExpertsLayout, item: int, *, solve: bool, hessians: bool, drift: bool = False, refine: int = 0) -> int:
    """Memory that one expert takes while it is read and, perhaps, solved."""
    weights = layout.parameters_per_expert
    reading = weights * (2 * 4 + item)  # as stored (at most four bytes), stacked, and in the type that is computed in
    if not solve:
        return reading
    solving = weights * (4 + 2 * item + 1)  # as stored, as computed with before and after, codes
    if hessians:
        solving += max(8 * layout.hidden**2, 12 * layout.intermediate**2)  # with their factors, and what down's are drawn towards
    if drift:
        solving += DRIFT_BYTES * max(layout.hidden, layout.intermediate) ** 2 + 16 * weights
    if refine:
        solving = max(solving, weights * (2 * item + 1 + refine))
    return max(reading, solving)


def _outside_experts(layer: nn.Module, sites: LayerSites) -> int:
    """Parameters of a decoder layer apart from its experts'."""
    experts = {id(p) for p in layer.get_submodule(sites.moe.experts).parameters(recurse=False)} if sites.moe else set()
    return sum(p.numel() for p in layer.parameters() if id(p) not in experts)


def _token_bytes(checkpoint: Checkpoint, sites: LayerSites, width: int, item: int, length: int) -> int:
    """Memory of a token on its way through a layer, cautiously: every linear's output twice, and a dozen states.

    Where attention writes its scores out, a few copies of a row of them per head; where there is a convolution (state-space models,
    linear attention), what such layers keep in float32 for every channel of it.
    """
    layer, config = checkpoint.model.get_submodule(sites.name), checkpoint.model.config.get_text_config()
    outputs = sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
    scores = 0
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        scores = 3 * max(4, item) * length * int(getattr(config, "num_attention_heads", 1) or 1)
    channels = sum(module.out_channels for module in layer.modules() if isinstance(module, nn.Conv1d))
    return item * (2 * outputs + 12 * width) + scores + CHANNEL_BYTES * channels


def _compared(sites: LayerSites, width: int) -> list[int]:
    """Channels of all inputs that are kept of the full-precision stream."""
    return [group.in_features for group in sites.groups if not group.moe_input] + [width] * (sites.moe is not None)


def _linear_bytes(model: nn.Module, sites: LayerSites, item: int, hessians: bool, drift: bool) -> int:
    """Memory that the largest group of linears takes which is solved together."""
    largest = 0
    for group in sites.groups:
        modules: list[Any] = [model.get_submodule(f"{sites.name}.{name}") for name in group.names]
        weights = sum(module.in_features * module.out_features for module in modules)
        compared = DRIFT_BYTES * group.in_features**2 + 16 * weights if drift else 0
        largest = max(largest, weights * (2 * 4 + item + 1) + (8 * group.in_features**2 if hessians else 0) + compared)
    return largest
