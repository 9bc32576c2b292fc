"""What the compressed-tensors package writes: packed integers, int8 and float8 matrices, by groups that config.json names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import FLOAT8, PACKED_WIDTHS, WORD, Decode, floats, unpack
from moebit.storage.shipped.entries import (
    Grid,
    Shipped,
    ShippedEntry,
    UnreadableError,
    activation_parts,
    gathered,
    grid_of,
    missing,
    plain_entry,
    short,
    wrong_shape,
)

READABLE_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME.weight_packed (int32 words) or NAME.weight (int8, float8) with NAME.weight_scale and perhaps .weight_zero_point."""
    groups = _groups(quantization)
    made = []
    for stored_name, codes in stored.items():
        name, _, leaf = stored_name.rpartition(".")
        packed = leaf == "weight_packed"
        if not packed and leaf != "weight":
            continue
        scale = stored.get(f"{name}.weight_scale")
        if not packed and codes.dtype not in (torch.int8, *FLOAT8):
            if scale is not None:
                raise BadInputError(
                    f"tensor {stored_name!r} is {short(codes.dtype)} and has scales in {scale.name!r}: it is not compressed; "
                    "give the full-precision checkpoint"
                )
            continue
        if scale is None:
            raise missing(codes, f"{name}.weight_scale")
        if f"{name}.weight_g_idx" in stored:
            raise BadInputError(
                f"{name}: its groups are scattered (weight_g_idx), which moebit does not read; give the full-precision checkpoint"
            )
        made.append(_compressed(name, codes, scale, stored, _group_of(name, groups), packed))
    described = dict.fromkeys(group.words() for group in groups)
    return gathered("compressed-tensors", " and ".join(described), stored, made)


@dataclass(frozen=True)
class _Group:
    """One of `config_groups`: a grid of weights and the names it is for."""

    targets: tuple[str, ...]
    bits: int
    kind: str
    strategy: str
    group_size: int
    symmetric: bool
    structure: tuple[int, int]

    def block(self, out: int, inputs: int) -> tuple[int, int]:
        return {"tensor": (out, inputs), "channel": (1, inputs), "group": (1, self.group_size), "block": self.structure}[self.strategy]

    def words(self) -> str:
        where = {
            "tensor": "per tensor",
            "channel": "per channel",
            "group": f"groups of {self.group_size}",
            "block": f"blocks of {self.structure[0]}x{self.structure[1]}",
        }[self.strategy]
        return f"{'fp' if self.kind == 'float' else 'int'}{self.bits} {where}"


def _groups(quantization: Mapping[str, Any]) -> list[_Group]:
    declared = quantization.get("config_groups")
    if not isinstance(declared, Mapping) or not all(isinstance(group, Mapping) for group in declared.values()):
        raise UnreadableError("config_groups, which says how, is missing from its quantization_config")
    if quantization.get("transform_config"):
        raise UnreadableError("its weights are rotated (transform_config)")
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UnreadableError(f"its weights are stored sparse ({quantization['sparsity_config']['format']})")
    result = []
    for group in declared.values():
        if not group.get("weights"):
            continue
        kind = group.get("format") or quantization.get("format")
        if kind not in READABLE_FORMATS:
            raise UnreadableError(f"moebit reads the formats {', '.join(READABLE_FORMATS)}, this is {kind}")
        result.append(_group(group, kind))
    return result


def _group(group: Mapping[str, Any], stored_as: str) -> _Group:
    args = group["weights"]
    bits, kind, size = args.get("num_bits", 8), args.get("type", "int"), args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    structure = args.get("block_structure") or (0, 0)
    if isinstance(structure, str):
        structure = [int(number) for number in structure.split("x")]
    readable = {
        "type": kind == "int" or (kind == "float" and bits == 8 and stored_as != "pack-quantized"),
        "num_bits": stored_as != "pack-quantized" or bits in PACKED_WIDTHS,
        "strategy": strategy in ("tensor", "channel", "block") or (strategy == "group" and type(size) is int and size > 0),
        "block_structure": strategy != "block" or (len(structure) == 2 and min(structure) > 0),
    }
    wrong = [key for key, fine in readable.items() if not fine]
    if wrong:
        raise UnreadableError(f"moebit does not read {stored_as} weights with {wrong[0]} {args.get(wrong[0])!r}")
    targets = tuple(map(str, group.get("targets") or ()))
    return _Group(targets, int(bits), kind, strategy, size or 0, bool(args.get("symmetric", True)), (structure[0], structure[1]))


