"""Channels of a native output that were rounded anew for other data: they stand in for the base's, whose bytes stay as they are.

An adapted output has overlay.safetensors beside its shards, named by the index, and in config.json, with each experts module that has
some, `"overlay": {PROJECTION: {"channels": n, "bits": [...] or 16}}`. A channel is a row of gate_proj and up_proj and a column of
down_proj; the base's row or column counts as zero. Specified in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebit.formats.native import PackedSpec, unpack_matrices
from moebit.storage.files import TensorEntry, TensorSpec

OVERLAY_FILE = "overlay.safetensors"
FULL = 16  # "bits" of channels that keep their full-precision values


@dataclass(frozen=True)
class OverlaySpec:
    """The channels of one projection as they are stored.

    Attributes:
        channels: how many. hidden: length of each.
        packed: a stack of [1, hidden] matrices, one per channel; None for full precision, then in `dtype`.
    """

    channels: int
    hidden: int
    packed: PackedSpec | None
    dtype: torch.dtype

    def specs(self, name: str) -> dict[str, TensorSpec]:
        """The stored tensors; `name` is EXPERTS.overlay.PROJECTION."""
        where = {f"{name}.{leaf}": TensorSpec(torch.int32, (self.channels,)) for leaf in ("expert", "channel")}
        if self.packed is None:
            return {**where, f"{name}.values": TensorSpec(self.dtype, (self.channels, self.hidden))}
        return {**where, **self.packed.specs(name)}

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(spec.nbytes for spec in self.specs("").values())


@dataclass(frozen=True)
class Overlay:
    """The channels of one projection: expert, channel int32 [n], rising; values [n, H]."""

    expert: Tensor
    channel: Tensor
    values: Tensor

    def put(self, projection: str, start: int, w_COI: Tensor) -> None:
        """Put the channels of experts [start, start + C) into their weights, in place."""
        own = ((self.expert >= start) & (self.expert < start + len(w_COI))).nonzero()[:, 0]
        e, c = self.expert[own].long() - start, self.channel[own].long()
        target = w_COI.transpose(1, 2) if projection == "down_proj" else w_COI
        target[e, c] = self.values[own].to(w_COI.dtype)


def overlay_specs(config: Mapping[str, Any]) -> dict[str, dict[str, OverlaySpec]]:
    """Experts module -> projection -> its channels, from `quantization_config`; modules without any are not there."""
    result: dict[str, dict[str, OverlaySpec]] = {}
    for name, entry in config["modules"].items():
        for projection, part in entry.get("overlay", {}).items():
            shape = entry["projections"][projection]["shape"]
            hidden, count, dtype = (
                shape[0] if projection == "down_proj" else shape[1],
                part["channels"],
                getattr(torch, entry["scale_dtype"]),
            )
            full = part["bits"] == FULL
            packed = None if full else PackedSpec(tuple(part["bits"]), (1, hidden), entry["group_size"], entry["symmetric"], dtype, True)
            if packed is not None and len(packed.bits) != count:
                raise ValueError(f"{name}: {len(packed.bits)} widths for {count} channels of {projection}")
            result.setdefault(name, {})[projection] = OverlaySpec(count, hidden, packed, dtype)
    return result


def read_overlays(specs: Mapping[str, Mapping[str, OverlaySpec]], entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, Overlay]]:
    """The channels with their values, dequantized."""
    result: dict[str, dict[str, Overlay]] = {}
    for name, parts in specs.items():
        for projection, spec in parts.items():
            stored = f"{name}.overlay.{projection}"
            result.setdefault(name, {})[projection] = Overlay(
                entries[f"{stored}.expert"].read(), entries[f"{stored}.channel"].read(), _values(stored, spec, entries)
            )
    return result


def _values(stored: str, spec: OverlaySpec, entries: Mapping[str, TensorEntry]) -> Tensor:
    if spec.packed is None:
        return entries[f"{stored}.values"].read()
    zeros = None if spec.packed.symmetric else entries[f"{stored}.zero_point"].read()
    codes, scale = entries[f"{stored}.codes"].read(), entries[f"{stored}.scale"].read()
    return unpack_matrices(codes, scale, zeros, list(spec.packed.bits), spec.packed.shape)[:, 0]
