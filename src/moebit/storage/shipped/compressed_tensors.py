"""What the compressed-tensors package writes: packed integers and small floats, int8 and float8 matrices, by groups in config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import E2M1, E2M3, FLOAT8, WORD, Decode, e2m1_rows, e2m3_rows, floats, unpack, unpack_apart
from moebit.storage.shipped.entries import Shipped, UnreadableError, gathered, missing, short, unfit, wrong_shape
from moebit.storage.shipped.grids import (
    Grid,
    Order,
    RowsEntry,
    activation_parts,
    grid_of,
    plain_entry,
    shared_of,
)

PLAIN_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
FLOAT_CODES = {"nvfp4-pack-quantized": 4, "mxfp4-pack-quantized": 4, "mxfp6-pack-quantized": 6}  # floats in bytes: bits of one
READABLE_FORMATS = ("pack-quantized", *PLAIN_FORMATS, *FLOAT_CODES)
DENSE_SINCE = (0, 18)  # version from which codes of every width lie without gaps


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME.weight_packed (int32 words, bytes) or NAME.weight (int8, float8) with NAME.weight_scale and perhaps .weight_zero_point."""
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
        made.append(_Module(name, codes, scale, stored, _group_of(name, groups)).entry(packed))
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
    stored_as: str
    dense: bool

    def block(self, out: int, inputs: int) -> tuple[int, int]:
        blocks = {"tensor": (out, inputs), "channel": (1, inputs), "block": self.structure}
        return blocks.get(self.strategy, (1, self.group_size))

    @property
    def grouped(self) -> bool:
        return self.strategy in ("group", "tensor_group")

    def words(self) -> str:
        where = {
            "tensor": "per tensor",
            "channel": "per channel",
            "block": f"blocks of {self.structure[0]}x{self.structure[1]}",
        }.get(self.strategy, f"groups of {self.group_size}")
        kind = self.stored_as[:6] if self.stored_as[:2] in ("nv", "mx") else f"{'fp' if self.kind == 'float' else 'int'}{self.bits}"
        return f"{kind.rstrip('-')} {where}"


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
        if not group.get("weights") or group.get("format") == "dense":
            continue
        kind = group.get("format") or quantization.get("format")
        if kind not in READABLE_FORMATS:
            raise UnreadableError(f"moebit reads the formats {', '.join(READABLE_FORMATS)}, this is {kind}")
        result.append(_group(group, kind, _is_dense(quantization.get("version"))))
    return result


