"""A whole model in memory that writes many rows of tokens side by side, with a cache whose rows can be re-ordered.

The rows of a beam change places at every step. Keys and values of full attention therefore lie in storage that is allocated once; only
rows that really move are copied, and what the next token adds is written behind the rest. All other kinds of cache (sliding windows,
linear attention, state-space models) are transformers' own, and follow in its way. Whether a model's cache follows is tried out
before any work, against a forward without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from moebit.errors import BadInputError
from moebit.model.experts import SLOTS, ExpertWeights, add_outputs, dispatch, experts_names
from moebit.model.seam import experts_handler
from moebit.model.skeleton import dematerialize, materialize, place_buffers
from moebit.model.structure import Structure
from moebit.storage.checkpoint import Checkpoint

TRIAL_TOKENS = 6
TRIAL_ORDER = (2, 0, 0, 3)  # one row in its place, one that moves on, one that becomes two, one that is dropped
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of the distance between rows
COARSE_TOLERANCE = 0.25  # bf16: a token near the edge between two experts may change sides
CACHE_MARGIN = 1.25  # what concatenating and re-ordering take for a moment
LOGIT_COPIES = 6  # logits, their logarithms, what is drawn from them


class RowLayer(DynamicLayer):
    """Keys and values of one full attention: [rows, heads, capacity, size], filled from the left.

    Attributes:
        keys, values: views of what is filled.
    """

    is_croppable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._stored: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        k, v = ((len(s), s.shape[1], self.capacity, s.shape[3]) for s in (key_states, value_states))
        self._stored = (key_states.new_empty(k), value_states.new_empty(v))
        self.keys, self.values = (stored[:, :, :0] for stored in self._stored)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the others; everything so far."""
        if self._stored is None:
            self.lazy_initialization(key_states, value_states)
        assert self._stored is not None
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for stored, new in zip(self._stored, (key_states, value_states), strict=True):
            stored[:, :, begin:end] = new
        self.keys, self.values = (stored[:, :, :end] for stored in self._stored)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was; rows that stay are not touched."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().flatten()
        if len(moved) and self.is_initialized:
            for states in (self.keys, self.values):
                states[moved] = states[beam_idx[moved]]


