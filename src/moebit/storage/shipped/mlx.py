"""What mlx-lm writes: whole numbers with a scale and an offset per group (affine), and small floats (mxfp4, nvfp4, mxfp8).

Experts lie in stacks, `switch_mlp.gate_proj` and the like; here they get the names that transformers' checkpoints have for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import Entry, TensorEntry
from moebit.storage.shipped.decode import E2M1, Decode, e2m1_rows, e8m0, floats
from moebit.storage.shipped.entries import Shipped, ShippedEntry, UnreadableError, gathered, missing, unfit
from moebit.storage.shipped.grids import Grid, RowsEntry, Shared, grid_of, plain_type, shared_of
from moebit.storage.shipped.stacks import PlainExpertEntry, apart
from moebit.tensor.layouts.mlx import BITS
from moebit.tensor.layouts.words import unpack_words

METHOD = "mlx"
FLOATS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # bits, values that share a scale
STACKS = ".switch_mlp."
# A block of this name has its experts' matrices named w1, w3, w2 in the checkpoints of transformers (Mixtral, MiniMax, Phi-MoE).
SHORT_NAMES = ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
NVFP4_LARGEST = 448.0 * 6.0  # with a scale for the whole tensor, which is its largest magnitude, numbers are fractions of that


def is_declared(quantization: Mapping[str, Any]) -> bool:
    """Whether this is how mlx-lm declares what it quantized: sizes and no method."""
    return "quant_method" not in quantization and "bits" in quantization and "group_size" in quantization


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME.weight uint32 with NAME.scales and, if affine, NAME.biases."""
    made: list[ShippedEntry] = []
    kinds = set()
    for stored_name, codes in stored.items():
        name, _, leaf = stored_name.rpartition(".")
        if codes.dtype != torch.uint32:
            continue
        if leaf != "weight":
            raise unfit(codes, "the words of a weight")
        if f"{name}.scales" not in stored:
            raise missing(codes, f"{name}.scales")
        kind, entry = _Matrix(name, codes, stored[f"{name}.scales"], stored).entry(_settings(name, quantization))
        kinds.add(kind)
        made.extend(_experts(entry))
    shipped = gathered(METHOD, " and ".join(sorted(kinds)), stored, made)
    return Shipped(shipped.method, shipped.scheme, _plain_experts(shipped.entries))


def _settings(name: str, quantization: Mapping[str, Any]) -> tuple[int, int, str]:
    """(bits, group size, mode) of a module: its own entry, or what is declared for all."""
    own = quantization.get(name)
    chosen = own if isinstance(own, Mapping) else quantization
    bits, size, mode = chosen.get("bits"), chosen.get("group_size"), chosen.get("mode") or "affine"
    if mode != "affine" and mode not in FLOATS:
        raise UnreadableError(f"moebit reads MLX's modes affine, {', '.join(FLOATS)}, {name} is in mode {mode!r}")
    bits, size = FLOATS.get(mode, (bits, size))
    if bits not in (*BITS, 8) or type(size) is not int or size < 1:
        raise UnreadableError(f"bits {bits!r} and group_size {size!r} of {name} are not MLX's")
    return bits, size, mode


class _Matrix:
    """The stored tensors of one matrix or stack."""

    def __init__(self, name: str, codes: TensorEntry, scale: TensorEntry, stored: Mapping[str, TensorEntry]) -> None:
        self.name, self.codes, self.scale, self.stored = name, codes, scale, stored

    def entry(self, settings: tuple[int, int, str]) -> tuple[str, RowsEntry]:
        bits, size, mode = settings
        if len(self.codes.shape) not in (2, 3) or self.codes.shape[-1] * 32 % bits:
            raise unfit(self.codes, f"rows of whole words of {bits}-bit codes")
        shape = (*self.codes.shape[:-1], self.codes.shape[-1] * 32 // bits)
        if self.scale.shape != (*shape[:-1], shape[-1] // size) or shape[-1] % size:
            raise unfit(self.scale, f"scales {[*shape[:-1], shape[-1] // size]} for groups of {size} codes of {bits} bits")
        plain = f"{self.name}.weight"
        if mode == "affine":
            offset = self.stored.get(f"{self.name}.biases")
            if offset is None:
                raise missing(self.codes, f"{self.name}.biases")
            scale, biases = (grid_of(part, shape, (1, size), floats) for part in (self._checked(self.scale), self._checked(offset)))
            decode: Decode = partial(_codes, bits=bits, width=shape[-1])
            entry = RowsEntry(plain, plain_type(self.scale), shape, self.codes, decode, scale, 2.0**bits, offset=biases)
            return f"int{bits} groups of {size}", entry
        if self.scale.dtype != torch.uint8:
            raise unfit(self.scale, "bytes")
        numbers, largest = (_e2m1, E2M1[-1]) if bits == 4 else (_e4m3, 448.0)
        grid = Grid(self.scale, (shape[-2], shape[-1] // size), (1, size), _e4m3 if mode == "nvfp4" else e8m0, shared=self._shared())
        return f"{mode} groups of {size}", RowsEntry(plain, torch.bfloat16, shape, self.codes, numbers, grid, largest)

    @staticmethod
    def _checked(entry: TensorEntry) -> TensorEntry:
        if not entry.dtype.is_floating_point:
            raise unfit(entry, "floating-point numbers")
        return entry

    def _shared(self) -> Shared | None:
        name = f"{self.name}.global_scale"
        return shared_of(self.codes, name, self.stored, divides=False, unit=NVFP4_LARGEST) if name in self.stored else None


def _codes(words: Tensor, *, bits: int, width: int) -> Tensor:
    return unpack_words(words.view(torch.int32), bits, width).float()


def _e2m1(words: Tensor) -> Tensor:
    return e2m1_rows(words.contiguous().view(torch.uint8))


def _e4m3(stored: Tensor) -> Tensor:
    return floats(stored.contiguous().view(torch.float8_e4m3fn))


def _experts(entry: RowsEntry) -> list[ShippedEntry]:
    """A stack as its matrices, under the names of a checkpoint of transformers; anything else as it is."""
    if len(entry.shape) != 3 or STACKS not in entry.name:
        return [entry]
    return [apart(entry, _expert_name(entry.name, number), number) for number in range(entry.shape[0])]


def _plain_experts(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries, stacks that were left as they were among them, with the names of a checkpoint of transformers."""
    result: dict[str, Entry] = {}
    for name, entry in entries.items():
        if STACKS in name and isinstance(entry, TensorEntry) and len(entry.shape) == 3:
            result |= {new: PlainExpertEntry(new, entry, n) for n in range(entry.shape[0]) if (new := _expert_name(name, n))}
        else:
            result[name] = entry
    return result


def _expert_name(name: str, number: int) -> str:
    block, _, rest = name.partition(STACKS)
    projection, _, leaf = rest.partition(".")
    if block.endswith(SHORT_NAMES[0]):
        if projection not in SHORT_NAMES[1]:
            raise BadInputError(f"tensor {name!r}: moebit knows the experts' matrices {', '.join(SHORT_NAMES[1])}, not {projection}")
        projection = SHORT_NAMES[1][projection]
    return f"{block}.experts.{number}.{projection}.{leaf}"
