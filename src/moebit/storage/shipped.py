"""Checkpoints that are shipped quantized, read as if they were stored plain.

Every scheme is codes and a grid of scales: weight = scale * (code - zero point), the product taken in float32 and rounded once. An
adapter per scheme finds the tensors that belong together; what it makes of them has the plain names and shapes, and dequantizes the
rows that are asked for when they are asked for. What is quantized is told by the stored tensors, not by lists of modules that are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import PIECE_BYTES, Entry, TensorEntry, TensorSpec

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WORD = 32  # bits of the int32 words that packed codes lie in
PACKED_WIDTHS = (2, 4, 8)  # no code crosses a byte; how other widths lie in words has changed between versions
READABLE_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
# What each of the 256 bytes stands for, [256, codes in a byte] float32: looking up is several times faster than computing.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # without the sign; OCP Microscaling Formats (MX) 1.0, section 5.3.3
E2M1_BYTES = torch.tensor([[(-1.0 if code & 8 else 1.0) * E2M1[code & 7] for code in (byte & 15, byte >> 4)] for byte in range(256)])
E8M0_BYTES = torch.tensor([[2.0 ** (byte - 127)] for byte in range(255)] + [[math.nan]])  # section 5.4.1 there
FLOAT8_BYTES = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float().unsqueeze(1) for dtype in FLOAT8}
INTEGER_BYTES = {
    bits: torch.tensor([[float((byte >> low) % 2**bits - 2 ** (bits - 1)) for low in range(0, 8, bits)] for byte in range(256)])
    for bits in PACKED_WIDTHS
}
WHOLE_ROWS = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}  # a row of such a table as one number

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Numbers (scales, zero points) of which each stands for a block of a matrix.

    Attributes:
        shape: (rows, columns) of numbers for one matrix. block: rows and columns of the matrix that a number stands for.
        decode: stored numbers to float32, rows in their order. per_row: rows of numbers in one stored row.
    """

    entry: TensorEntry
    shape: tuple[int, int]
    block: tuple[int, int]
    decode: Decode
    per_row: int = 1

    def of_rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, columns]: the numbers of a matrix's rows."""
        first, last = start // self.block[0] // self.per_row, (stop - 1) // self.block[0] // self.per_row
        if self.shape[0] == 1:  # perhaps a scalar
            first, stored = 0, self.entry.read()
        else:
            stored = self.entry.read(first, last + 1)
        rows = torch.arange(start, stop) // self.block[0] - first * self.per_row
        return self.decode(stored).reshape(-1, self.shape[1])[rows]

    def of_matrices(self, start: int, stop: int, rows: int) -> Tensor:
        """float32 [stop - start, rows, columns]: the numbers of every row of some matrices of a stack."""
        numbers = self.decode(self.entry.read(start, stop)).reshape(stop - start, *self.shape)
        return numbers[:, torch.arange(rows) // self.block[0]]

    def all(self) -> Tensor:
        return self.decode(self.entry.read())


@dataclass(frozen=True)
class ShippedEntry:
    """A matrix [out, in] or a stack of them [E, out, in] that is stored quantized, under the name and in the shape it would have plain.

    Attributes:
        dtype: what `read` gives. shape: rows first; [E, in, out] where `transposed`.
        codes: as stored. decode: stored rows to float32 rows [n, in] or [n, out, in].
        largest: no code (less its zero point) is beyond it.
        further: stored tensors that belong to it and are not needed to read it (a copy of the shape, scales of activations).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    codes: TensorEntry
    decode: Decode
    scale: Grid
    largest: float
    zero: Grid | None = None
    transposed: bool = False
    further: tuple[TensorEntry, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The stored tensors behind it."""
        return (self.codes, self.scale.entry, *((self.zero.entry,) if self.zero else ()), *self.further)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(entry.spec.nbytes for entry in self.stored if entry not in self.further)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis (all by default), dequantized; reads their codes and scales and no others.

        Where `transposed`, the result is a view of [n, out, in], as whoever solves matrices wants them.

        Raises:
            BadInputError: a file changed underneath or ends early.
        """
        stop = self.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.name}: rows {start} to {stop} of {self.shape[0]}")
        matrices = (self.shape[2], self.shape[1]) if self.transposed else self.shape[1:]
        result = torch.empty(stop - start, *matrices, dtype=self.dtype)
        step = max(1, PIECE_BYTES // (4 * max(1, math.prod(matrices))))
        for low in range(start, stop, step):
            high = min(low + step, stop)
            result[low - start : high - start] = self._rows(low, high)
        return result.transpose(1, 2) if self.transposed else result

    def expect(self, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read the codes of these rows ahead."""
        self.codes.expect(start, stop)

    def _rows(self, start: int, stop: int) -> Tensor:
        values = self.decode(self.codes.read(start, stop))
        if self.zero:
            _apply(values, torch.Tensor.sub_, self._numbers(self.zero, values, start, stop), self.zero.block[1])
        _apply(values, torch.Tensor.mul_, self._numbers(self.scale, values, start, stop), self.scale.block[1])
        return values

    @staticmethod
    def _numbers(grid: Grid, values: Tensor, start: int, stop: int) -> Tensor:
        return grid.of_rows(start, stop) if values.ndim == 2 else grid.of_matrices(start, stop, values.shape[1])


def _apply(values: Tensor, operation: Callable[[Tensor, Tensor], Tensor], numbers: Tensor, width: int) -> None:
    """In place: every `width` columns of [..., in] with their number of [..., columns]; the last block may be narrower."""
    whole = values.shape[-1] // width
    if whole:
        operation(values[..., : whole * width].unflatten(-1, (whole, width)), numbers[..., :whole, None])
    if values.shape[-1] % width:
        operation(values[..., whole * width :], numbers[..., whole:])


@dataclass(frozen=True)
class Shipped:
    """What a checkpoint that is shipped quantized reads like.

    Attributes:
        method: its `quant_method`. scheme: in words. entries: every tensor under its plain name.
    """

    method: str
    scheme: str
    entries: dict[str, Entry]

    @property
    def quantized(self) -> list[ShippedEntry]:
        return [entry for entry in self.entries.values() if isinstance(entry, ShippedEntry)]

    @property
    def average_bits(self) -> float:
        """8 x bytes of codes, scales and zero points / number of weights they stand for."""
        return 8 * sum(entry.nbytes for entry in self.quantized) / sum(math.prod(entry.shape) for entry in self.quantized)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        unread = sum(not _is_shape(e) for entry in self.quantized for e in entry.further)
        return {
            "method": self.method,
            "scheme": self.scheme,
            "read_as": " and ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in self.quantized})),
            "tensors": len(self.quantized),
            "average_bits": self.average_bits,
            "activation_scales_left_out": unread,
        }


def shipped_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization that config.json declares: at the top, or inside the text part of a larger model; None where there is none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if part.get(key):
                    return dict(part[key]) if isinstance(part[key], Mapping) else {"quant_method": part[key]}
    return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same checkpoint stored plain."""
    result = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(result.get("text_config"), Mapping):
        result["text_config"] = plain_config(result["text_config"])
    return result


def read_shipped(path: object, stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """The tensors of a checkpoint that is shipped quantized, under their plain names.

    Args:
        path: the checkpoint, for messages. quantization: what `shipped_config` found.

    Raises:
        BadInputError: a scheme that moebit does not read, a tensor that is missing or does not fit.
    """
    method = str(quantization.get("quant_method"))
    try:
        if method not in ADAPTERS:
            raise _UnreadableError(f"of what is shipped quantized, moebit reads {', '.join(ADAPTERS)}")
        shipped = ADAPTERS[method](stored, quantization)
        if not shipped.quantized:
            raise _UnreadableError("config.json says so, but no tensor here is; if this is it, take quantization_config out of config.json")
    except _UnreadableError as reason:
        raise BadInputError(f"{path}: already quantized ({method}); give the full-precision checkpoint: {reason}") from reason
    return shipped


class _UnreadableError(Exception):
    """Why a scheme cannot be read."""


def check_plain(path: object, stored: Mapping[str, TensorEntry]) -> None:
    """Refuse 8-bit floats that no configuration explains: without their scales they are other numbers.

    Raises:
        BadInputError: naming the tensor.
    """
    for entry in stored.values():
        if entry.dtype in FLOAT8:
            raise BadInputError(
                f"{path}: tensor {entry.name!r} is {_short(entry.dtype)}, but config.json has no quantization_config that says how to read "
                "it; copy the checkpoint's own config.json again"
            )


def check_shipped(entries: Iterable[Entry]) -> None:
    """Read every scale of what is quantized: no NaN, and no product that the plain type cannot hold; and every copy of a shape.

    Raises:
        BadInputError: naming the tensor.
    """
    for entry in entries:
        if not isinstance(entry, ShippedEntry):
            continue
        scale = entry.scale.all()
        if not bool(torch.isfinite(scale).all()):
            raise BadInputError(f"tensor {entry.scale.entry.name!r} holds a scale that is no finite number; the checkpoint is damaged")
        if scale.numel() and float(scale.abs().max()) * entry.largest > torch.finfo(entry.dtype).max:
            raise BadInputError(
                f"tensor {entry.scale.entry.name!r} holds the scale {float(scale.abs().max()):g}, with which {entry.name} would overflow "
                f"{_short(entry.dtype)}; the checkpoint is damaged"
            )
        for copy in filter(_is_shape, entry.further):
            says = copy.read().tolist()
            if says != list(entry.shape):
                raise BadInputError(
                    f"tensor {copy.name!r} holds {says}, {entry.codes.name!r} is {list(entry.shape)}; the checkpoint is damaged"
                )


# ---------------------------------------------------------------------------------------------------------------- adapters


def _fp8(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """DeepSeek-V3, Qwen3-FP8 and their like: NAME float8 and NAME_scale_inv (or NAME_scale), which is multiplied with."""
    block = quantization.get("weight_block_size")
    if block is not None and (not isinstance(block, list | tuple) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block)):
        raise _UnreadableError(f"weight_block_size {block!r} is not two positive numbers")
    made = []
    for name, codes in stored.items():
        scales = [stored[f"{name}{suffix}"] for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in stored]
        if codes.dtype not in FLOAT8:
            # (a model may have a parameter of its own that is called like another's scale)
            if scales and (name.endswith("weight") or scales[0].name.endswith("_scale_inv")):
                raise BadInputError(
                    f"tensor {name!r} is {_short(codes.dtype)} and has scales in {scales[0].name!r}; moebit reads fp8 checkpoints whose "
                    "weights are 8-bit floats: give the full-precision checkpoint"
                )
            continue
        if not scales:
            raise _missing(codes, f"{name}_scale_inv")
        if len(codes.shape) not in (2, 3):
            raise BadInputError(f"tensor {name!r} has shape {list(codes.shape)}; moebit reads quantized matrices and stacks of them")
        chosen = (block[0], block[1]) if block is not None and math.prod(scales[0].shape) > 1 else _derived_block(codes, scales[0])
        made.append(_plain(name, codes, scales[0], chosen, further=_activation_parts(name, stored)))
    how = f"blocks of {block[0]}x{block[1]}" if block else "with a scale per tensor or channel"
    return _shipped("fp8", f"fp8 {how}", stored, made)


def _mxfp4(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """gpt-oss: NAME_blocks uint8 [E, out, G, 16], two e2m1 a byte, the low one first; NAME_scales uint8 [E, out, G], e8m0.

    The plain tensor is [E, in, out], as transformers has it.
    """
    made = []
    for stored_name, codes in stored.items():
        if not stored_name.endswith("_blocks") or codes.dtype != torch.uint8:
            continue
        name = stored_name.removesuffix("_blocks")
        if f"{name}_scales" not in stored:
            raise _missing(codes, f"{name}_scales")
        scales = stored[f"{name}_scales"]
        if len(codes.shape) != 4 or scales.shape != codes.shape[:3] or scales.dtype != torch.uint8:
            raise BadInputError(
                f"tensor {scales.name!r} is {_short(scales.dtype)} {list(scales.shape)}, {stored_name!r} is {list(codes.shape)}: expected "
                "bytes [experts, out, groups, 16] and their scales [experts, out, groups]; download the checkpoint again"
            )
        experts, out, groups, size = codes.shape
        grid = Grid(scales, (out, groups), (1, 2 * size), _e8m0)
        shape = (experts, groups * 2 * size, out)
        made.append(ShippedEntry(name, torch.bfloat16, shape, codes, _e2m1, grid, E2M1[-1], transposed=True))
    return _shipped("mxfp4", "mxfp4 groups of 32", stored, made)


def _compressed_tensors(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
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
                    f"tensor {stored_name!r} is {_short(codes.dtype)} and has scales in {scale.name!r}: it is not compressed; "
                    "give the full-precision checkpoint"
                )
            continue
        if scale is None:
            raise _missing(codes, f"{name}.weight_scale")
        if f"{name}.weight_g_idx" in stored:
            raise BadInputError(
                f"{name}: its groups are scattered (weight_g_idx), which moebit does not read; give the full-precision checkpoint"
            )
        made.append(_compressed(name, codes, scale, stored, _group_of(name, groups), packed))
    described = dict.fromkeys(group.words() for group in groups)
    return _shipped("compressed-tensors", " and ".join(described), stored, made)


ADAPTERS: dict[str, Callable[[Mapping[str, TensorEntry], Mapping[str, Any]], Shipped]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}


# ---------------------------------------------------------------------------------------------------- compressed-tensors


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
        raise _UnreadableError("config_groups, which says how, is missing from its quantization_config")
    if quantization.get("transform_config"):
        raise _UnreadableError("its weights are rotated (transform_config)")
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _UnreadableError(f"its weights are stored sparse ({quantization['sparsity_config']['format']})")
    result = []
    for group in declared.values():
        if not group.get("weights"):
            continue
        kind = group.get("format") or quantization.get("format")
        if kind not in READABLE_FORMATS:
            raise _UnreadableError(f"moebit reads the formats {', '.join(READABLE_FORMATS)}, this is {kind}")
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
        raise _UnreadableError(f"moebit does not read {stored_as} weights with {wrong[0]} {args.get(wrong[0])!r}")
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
    decode: Decode = _floats
    if packed:
        if codes.dtype != torch.int32 or len(codes.shape) != 2:
            raise BadInputError(f"tensor {codes.name!r} is {_short(codes.dtype)} {list(codes.shape)}; expected a matrix of int32 words")
        shape = (codes.shape[0], _packed_width(codes, scale, shape_entry, group))
        decode = partial(_unpack, bits=group.bits, width=shape[1])
    elif len(codes.shape) != 2:
        raise BadInputError(
            f"tensor {codes.name!r} has shape {list(codes.shape)}; moebit reads quantized matrices in compressed-tensors form"
        )
    block = group.block(*shape)
    zero_entry = stored.get(f"{name}.weight_zero_point")
    if not group.symmetric and zero_entry is None:
        raise _missing(codes, f"{name}.weight_zero_point")
    zero = None
    if zero_entry is not None and not group.symmetric:
        # With packed codes, zero points are packed too, down the column; but not the single one of a whole tensor.
        zero = _zero_points(zero_entry, shape, block, group.bits if packed and group.strategy in ("group", "channel") else None)
    further = (*((shape_entry,) if shape_entry else ()), *_activation_parts(f"{name}.weight", stored))
    if zero_entry is not None and zero is None:
        further = (*further, zero_entry)
    return _plain(f"{name}.weight", codes, scale, block, shape, decode, zero, further, None if codes.dtype in FLOAT8 else 2.0**group.bits)


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
        return _grid(entry, shape, block, _floats)
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    wanted = (-(-rows * bits // WORD), columns)
    if entry.shape != wanted or entry.dtype != torch.int32:
        raise _wrong_shape(entry, shape, block, wanted)

    def decode(words: Tensor) -> Tensor:
        per_word = WORD // bits
        columns_first = words.T.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of a single row
        return _unpack(columns_first, bits=bits, width=len(words) * per_word).T.contiguous()

    return Grid(entry, (rows, columns), block, decode, per_row=WORD // bits)


# ------------------------------------------------------------------------------------------------------------------ parts


def _plain(
    name: str,
    codes: TensorEntry,
    scale: TensorEntry,
    block: tuple[int, int],
    shape: tuple[int, ...] | None = None,
    decode: Decode | None = None,
    zero: Grid | None = None,
    further: tuple[TensorEntry, ...] = (),
    largest: float | None = None,
) -> ShippedEntry:
    shape = codes.shape if shape is None else shape
    exponents = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if not exponents and not scale.dtype.is_floating_point:
        raise BadInputError(f"tensor {scale.name!r} is {_short(scale.dtype)}, expected scales; download the checkpoint again")
    grid = _grid(scale, shape, block, _e8m0 if exponents else _floats)
    # Whoever wrote float16 scales computes in float16, which holds more digits.
    dtype = torch.float16 if scale.dtype == torch.float16 else torch.bfloat16
    return ShippedEntry(
        name, dtype, shape, codes, decode or _floats, grid, largest or torch.finfo(codes.dtype).max, zero=zero, further=further
    )


def _grid(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int], decode: Decode) -> Grid:
    """The numbers of a matrix or stack in blocks; axes of one number may be left out.

    Raises:
        BadInputError: not as many of them as there are blocks.
    """
    stack, rows, columns = shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    known = [(*stack, rows, columns)]
    known += [(*stack, rows)] if columns == 1 else []
    known += [stack, (*stack, 1)] if rows == columns == 1 else []
    if entry.shape not in known:
        raise _wrong_shape(entry, shape, block, known[0])
    return Grid(entry, (rows, columns), block, decode)


def _derived_block(codes: TensorEntry, scale: TensorEntry) -> tuple[int, int]:
    """What a scale stands for where no block size is declared: a tensor, a channel, an even part."""
    (*stack, out, inputs), grid = codes.shape, (1, 1)
    if len(scale.shape) == len(codes.shape):
        grid = (scale.shape[-2], scale.shape[-1])
    elif len(scale.shape) == len(stack) + 1:
        grid = (scale.shape[-1], 1)
    if 0 in grid or out % grid[0] or inputs % grid[1]:
        raise _wrong_shape(scale, codes.shape, (out, inputs), (*stack, 1, 1))
    return out // grid[0], inputs // grid[1]


def _activation_parts(name: str, stored: Mapping[str, TensorEntry]) -> tuple[TensorEntry, ...]:
    """Scales of the activations that a quantized weight is multiplied with: of no use once it is plain."""
    owner = name.removesuffix("weight")
    names = [f"{owner}{part}" for part in ACTIVATION_PARTS] if name.endswith(".weight") else [f"{name}_activation_scale"]
    return tuple(stored[part] for part in names if part in stored)


def _shipped(method: str, scheme: str, stored: Mapping[str, TensorEntry], made: list[ShippedEntry]) -> Shipped:
    consumed = {part.name for entry in made for part in entry.stored}
    entries: dict[str, Entry] = {name: entry for name, entry in stored.items() if name not in consumed}
    for entry in made:
        if entry.name in entries:
            raise BadInputError(
                f"tensor {entry.name!r} is stored both plain and quantized ({entry.codes.name!r}); download the checkpoint again"
            )
        entries[entry.name] = entry
    return Shipped(method, scheme, entries)


def _floats(stored: Tensor) -> Tensor:
    if stored.dtype in FLOAT8_BYTES and stored.ndim:
        return _lookup(stored, FLOAT8_BYTES[stored.dtype])
    return stored.float()


def _e8m0(stored: Tensor) -> Tensor:
    return _lookup(stored.reshape(-1), E8M0_BYTES).view(stored.shape)


def _e2m1(blocks: Tensor) -> Tensor:
    """uint8 [n, out, G, 16] -> float32 [n, out, 32 G]."""
    return _lookup(blocks, E2M1_BYTES).flatten(2)


def _unpack(words: Tensor, *, bits: int, width: int) -> Tensor:
    """int32 [n, words] -> float32 [n, width], signed; codes lie from the lowest bit of the first word on, offset by 2^(bits-1)."""
    return _lookup(words, INTEGER_BYTES[bits])[:, :width]


def _lookup(stored: Tensor, table: Tensor) -> Tensor:
    """float32 [..., k n]: every byte of [..., n bytes] replaced by its row of [256, k]."""
    stored_bytes, per_byte = stored.view(torch.uint8), table.shape[1]
    rows = table.view(WHOLE_ROWS[per_byte]).flatten().index_select(0, stored_bytes.flatten().int())
    return rows.view(torch.float32).view(*stored_bytes.shape[:-1], stored_bytes.shape[-1] * per_byte)


def _is_shape(entry: TensorEntry) -> bool:
    return entry.name.endswith("weight_shape")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _missing(codes: TensorEntry, name: str) -> BadInputError:
    return BadInputError(
        f"tensor {name!r} is missing, without which {codes.name!r} ({_short(codes.dtype)}) cannot be read; "
        "is a shard missing? Download the checkpoint again"
    )


def _wrong_shape(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int], wanted: tuple[int, ...]) -> BadInputError:
    return BadInputError(
        f"tensor {entry.name!r} has shape {list(entry.shape)}, a weight of {list(shape)} in blocks of {block[0]}x{block[1]} needs "
        f"{list(wanted)}; config.json and weights do not belong together: download the checkpoint again"
    )
