"""The side file of an output, switch.safetensors: how its experts were used on the data sets it was made for, and switchable channels.

Specified in docs/format.md. No loader reads it; `moebit drift` and `moebit adapt` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.model.experts import ExpertsLayout, read_experts
from moebit.storage.files import Shard, TensorEntry, TensorSpec, read_header
from moebit.storage.weights import Weights

SIDE_FILE = "switch.safetensors"


@dataclass(frozen=True)
class Usage:
    """How a layer's experts were used: tokens int64 [D, E], significance float32 [D, E] (S_exp of MoQa, Eq. 1)."""

    tokens: Tensor
    significance: Tensor


@dataclass(frozen=True)
class Channels:
    """Switchable channels of one experts module, rising.

    Attributes:
        expert, channel: int32 [n].
    """

    expert: Tensor
    channel: Tensor


@dataclass(frozen=True)
class Kept:
    """Switchable channels with their full-precision values.

    Attributes:
        vectors: projection -> [n, H]: rows of gate and up, columns of down.
    """

    channels: Channels
    vectors: Mapping[str, Tensor]


def write_side_file(
    shard: Shard,
    weights: Weights,
    layouts: Mapping[str, ExpertsLayout],
    usage: Mapping[str, Usage],
    channels: Mapping[str, Channels],
    chunk: Mapping[str, int],
) -> None:
    """Fill a file made with `side_specs`; the vectors are read from the checkpoint, a chunk of experts at a time."""
    for name, used in usage.items():
        shard.write(f"{name}.usage.tokens", used.tokens)
        shard.write(f"{name}.usage.significance", used.significance)
    for name, chosen in channels.items():
        layout = layouts[name]
        dtype = weights.spec(f"{name}.{layout.first}").dtype
        shard.write(f"{name}.switch.expert", chosen.expert)
        shard.write(f"{name}.switch.channel", chosen.channel)
        row = layout.hidden * dtype.itemsize
        for start in range(0, layout.experts, chunk[name]):
            stop = min(start + chunk[name], layout.experts)
            own = ((chosen.expert >= start) & (chosen.expert < stop)).nonzero()[:, 0]
            if not len(own):
                continue
            read = read_experts(weights, name, layout, start, stop, dtype)
            e, c = ((chosen.expert[own].long() - start).to(read.down.device), chosen.channel[own].long().to(read.down.device))
            for projection in layout.projections:
                w = read.down.transpose(1, 2) if projection == "down_proj" else read.first[:, layout.rows(projection)]
                shard.write(f"{name}.switch.{_leaf(projection)}", w[e, c].contiguous(), skip=int(own[0]) * row)


def side_specs(
    weights: Weights, layouts: Mapping[str, ExpertsLayout], usage: Mapping[str, Usage], channels: Mapping[str, Channels]
) -> dict[str, TensorSpec]:
    """The tensors of the side file."""
    specs: dict[str, TensorSpec] = {}
    for name, used in usage.items():
        specs[f"{name}.usage.tokens"] = TensorSpec(torch.int64, tuple(used.tokens.shape))
        specs[f"{name}.usage.significance"] = TensorSpec(torch.float32, tuple(used.significance.shape))
    for name, chosen in channels.items():
        layout, count = layouts[name], len(chosen.expert)
        specs |= {f"{name}.switch.{leaf}": TensorSpec(torch.int32, (count,)) for leaf in ("expert", "channel")}
        dtype = weights.spec(f"{name}.{layout.first}").dtype
        specs |= {f"{name}.switch.{_leaf(p)}": TensorSpec(dtype, (count, layout.hidden)) for p in layout.projections}
    return specs


def _leaf(projection: str) -> str:
    return projection.removesuffix("_proj")


def read_usage(out: Path) -> dict[str, Usage]:
    """How the experts of an output were used on the sets it was made for, by experts module.

    Raises:
        BadInputError: an output that does not say.
    """
    entries = _entries(out)
    ending = ".usage.tokens"
    names = [name.removesuffix(ending) for name in entries if name.endswith(ending)]
    return {n: Usage(entries[f"{n}{ending}"].read(), entries[f"{n}.usage.significance"].read()) for n in names}


def read_kept(out: Path) -> dict[str, Kept]:
    """The switchable channels of an output, by experts module; none where it was made without."""
    entries, ending = _entries(out), ".switch.expert"
    result = {}
    for name in (name.removesuffix(ending) for name in entries if name.endswith(ending)):
        chosen = Channels(entries[f"{name}{ending}"].read(), entries[f"{name}.switch.channel"].read())
        leaves = {p: f"{name}.switch.{_leaf(p)}" for p in ("gate_proj", "up_proj", "down_proj")}
        result[name] = Kept(chosen, {p: entries[leaf].read() for p, leaf in leaves.items() if leaf in entries})
    return result


def _entries(out: Path) -> dict[str, TensorEntry]:
    if not (out / SIDE_FILE).is_file():
        raise BadInputError(
            f"{out}: no {SIDE_FILE}, so nothing is known of the data it was made for; "
            "quantize with a recipe that has allocation or switching, or with --profile"
        )
    return read_header(out / SIDE_FILE)
