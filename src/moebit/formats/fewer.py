"""A plain checkpoint with fewer experts: which stored tensors it has, and where the rows of each come from.

Routed experts stand in the checkpoint one by one, each under its number, or stacked. The kept ones get the first numbers, in their order.
What tells experts apart loses the same rows: the router's weight and bias, and correction biases beside it. Shared experts stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moebit.errors import BadInputError
from moebit.model.structure import LayerSites, MoESite
from moebit.storage.files import Entry, ShardFile, TensorSpec, pieces
from moebit.storage.weights import Weights

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # keys of config.json
GROUPS = ("n_group", "num_expert_group", "n_groups")  # of experts, among which the router chooses first
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


@dataclass(frozen=True)
class Piece:
    """One stored tensor of the output.

    Attributes:
        entry: where it comes from. kept: rows of its axis `axis` that stay; all of them where that is None.
    """

    entry: Entry
    kept: Sequence[int] | None = None
    axis: int = 0

    @property
    def spec(self) -> TensorSpec:
        """Type and shape in the output."""
        if self.kept is None:
            return self.entry.spec
        shape = list(self.entry.spec.shape)
        shape[self.axis] = len(self.kept)
        return replace(self.entry.spec, shape=tuple(shape))

    def write(self, shard: ShardFile, name: str) -> None:
        """Copy it, some rows at a time."""
        if self.kept is None:
            for start, piece in pieces(self.entry):
                shard.write(name, piece, skip=start)
        elif self.axis:
            shard.write(name, self.entry.read().index_select(self.axis, torch.tensor(self.kept)).contiguous())
        else:
            position = 0
            for row in self.kept:
                value = self.entry.read(row, row + 1).contiguous()
                shard.write(name, value, skip=position)
                position += value.nbytes


def layer_pieces(weights: Weights, sites: LayerSites, kept: Sequence[int]) -> dict[str, Piece]:
    """name -> what is stored there, of one decoder layer; all of it where the layer has no routed experts.

    Raises:
        BadInputError: experts or a router that are stored in a way that does not allow to take some out.
    """
    found: dict[str, Piece] = {}
    for parameter in sorted(name for name in weights.available() if name.startswith(f"{sites.name}.")):
        if sites.moe is not None and parameter.startswith(f"{sites.experts}."):
            found |= _expert_pieces(weights, parameter, sites.moe.layout.experts, kept)
        elif sites.moe is not None and _tells_experts_apart(weights, sites, sites.moe, parameter):
            found |= _router_pieces(weights, parameter, sites.moe.layout.experts, kept)
        else:
            found |= {stored: Piece(weights.entries[stored]) for stored in weights.stored_names(parameter)}
    return found


def _expert_pieces(weights: Weights, parameter: str, experts: int, kept: Sequence[int]) -> dict[str, Piece]:
    found: dict[str, Piece] = {}
    for names in weights.stored_by_pattern(parameter).values():
        if len(names) == experts:
            found |= {names[number]: Piece(weights.entries[names[expert]]) for number, expert in enumerate(kept)}
        elif len(names) == 1 and weights.entries[names[0]].spec.shape[:1] == (experts,):
            found[names[0]] = Piece(weights.entries[names[0]], kept)
        else:
            raise BadInputError(f"{parameter}: {len(names)} stored tensors for {experts} experts; moebit cannot take some of them out")
    return found


def _tells_experts_apart(weights: Weights, sites: LayerSites, moe: MoESite, parameter: str) -> bool:
    """Whether a parameter is the router's, or a bias of one number per expert beside the experts."""
    if moe.router is None:
        raise BadInputError(f"{sites.name}: no router is recognised, so that its rows cannot be taken out; moebit cannot prune this model")
    block, shape = f"{sites.name}.{moe.experts.rpartition('.')[0]}.", weights.spec(parameter).shape
    if parameter.startswith(f"{sites.name}.{moe.router}."):
        return moe.layout.experts in shape
    linears = [name for name in (*sites.kept, *moe.shared)]
    beside = parameter.startswith(block) and parameter.rpartition(".")[0].removeprefix(f"{sites.name}.") not in linears
    return beside and [size for size in shape if size != 1] == [moe.layout.experts]


def _router_pieces(weights: Weights, parameter: str, experts: int, kept: Sequence[int]) -> dict[str, Piece]:
    found = {}
    for stored in weights.stored_names(parameter):
        shape = weights.entries[stored].spec.shape
        axes = [axis for axis, size in enumerate(shape) if size == experts]
        if not axes:
            raise BadInputError(f"{stored}: shape {list(shape)} has no axis of {experts} experts; moebit cannot take some of them out")
        found[stored] = Piece(weights.entries[stored], kept, axes[0])
    return found


def groups_of(config: Mapping[str, Any]) -> int:
    """How many groups the router chooses among before it chooses experts; 1 where it does not."""
    return max([int(value) for key, value in _fields(config) if key in GROUPS and isinstance(value, int)], default=1)


def chosen_of(config: Mapping[str, Any]) -> int:
    """Experts per token."""
    return max([int(value) for key, value in _fields(config) if key in CHOSEN and isinstance(value, int)], default=1)


def with_experts(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """config.json with another number of routed experts.

    Raises:
        BadInputError: a configuration that does not say how many there are, or says it by layer.
    """
    known = [(key, value) for key, value in _fields(config) if key in COUNTS and value is not None]
    if not known or any(value != before for _, value in known):
        said = ", ".join(f"{key}: {value}" for key, value in known) or "nothing"
        raise BadInputError(
            f"config.json says {said} of the number of experts, and every layer has {before}; moebit cannot prune this model"
        )
    return _replaced(config, after)


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        else:
            yield key, value


def _replaced(config: Mapping[str, Any], after: int) -> dict[str, Any]:
    return {
        key: _replaced(value, after) if isinstance(value, Mapping) else after if key in COUNTS and value is not None else value
        for key, value in config.items()
    }
