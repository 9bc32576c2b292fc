"""GPTQ's layout, as AutoGPTQ, GPTQModel and auto-round write it: 2, 3, 4 and 8 bits (tensor/layouts/gptq.py)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.columns import ColumnsEntry
from moebit.storage.shipped.entries import Shipped, UnreadableError, gathered, missing, unfit
from moebit.storage.shipped.grids import plain_type
from moebit.tensor.layouts.gptq import BITS, unpack_codes, unpack_zeros
from moebit.tensor.layouts.words import unpack_words

VERSIONS = {"gptq": 1, "gptq_v2": 2}
ONE_EACH = {bits: sum(1 << low for low in range(0, 32, bits)) for bits in (2, 4, 8)}  # a one in every field of a word


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME.qweight, .qzeros, .scales and perhaps .g_idx; the width of each is told by its shape."""
    kind = quantization.get("checkpoint_format") or "gptq"
    if kind not in VERSIONS:
        raise UnreadableError(f"moebit reads the checkpoint formats {', '.join(VERSIONS)}, this is {kind!r}")
    return read_version(stored, quantization, VERSIONS[kind], "gptq")


def read_version(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any], version: int, method: str) -> Shipped:
    """Version 1 stores zero points less one."""
    bits, size = declared(quantization)
    if quantization.get("pack_dtype", "int32") not in ("int32", None):
        raise UnreadableError(f"moebit reads codes packed into int32, not into {quantization['pack_dtype']}")
    if bits not in BITS:
        raise UnreadableError(f"moebit reads the GPTQ layout with {', '.join(map(str, BITS))} bits, this has {bits}")
    made = [_matrix(name, codes, stored, bits, size, version) for name, codes in matrices(stored)]
    widths = " and ".join(f"int{width}" for width in sorted({_bits(entry.codes, entry.shape[1]) for entry in made}))
    scattered = any(entry.index is not None for entry in made) and quantization.get("desc_act")
    where = "per channel" if size == -1 else f"groups of {size}"
    return gathered(method, f"{widths or f'int{bits}'} {where}{' in activation order' if scattered else ''}", stored, made)


def declared(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """(bits, group size) that config.json declares; -1 is one group for the whole row.

    Raises:
        UnreadableError: they are missing or no numbers.
    """
    bits = quantization.get("bits", quantization.get("w_bit"))
    size = quantization.get("group_size", quantization.get("q_group_size", -1))
    if type(bits) is not int or type(size) is not int or (size != -1 and size < 1):
        raise UnreadableError(f"bits {bits!r} and group_size {size!r} in its quantization_config are no numbers")
    return bits, size


def matrices(stored: Mapping[str, TensorEntry]) -> list[tuple[str, TensorEntry]]:
    """(name, codes) of what is stored as NAME.qweight.

    Raises:
        BadInputError: codes that are no matrix of words, or without scales or zero points.
    """
    found = []
    for stored_name, codes in stored.items():
        name, _, leaf = stored_name.rpartition(".")
        if leaf != "qweight":
            continue
        if codes.dtype != torch.int32 or len(codes.shape) != 2 or 0 in codes.shape:
            raise unfit(codes, "a matrix of int32 words")
        for part in ("scales", "qzeros"):
            if f"{name}.{part}" not in stored:
                raise missing(codes, f"{name}.{part}")
        found.append((name, codes))
    return found


def check_parts(scale: TensorEntry, zero: TensorEntry, groups: int, out: int, zero_words: int) -> None:
    """Scales and zero points are as many as there are groups and output channels.

    Raises:
        BadInputError: naming the tensor.
    """
    if scale.shape != (groups, out) or not scale.dtype.is_floating_point:
        raise unfit(scale, f"scales [{groups}, {out}]")
    if zero.shape != (groups, zero_words) or zero.dtype != torch.int32:
        raise unfit(zero, f"int32 zero points [{groups}, {zero_words}]")


def _matrix(name: str, codes: TensorEntry, stored: Mapping[str, TensorEntry], bits: int, size: int, version: int) -> ColumnsEntry:
    scale, zero, index = stored[f"{name}.scales"], stored[f"{name}.qzeros"], stored.get(f"{name}.g_idx")
    out = codes.shape[1]
    inputs = codes.shape[0] * 32 // bits
    if index is not None:
        if len(index.shape) != 1 or index.dtype not in (torch.int32, torch.int64) or not index.shape[0]:
            raise unfit(index, "the group of every input channel")
        inputs = index.shape[0]
        bits = _bits(codes, inputs)
    if bits not in BITS or codes.shape[0] * 32 != inputs * bits:
        raise BadInputError(
            f"tensor {codes.name!r} of shape {list(codes.shape)} holds no codes of 2, 3, 4 or 8 bits for {inputs} inputs; "
            "config.json and weights do not belong together: download the checkpoint again"
        )
    group = inputs if size == -1 else size
    check_parts(scale, zero, -(-inputs // group), out, -(-out * bits // 32))
    return ColumnsEntry(
        f"{name}.weight",
        plain_type(scale),
        (out, inputs),
        codes,
        scale=scale,
        zero=zero,
        size=group,
        unpack=partial(unpack_codes, bits=bits),
        unpack_zeros=partial(_zeros, bits=bits, version=version, out=out),
        per_column=1,
        largest=2.0**bits,
        index=index,
    )


def _bits(codes: TensorEntry, inputs: int) -> int:
    return codes.shape[0] * 32 // inputs


def _zeros(words: Tensor, *, bits: int, version: int, out: int) -> Tensor:
    """Integers [out, groups].

    Version 1 was made by taking one off whole words, which borrows from the next field where a zero point is 0, and GPTQModel adds it to
    whole words again; fields of 3 bits, which cross words, it takes one by one, without a carry.
    """
    if version == 1 and bits in ONE_EACH:
        words = ((words.long() + ONE_EACH[bits]) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        version = 2
    if out * bits % 32:
        zeros = unpack_words(words, bits, out).T.to(torch.int32) + int(version == 1)
    else:
        zeros = unpack_zeros(words, bits, version=version)
    return zeros & (2**bits - 1)
