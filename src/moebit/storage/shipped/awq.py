"""AWQ's layout `gemm`, 4 bits, as AutoAWQ, GPTQModel, llm-awq's converters and auto-round write it (tensor/layouts/awq.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebit.storage.files import TensorEntry
from moebit.storage.shipped.columns import ColumnsEntry
from moebit.storage.shipped.entries import Shipped, UnreadableError, gathered
from moebit.storage.shipped.gptq import check_parts, declared, matrices
from moebit.storage.shipped.grids import plain_type
from moebit.tensor.layouts.awq import BITS, ORDER, unpack_outputs


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """NAME.qweight int32 [in, out / 8], .qzeros int32 [groups, out / 8] and .scales [groups, out]."""
    version = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise UnreadableError(f"moebit reads AWQ's version gemm, this is {version}")
    return read_gemm(stored, quantization, "awq")


def read_gemm(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any], method: str) -> Shipped:
    bits, size = declared(quantization)
    if bits != BITS:
        raise UnreadableError(f"moebit reads AWQ with {BITS} bits, this has {bits}")
    made = []
    for name, codes in matrices(stored):
        scale, zero = stored[f"{name}.scales"], stored[f"{name}.qzeros"]
        inputs, out = codes.shape[0], codes.shape[1] * len(ORDER)
        group = inputs if size == -1 else size
        check_parts(scale, zero, -(-inputs // group), out, codes.shape[1])
        made.append(
            ColumnsEntry(
                f"{name}.weight",
                plain_type(scale),
                (out, inputs),
                codes,
                scale=scale,
                zero=zero,
                size=group,
                unpack=unpack_outputs,
                unpack_zeros=unpack_outputs,
                per_column=len(ORDER),
                largest=float(2**BITS),
            )
        )
    return gathered(method, f"int{BITS} {'per channel' if size == -1 else f'groups of {size}'}", stored, made)