def _is_dense(version: object) -> bool:
    """Whether codes of 3, 5, 6 and 7 bits lie without gaps, by the version of the library; the newest where none is declared."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= DENSE_SINCE


def _group(group: Mapping[str, Any], stored_as: str, dense: bool) -> _Group:
    args = group["weights"]
    bits, kind, size = args.get("num_bits", 8), args.get("type", "int"), args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    structure = args.get("block_structure") or (0, 0)
    if isinstance(structure, str):
        structure = [int(number) for number in structure.split("x")]
    floating = bits == FLOAT_CODES.get(stored_as, 8) and stored_as != "pack-quantized"
    readable = {
        "type": (kind == "int" and stored_as not in FLOAT_CODES) or (kind == "float" and floating),
        "num_bits": type(bits) is int and 1 <= bits <= 8,
        "strategy": strategy in ("tensor", "channel", "block")
        or (strategy in ("group", "tensor_group") and type(size) is int and size > 0),
        "block_structure": strategy != "block" or (len(structure) == 2 and min(structure) > 0),
    }
    wrong = [key for key, fine in readable.items() if not fine]
    if wrong:
        raise UnreadableError(f"moebit does not read {stored_as} weights with {wrong[0]} {args.get(wrong[0])!r}")
    targets = tuple(map(str, group.get("targets") or ()))
    symmetric, (tall, wide) = bool(args.get("symmetric", True)), structure
    return _Group(targets, bits, kind, strategy, size or 0, symmetric, (tall, wide), stored_as, dense)


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


@dataclass(frozen=True)
class _Module:
    """The stored tensors of one matrix."""

    name: str
    codes: TensorEntry
    scale: TensorEntry
    stored: Mapping[str, TensorEntry]
    group: _Group

    def part(self, leaf: str) -> TensorEntry | None:
        return self.stored.get(f"{self.name}.{leaf}")

    def entry(self, packed: bool) -> RowsEntry:
        if self.group.stored_as in FLOAT_CODES:
            return self._floats()
        shape, decode = self.codes.shape, cast(Decode, floats)
        if packed:
            if self.codes.dtype != torch.int32 or len(self.codes.shape) != 2:
                raise unfit(self.codes, "a matrix of int32 words")
            shape = (self.codes.shape[0], self._packed_width())
            decode = self._unpacking(shape[1])
        elif len(self.codes.shape) != 2:
            raise unfit(self.codes, "a matrix; moebit reads no stacks in compressed-tensors form")
        block = self.group.block(*shape)
        zero, order = self._zero_points(shape, block, packed), self._order(shape[1])
        largest = None if self.codes.dtype in FLOAT8 else 2.0**self.group.bits
        return plain_entry(
            self._plain, self.codes, self.scale, block, shape, decode, zero, self._beside(zero), largest=largest, order=order
        )

    def _floats(self) -> RowsEntry:
        """Codes of four or six bits in bytes; NVFP4 divides its scales by a global one."""
        bits = FLOAT_CODES[self.group.stored_as]
        if self.codes.dtype != torch.uint8 or len(self.codes.shape) != 2 or self.codes.shape[1] * 8 % bits:
            raise unfit(self.codes, "a matrix of bytes")
        shape = (self.codes.shape[0], self.codes.shape[1] * 8 // bits)
        shared = shared_of(self.codes, f"{self.name}.weight_global_scale", self.stored, divides=True) if self._is_nvfp4 else None
        decode, largest = (e2m1_rows, E2M1[-1]) if bits == 4 else (e2m3_rows, float(E2M3.max()))
        block = (1, self.group.group_size)
        return plain_entry(
            self._plain, self.codes, self.scale, block, shape, decode, None, self._beside(None), largest=largest, shared=shared
        )

    @property
    def _plain(self) -> str:
        return f"{self.name}.weight"

    @property
    def _is_nvfp4(self) -> bool:
        return self.group.stored_as.startswith("nvfp4")

    def _beside(self, zero: Grid | None) -> tuple[TensorEntry, ...]:
        unread = [self.part("weight_shape"), None if zero else self.part("weight_zero_point")]
        return (*(part for part in unread if part is not None), *activation_parts(self._plain, self.stored))

    def _order(self, width: int) -> Order | None:
        entry = self.part("weight_g_idx")
        if entry is None:
            return None
        if entry.dtype not in (torch.int32, torch.int64) or entry.shape != (width,) or not self.group.grouped:
            raise unfit(entry, f"the group of each of {width} columns")
        return Order(entry, self.group.group_size)

    def _unpacking(self, width: int) -> Decode:
        words, bits = self.codes.shape[1], self.group.bits
        apart = words == _apart(width, bits) and (words != _close(width, bits) or not self.group.dense)
        return partial(unpack_apart if apart else unpack, bits=bits, width=width)

    def _packed_width(self) -> int:
        """Input channels of packed codes: from the groups where they tell, else from the stored shape (read only then)."""
        words, bits, shape = self.codes.shape[1], self.group.bits, self.part("weight_shape")

        def fits(width: int) -> bool:
            return words in (_close(width, bits), _apart(width, bits))

        if self.group.grouped and len(self.scale.shape) == 2 and fits(self.scale.shape[1] * self.group.group_size):
            return self.scale.shape[1] * self.group.group_size
        if shape is None:
            return words * WORD // bits
        width = int(shape.read()[-1]) if math.prod(shape.shape) == 2 else -1
        if width < 0 or not fits(width):
            raise BadInputError(
                f"tensor {self.codes.name!r} of shape {list(self.codes.shape)} cannot hold {bits}-bit rows of {width}, as "
                f"{shape.name!r} says; download the checkpoint again"
            )
        return width

    def _zero_points(self, shape: tuple[int, ...], block: tuple[int, int], packed: bool) -> Grid | None:
        """With packed codes, zero points are packed too, down the column; but not the single one of a whole tensor."""
        entry = self.part("weight_zero_point")
        if self.group.symmetric:
            return None
        if entry is None:
            raise missing(self.codes, f"{self.name}.weight_zero_point")
        if not packed or self.group.strategy not in ("group", "channel"):
            return grid_of(entry, shape, block, floats)
        bits, rows, columns = self.group.bits, -(-shape[0] // block[0]), -(-shape[1] // block[1])
        apart = (
            bits not in (1, 2, 4, 8)
            and entry.shape[:1] == (_apart(rows, bits),)
            and (entry.shape[0] != _close(rows, bits) or not self.group.dense)
        )
        wanted = (_apart(rows, bits) if apart else _close(rows, bits), columns)
        if entry.shape != wanted or entry.dtype != torch.int32:
            raise wrong_shape(entry, shape, block, wanted)
        whole = WORD % bits == 0 or apart  # else 32 codes take as many words as they have bits
        per_row, unit = (WORD // bits, 1) if whole else (WORD, bits)
        return Grid(entry, (rows, columns), block, partial(_down, bits=bits, apart=apart), per_row=per_row, unit=unit)


def _down(words: Tensor, *, bits: int, apart: bool) -> Tensor:
    """int32 [words, columns] -> float32 [numbers, columns]: codes that lie down the columns."""
    columns_first = words.T.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of a single row
    if apart:
        return unpack_apart(columns_first, bits=bits, width=len(words) * (WORD // bits)).T.contiguous()
    return unpack(columns_first, bits=bits, width=len(words) * WORD // bits).T.contiguous()


def _close(width: int, bits: int) -> int:
    """Words of a row without gaps."""
    return -(-width * bits // WORD)


def _apart(width: int, bits: int) -> int:
    """Words of a row where no code crosses from one into the next."""
    return -(-width // (WORD // bits))