def _group_of(name: str, groups: list[_Group]) -> _Group:
    """The group whose targets name a module; else one that is for a whole class of modules ("Linear"), which stored names don't tell."""

    def named(target: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

    exact = [group for group in groups if any(named(target) for target in group.targets)]
    general = [group for group in groups if any("." not in t and not t.startswith("re:") for t in group.targets)]
    if not exact and not general:
        raise BadInputError(
            f"{name} is stored quantized, but no target in config_groups of config.json is for it; config.json and weights do not belong "
            "together: copy config.json again"
        )
    return (exact or general)[0]


def _compressed(
    name: str, codes: TensorEntry, scale: TensorEntry, stored: Mapping[str, TensorEntry], group: _Group, packed: bool
) -> ShippedEntry:
    shape, shape_entry = codes.shape, stored.get(f"{name}.weight_shape")
    decode: Decode = floats
    if packed:
        if codes.dtype != torch.int32 or len(codes.shape) != 2:
            raise BadInputError(f"tensor {codes.name!r} is {short(codes.dtype)} {list(codes.shape)}; expected a matrix of int32 words")
        shape = (codes.shape[0], _packed_width(codes, scale, shape_entry, group))
        decode = partial(unpack, bits=group.bits, width=shape[1])
    elif len(codes.shape) != 2:
        raise BadInputError(
            f"tensor {codes.name!r} has shape {list(codes.shape)}; moebit reads quantized matrices in compressed-tensors form"
        )
    block = group.block(*shape)
    zero_entry = stored.get(f"{name}.weight_zero_point")
    if not group.symmetric and zero_entry is None:
        raise missing(codes, f"{name}.weight_zero_point")
    zero = None
    if zero_entry is not None and not group.symmetric:
        # With packed codes, zero points are packed too, down the column; but not the single one of a whole tensor.
        zero = _zero_points(zero_entry, shape, block, group.bits if packed and group.strategy in ("group", "channel") else None)
    further = (*((shape_entry,) if shape_entry else ()), *activation_parts(f"{name}.weight", stored))
    if zero_entry is not None and zero is None:
        further = (*further, zero_entry)
    return plain_entry(
        f"{name}.weight", codes, scale, block, shape, decode, zero, further, None if codes.dtype in FLOAT8 else 2.0**group.bits
    )


def _packed_width(codes: TensorEntry, scale: TensorEntry, shape: TensorEntry | None, group: _Group) -> int:
    """Input channels of packed codes: from the groups where they tell, else from the stored shape (read only then)."""

    def fits(width: int) -> bool:
        return codes.shape[1] == -(-width * group.bits // WORD)

    if group.strategy == "group" and len(scale.shape) == 2 and fits(scale.shape[1] * group.group_size):
        return scale.shape[1] * group.group_size
    if shape is None:
        return codes.shape[1] * WORD // group.bits
    width = int(shape.read()[-1]) if math.prod(shape.shape) == 2 else -1
    if not fits(width):
        raise BadInputError(
            f"tensor {codes.name!r} of shape {list(codes.shape)} cannot hold {group.bits}-bit rows of {width}, as {shape.name!r} says; "
            "download the checkpoint again"
        )
    return width


def _zero_points(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int], bits: int | None) -> Grid:
    if bits is None:
        return grid_of(entry, shape, block, floats)
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    wanted = (-(-rows * bits // WORD), columns)
    if entry.shape != wanted or entry.dtype != torch.int32:
        raise wrong_shape(entry, shape, block, wanted)

    def decode(words: Tensor) -> Tensor:
        per_word = WORD // bits
        columns_first = words.T.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of a single row
        return unpack(columns_first, bits=bits, width=len(words) * per_word).T.contiguous()

    return Grid(entry, (rows, columns), block, decode, per_row=WORD // bits)
