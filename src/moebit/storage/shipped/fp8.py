"""8-bit floats with scales per block, channel or tensor: DeepSeek-V3, Qwen3-FP8 and their like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import FLOAT8
from moebit.storage.shipped.entries import Shipped, UnreadableError, gathered, missing, short
from moebit.storage.shipped.grids import activation_parts, derived_block, plain_entry


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """DeepSeek-V3, Qwen3-FP8 and their like: NAME float8 and NAME_scale_inv (or NAME_scale), which is multiplied with."""
    block = quantization.get("weight_block_size")
    if block is not None and (not isinstance(block, list | tuple) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block)):
        raise UnreadableError(f"weight_block_size {block!r} is not two positive numbers")
    made = []
    for name, codes in stored.items():
        scales = [stored[f"{name}{suffix}"] for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in stored]
        if codes.dtype not in FLOAT8:
            # (a model may have a parameter of its own that is called like another's scale)
            if scales and (name.endswith("weight") or scales[0].name.endswith("_scale_inv")):
                raise BadInputError(
                    f"tensor {name!r} is {short(codes.dtype)} and has scales in {scales[0].name!r}; moebit reads fp8 checkpoints whose "
                    "weights are 8-bit floats: give the full-precision checkpoint"
                )
            continue
        if not scales:
            raise missing(codes, f"{name}_scale_inv")
        if len(codes.shape) not in (2, 3):
            raise BadInputError(f"tensor {name!r} has shape {list(codes.shape)}; moebit reads quantized matrices and stacks of them")
        chosen = (block[0], block[1]) if block is not None and math.prod(scales[0].shape) > 1 else derived_block(codes, scales[0])
        made.append(plain_entry(name, codes, scales[0], chosen, further=activation_parts(name, stored)))
    how = f"blocks of {block[0]}x{block[1]}" if block else "with a scale per tensor or channel"
    return gathered("fp8", f"fp8 {how}", stored, made)