@dataclass
class Decoder:
    """A loaded model and the cache of the rows that it is writing.

    Attributes:
        capacity: tokens that a row may become long.
        experts: number of experts of every layer that has any, M of them.
    """

    checkpoint: Checkpoint
    structure: Structure
    capacity: int = 0
    cache: Any = None
    experts: list[int] = field(init=False)
    _row: dict[nn.Module, int] = field(init=False)
    _weights: list[ExpertWeights] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        sites = [(layer.name, layer.moe) for layer in self.structure.layers if layer.moe]
        self.experts = [moe.layout.experts for _, moe in sites]
        model = self.checkpoint.model
        self._row = {model.get_submodule(f"{name}.{moe.experts}"): number for number, (name, moe) in enumerate(sites)}

    @contextmanager
    def loaded(self) -> Iterator[Decoder]:
        """All weights in memory, freed afterwards."""
        model = self.checkpoint.model
        materialize(model, "", self.checkpoint.weights)
        place_buffers(model, self.checkpoint.weights.device)
        try:
            self._weights = [self._stacked(module) for module in self._row]
            yield self
        finally:
            self._weights, self.cache = [], None
            dematerialize(model)

    def _stacked(self, module: nn.Module) -> ExpertWeights:
        moe = self.structure.moe_layers[self._row[module]].moe
        assert moe is not None
        first, down, *biases = (module.get_parameter(name.rpartition(".")[2]) for name in experts_names("", moe.layout))
        first_bias, down_bias = biases or (None, None)
        return ExpertWeights(moe.layout.stacked(first), moe.layout.stacked(down), first_bias, down_bias)

    @property
    def weight_bytes(self) -> int:
        """What the model takes in memory; a table that is used twice counts twice."""
        model = self.checkpoint.model
        return weight_bytes(model)

    def start(self, capacity: int) -> None:
        """Forget all rows; the next ones may become `capacity` tokens long."""
        self.capacity, self.cache = capacity, None

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Add one token to every row.

        Returns:
            logits [B, V] of the next one (float32, or float64 where that is computed in), and the experts [B, k] that each of the
            M layers chose.
        """
        fresh = self.cache is None
        logits, self.cache, routed = self._forward(tokens_B.unsqueeze(1), self.cache, use_cache=True)
        if self.cache is None:
            raise BadInputError(f"{type(self.checkpoint.model).__name__} keeps no cache, so that it cannot be sampled from; give --text")
        if fresh:
            self._own_storage()
        return logits, routed

    def reorder(self, rows_B: Tensor) -> None:
        """Row b becomes what row `rows_B[b]` was."""
        self.cache.reorder_cache(rows_B)

    def _own_storage(self) -> None:
        for number, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized and layer.keys.numel():
                own = RowLayer(self.capacity)
                own.update(layer.keys, layer.values)
                self.cache.layers[number] = own

    def _forward(self, ids_BT: Tensor, cache: Any, use_cache: bool) -> tuple[Tensor, Any, list[Tensor]]:
        routed: list[Tensor | None] = [None] * len(self.experts)

        def answer(module: nn.Module, states: Tensor, ids: Tensor, affinity: Tensor) -> Tensor:
            number = self._row[module]
            routed[number] = ids
            outputs = torch.zeros(states.shape, dtype=torch.promote_types(states.dtype, torch.float32))
            for piece in dispatch(ids, affinity, self.experts[number]).pieces(0, self.experts[number], SLOTS):
                add_outputs(module, states, self._weights[number], piece, outputs)
            return outputs.to(states.dtype)

        with experts_handler(answer):
            output = self.checkpoint.model(input_ids=ids_BT, past_key_values=cache, use_cache=use_cache)
        chosen = [ids for ids in routed if ids is not None and len(ids) == ids_BT.numel()]
        if len(chosen) != len(routed):
            name = self.structure.moe_layers[next(i for i, ids in enumerate(routed) if ids is None or len(ids) != ids_BT.numel())].name
            raise BadInputError(f"{name}: not every token reaches its experts once, so that their use cannot be counted; give --text")
        logits = output.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float(), getattr(output, "past_key_values", None), chosen

    @torch.no_grad()
    def row_bytes(self, ids: Tensor, length: int, *, reorder: bool) -> int:
        """Try the cache out on a few rows, and say what one of `length` tokens takes.

        Args:
            ids: tokens to make rows of. reorder: whether rows will change places.

        Raises:
            BadInputError: with its cache, the model does not write what it writes without.
        """
        rows, total = len(TRIAL_ORDER), len(TRIAL_ORDER) * (TRIAL_TOKENS + 1)
        trial_BT = ids.repeat(total // len(ids) + 1)[:total].view(rows, -1)
        order = torch.tensor(TRIAL_ORDER) if reorder else torch.arange(rows)
        self.start(TRIAL_TOKENS + 1)
        try:
            for t in range(TRIAL_TOKENS):
                self.step(trial_BT[:, t])
                if t == 0:
                    begun = held_bytes(self.cache)
            grown = held_bytes(self.cache)
            if reorder:
                self.reorder(order)
            with_cache, _ = self.step(trial_BT[:, -1])
            without, _, _ = self._forward(torch.cat([trial_BT[order, :-1], trial_BT[:, -1:]], 1), None, use_cache=False)
        except BadInputError:
            raise
        except Exception as error:  # a model's own code fails with its cache in any way
            raise BadInputError(self._no_cache(reorder, f"{type(error).__name__}: {error}")) from error
        finally:
            cache, self.cache = type(self.cache).__name__, None
        self._compare(with_cache, without, order, cache, reorder)
        growth = (grown - begun) / (TRIAL_TOKENS - 1)
        held = (grown + growth * max(0, length - TRIAL_TOKENS)) / rows
        return int(CACHE_MARGIN * held) + LOGIT_COPIES * 4 * without.shape[1]

    def _compare(self, with_cache: Tensor, without: Tensor, order: Tensor, cache: str, reorder: bool) -> None:
        tolerance = TOLERANCE.get(self.checkpoint.model.dtype, COARSE_TOLERANCE)
        different = [(a, b) for a in range(len(order)) for b in range(a) if order[a] != order[b]]
        distance = torch.stack([(without[a] - without[b]).norm() for a, b in different]).mean()
        missed = (with_cache - without).norm(dim=1).max()
        if not missed <= tolerance * distance:
            raise BadInputError(
                self._no_cache(reorder, f"{cache}: logits are off by {float(missed / distance):.0%} of what tells rows apart")
            )

    def _no_cache(self, reorder: bool, why: str) -> str:
        name = type(self.checkpoint.model).__name__
        if reorder:
            return f"{name}: its cache does not follow when rows change places ({why}); --kind self needs no such thing, or give --text"
        return f"{name} does not write with a cache what it writes without ({why}); give --text"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers in the types of the skeleton; a tied table counts each time."""
    parameters = (p for m in model.modules() for p in m._parameters.values() if p is not None)
    buffers = (b for m in model.modules() for n, b in m._buffers.items() if b is not None and n not in m._non_persistent_buffers_set)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensors in (parameters, buffers) for tensor in tensors)


def held_bytes(thing: Any) -> int:
    """Bytes of the tensors that a cache shows (not of what it has set aside for later)."""
    if isinstance(thing, Tensor):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(held_bytes(value) for value in thing.values())
    if isinstance(thing, list | tuple):
        return sum(map(held_bytes, thing))
    if type(thing).__module__.startswith(("transformers.", "moebit.")):
        return sum(held_bytes(value) for name, value in vars(thing).items() if not name.startswith("_"))
    return 0
