"""Vectors of 512 bits for compiled kernels: the few operations that products with packed codes need and no loop is compiled into.

They are x86 instructions of AVX-512 with VBMI (bytes shuffled and shifted by any count) and VNNI (products of bytes, summed by fours).
`AVAILABLE` says whether the processor that numba compiles for has them. In the names: `bytes` 64 x uint8, `words` 16 x int32,
`floats` 16 x float32.
"""

# mypy: disable-error-code="misc,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

NEEDED = ("avx512f", "avx512bw", "avx512vbmi", "avx512vnni")


def _available() -> bool:
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None or numba.config.DISABLE_JIT:
        return False  # compiled for another processor than this one, or not at all
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in NEEDED)


AVAILABLE = _available()


def _half_precision() -> bool:
    """Whether the processor multiplies bfloat16 or float16: AMX, AVX-512 with BF16 or FP16, Arm's BF16."""
    features = llvmlite.binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("amx-bf16", "avx512bf16", "avx512fp16", "bf16"))


HALF_PRECISION = _half_precision()

_I32, _FLOAT = ir.IntType(32), ir.FloatType()
_BYTES, _WORDS, _FLOATS = ir.VectorType(ir.IntType(8), 64), ir.VectorType(_I32, 16), ir.VectorType(_FLOAT, 16)


class _Bytes(types.Type):
    pass


class _Words(types.Type):
    pass


class _Floats(types.Type):
    pass


bytes_t, words_t, floats_t = _Bytes("vector_bytes"), _Words("vector_words"), _Floats("vector_floats")


def _register(kind: type, vector: Any) -> None:
    class Model(models.PrimitiveModel):
        def __init__(self, manager: Any, numba_type: Any) -> None:
            super().__init__(manager, numba_type, vector)

    register_model(kind)(Model)


for _kind, _vector in ((_Bytes, _BYTES), (_Words, _WORDS), (_Floats, _FLOATS)):
    _register(_kind, _vector)


def _call(builder: Any, name: str, returns: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(returns, [a.type for a in args]), name)
    return builder.call(function, args)


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def load_bytes(typing: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """64 bytes of a flat uint8 array from `index` on. Unchecked: all of them must lie in the array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], args[0], args[1], _BYTES), align=1)

    return bytes_t(array, types.int64), generate


@intrinsic
def store_bytes(typing: Any, array: Any, index: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Write 64 bytes of a flat uint8 array from `index` on. Unchecked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature.args[0], args[0], args[1], _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, bytes_t), generate


@intrinsic
def unpack_bytes(typing: Any, packed: Any, gather: Any, shift: Any, mask: Any) -> tuple[Any, Callable[..., Any]]:
    """64 codes of a bitstream: `gather` brings each eight codes' bytes into one 64-bit lane, `shift` moves every code to its byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, args[0], args[1])
        return builder.and_(_call(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, args[2], lanes), args[3])

    return bytes_t(bytes_t, bytes_t, bytes_t, bytes_t), generate


@intrinsic
def every_byte(typing: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """One byte, repeated 64 times."""
    return bytes_t(types.uint8), lambda context, builder, signature, args: _splat(builder, args[0], _BYTES)


@intrinsic
def no_words(typing: Any) -> tuple[Any, Callable[..., Any]]:
    """Zeros."""
    return words_t(), lambda context, builder, signature, args: ir.Constant(_WORDS, [0] * 16)


@intrinsic
def no_floats(typing: Any) -> tuple[Any, Callable[..., Any]]:
    """Zeros."""
    return floats_t(), lambda context, builder, signature, args: ir.Constant(_FLOATS, [0.0] * 16)


@intrinsic
def add_products(typing: Any, total: Any, unsigned: Any, signed: Any) -> tuple[Any, Callable[..., Any]]:
    """total + the products of 64 uint8 with 64 int8, every four neighbours summed into one word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = [builder.bitcast(a, _WORDS) for a in args]
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _WORDS, *words)

    return words_t(words_t, bytes_t, bytes_t), generate


@intrinsic
def join_planes(typing: Any, high: Any, low: Any) -> tuple[Any, Callable[..., Any]]:
    """256 * high + low as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = builder.add(builder.shl(args[0], ir.Constant(_WORDS, [8] * 16)), args[1])
        return builder.sitofp(whole, _FLOATS)

    return floats_t(words_t, words_t), generate


@intrinsic
def add_scaled(typing: Any, total: Any, vector: Any, scale: Any) -> tuple[Any, Callable[..., Any]]:
    """total + vector * scale."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", _FLOATS, args[1], _splat(builder, args[2], _FLOATS), args[0])

    return floats_t(floats_t, floats_t, types.float32), generate


@intrinsic
def add_scaled_halves(typing: Any, total: Any, vector: Any, low: Any, high: Any) -> tuple[Any, Callable[..., Any]]:
    """total + vector * (`low` for its first half, `high` for its second)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        order = ir.Constant(ir.VectorType(_I32, 16), [0] * 8 + [16] * 8)
        scale = builder.shuffle_vector(_splat(builder, args[2], _FLOATS), _splat(builder, args[3], _FLOATS), order)
        return _call(builder, "llvm.fma.v16f32", _FLOATS, args[1], scale, args[0])

    return floats_t(floats_t, floats_t, types.float32, types.float32), generate


@intrinsic
def load_floats(typing: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """16 floats of a flat float32 array from `index` on. Unchecked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], args[0], args[1], _FLOATS), align=4)

    return floats_t(array, types.int64), generate


@intrinsic
def store_floats(typing: Any, array: Any, index: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Write 16 floats of a flat float32 array from `index` on. Unchecked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature.args[0], args[0], args[1], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, floats_t), generate


@intrinsic
def multiply(typing: Any, a: Any, b: Any) -> tuple[Any, Callable[..., Any]]:
    """a * b."""
    return floats_t(floats_t, floats_t), lambda context, builder, signature, args: builder.fmul(args[0], args[1])


@intrinsic
def subtract_product(typing: Any, total: Any, a: Any, b: Any) -> tuple[Any, Callable[..., Any]]:
    """total - a * b."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", _FLOATS, builder.fneg(args[1]), args[2], args[0])

    return floats_t(floats_t, floats_t, floats_t), generate


@intrinsic
def sum_floats(typing: Any, vector: Any) -> tuple[Any, Callable[..., Any]]:
    """The sum of all 16, by halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.vector.reduce.fadd.v16f32")
        return builder.call(function, [ir.Constant(_FLOAT, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(floats_t), generate


def _tables() -> tuple[np.ndarray, np.ndarray]:
    gather, shift = np.zeros((9, 64), np.uint8), np.zeros((9, 64), np.uint8)
    for bits in range(2, 9):
        for lane in range(8):
            for byte in range(8):
                gather[bits, 8 * lane + byte] = min(lane * bits + byte, 63)
                shift[bits, 8 * lane + byte] = byte * bits
    return gather.reshape(-1), shift.reshape(-1)


GATHER, SHIFT = _tables()  # 64 entries for each width
