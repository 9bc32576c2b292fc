"""Which block type of ggml a tensor of a GGUF file gets: llama-quantize's mixtures by name, and what fits where 256 does not divide a row.

The rules are those of llama.cpp's `llama_tensor_get_type` and `tensor_type_fallback` (src/llama-quant.cpp) with an importance matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moebit.tensor.grids.ggml import GRIDS

EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
FALLBACKS = {"iq4_xs": "iq4_nl", "q2_0": "q4_0", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
FILE_TYPES = {"q2_k": "MOSTLY_Q2_K", "q3_k_m": "MOSTLY_Q3_K_M", "q4_k_m": "MOSTLY_Q4_K_M", "iq4_xs": "MOSTLY_IQ4_XS"}


def fitting(kind: str, width: int) -> str | None:
    """The type, or the one that llama.cpp takes instead where its blocks do not divide rows of `width` weights; None: none does."""
    if width % GRIDS[kind].block == 0:
        return kind
    other = FALLBACKS.get(kind)
    return other if other is not None and width % GRIDS[other].block == 0 else None


@dataclass(frozen=True)
class Mixture:
    """llama-quantize's choice of types for one model.

    Attributes:
        name: of the mixture, or none. base: the type of what it says nothing about.
        layers, experts: of the model. gqa: query heads per key head.
        value_blocks: numbers of the blocks that have values of attention, in their order.
        tied: whether the head is the embeddings.
    """

    name: str
    base: str
    layers: int
    experts: int
    gqa: int
    value_blocks: tuple[int, ...]
    tied: bool

    def type_of(self, tensor: str) -> str:
        """The type of a tensor, before it is known whether it fits."""
        if tensor == HEAD or (tensor == EMBEDDINGS and (self.tied or self.name == "none")):
            return "q6_k" if self.base != "q8_0" else "q8_0"
        if self.name == "none" or tensor == EMBEDDINGS:
            return self.base
        block, part = _parsed(tensor)
        if part in ("attn_v", "attn_qkv", "attn_kv_b"):
            return self._values(self.value_blocks.index(block))
        if part == "attn_k" and self.experts == 8:
            return "q8_0"
        if part.startswith("ffn_down"):
            return self._down(block)
        if part == "attn_output":
            return self._attention_output()
        return self.base

    def _values(self, number: int) -> str:
        if self.experts == 8:
            return "q8_0"
        if self.name == "q2_k":
            return "q4_k" if self.gqa >= 4 else "q3_k"
        if self.name == "q3_k_m":
            return "q5_k" if number < 2 else "q4_k"
        if self.name == "iq4_xs":
            return "q5_k" if self.gqa >= 4 else self.base
        return "q6_k" if more_bits(number, len(self.value_blocks)) else self.base

    def _down(self, block: int) -> str:
        if self.name == "q2_k":
            return "q3_k"
        if self.name == "q3_k_m":
            return "q5_k" if block < self.layers // 16 else "q4_k"
        return "q6_k" if self.name == "q4_k_m" and more_bits(block, self.layers) else self.base

    def _attention_output(self) -> str:
        if self.experts == 8:
            return "q5_k"
        return {"q2_k": "q3_k", "q3_k_m": "q4_k"}.get(self.name, self.base)


def more_bits(number: int, count: int) -> bool:
    """Whether layer `number` of `count` is one of those that llama.cpp spends more bits on: the first, the last, and each third."""
    return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2


def value_blocks(tensors: Iterable[str]) -> tuple[int, ...]:
    """The blocks that have values of attention."""
    parsed = [_parsed(tensor) for tensor in tensors if tensor.startswith("blk.")]
    return tuple(sorted({block for block, part in parsed if part in ("attn_v", "attn_qkv", "attn_kv_b")}))


def _parsed(tensor: str) -> tuple[int, str]:
    found = re.match(r"blk\.(\d+)\.(\w+)", tensor)
    return (int(found[1]), found[2]) if found else (-1, tensor)
