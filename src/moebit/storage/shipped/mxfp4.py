"""4-bit floats in groups of 32 with scales that are powers of two: gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moebit.errors import BadInputError
from moebit.storage.files import TensorEntry
from moebit.storage.shipped.decode import E2M1, e2m1, e8m0
from moebit.storage.shipped.entries import Shipped, gathered, missing, short
from moebit.storage.shipped.grids import Grid, RowsEntry


def read(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> Shipped:
    """gpt-oss: NAME_blocks uint8 [E, out, G, 16], two e2m1 a byte, the low one first; NAME_scales uint8 [E, out, G], e8m0.

    The plain tensor is [E, in, out], as transformers has it.
    """
    made = []
    for stored_name, codes in stored.items():
        if not stored_name.endswith("_blocks") or codes.dtype != torch.uint8:
            continue
        name = stored_name.removesuffix("_blocks")
        if f"{name}_scales" not in stored:
            raise missing(codes, f"{name}_scales")
        scales = stored[f"{name}_scales"]
        if len(codes.shape) != 4 or scales.shape != codes.shape[:3] or scales.dtype != torch.uint8:
            raise BadInputError(
                f"tensor {scales.name!r} is {short(scales.dtype)} {list(scales.shape)}, {stored_name!r} is {list(codes.shape)}: expected "
                "bytes [experts, out, groups, 16] and their scales [experts, out, groups]; download the checkpoint again"
            )
        experts, out, groups, size = codes.shape
        grid = Grid(scales, (out, groups), (1, 2 * size), e8m0)
        shape = (experts, groups * 2 * size, out)
        made.append(RowsEntry(name, torch.bfloat16, shape, codes, e2m1, grid, E2M1[-1], turned=True))
    return gathered("mxfp4", "mxfp4 groups of 32", stored, made)
