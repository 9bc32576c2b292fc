"""GPTQ and AWQ outputs read by loops over words, straight from the descriptions of the formats."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[count] codes of a column of 32-bit words, read as one little-endian number."""
    number = sum(int(np.uint32(word)) << 32 * place for place, word in enumerate(words))
    return np.array([number >> bits * i & 2**bits - 1 for i in range(count)])


def gptq_matrix(tensors: dict[str, Tensor], name: str, bits: int, version: int = 1) -> np.ndarray:
    """[out, in] float64."""
    qweight, qzeros, scales, groups = (tensors[f"{name}.{leaf}"].numpy() for leaf in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, out = len(groups), scales.shape[1]
    codes = np.stack([_fields(qweight[:, o], bits, inputs) for o in range(out)])
    zeros = np.stack([_fields(row, bits, out) for row in qzeros]) + (1 if version == 1 else 0)
    return (codes - zeros[groups].T) * scales.astype(np.float64)[groups].T  # type: ignore[no-any-return]


def awq_matrix(tensors: dict[str, Tensor], name: str, group_size: int) -> np.ndarray:
    """[out, in] float64."""
    qweight, qzeros, scales = (tensors[f"{name}.{leaf}"].numpy() for leaf in ("qweight", "qzeros", "scales"))
    inputs, out = qweight.shape[0], scales.shape[1]
    width = inputs if group_size == -1 else group_size

    def unpacked(words: np.ndarray) -> np.ndarray:
        result = np.empty((len(words), out), dtype=np.int64)
        for column in range(out // 8):
            for nibble, place in enumerate(AWQ_ORDER):
                result[:, 8 * column + place] = words[:, column].astype(np.uint32) >> np.uint32(4 * nibble) & np.uint32(15)
        return result

    group = np.arange(inputs) // width
    weights = (unpacked(qweight) - unpacked(qzeros)[group]) * scales.astype(np.float64)[group]
    return weights.T  # type: ignore[no-any-return]


def as_checkpoint(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every quantized matrix of an output by its name in the checkpoint."""
    said = config["quantization_config"]
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if said["quant_method"] == "awq":
        return {f"{name}.weight": awq_matrix(tensors, name, said["group_size"]) for name in names}
    return {f"{name}.weight": gptq_matrix(tensors, name, said["bits"]) for name in names}
