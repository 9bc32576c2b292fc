"""llama.cpp's importance matrix: what llama-quantize weighs the errors of a tensor's inputs with, as a GGUF file.

For a tensor T there are `T.in_sum2`, F32 [E, in], sums of squares of the inputs that reached each expert, and `T.counts`, F32 [E, 1], how
many tokens those were; a linear has E = 1 (llama.cpp's tools/imatrix/imatrix.cpp). The loader divides one by the other, and takes ones for
an expert without tokens (tools/quantize/quantize.cpp). It rounds counts to whole numbers first (common/imatrix-loader.cpp), so a share of a
token would become no token: `write_imatrix` writes such an expert's mean with a count of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.gguf.read import GgufFile, dequantized, read_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
TYPE, DATASETS, CHUNKS, CHUNK_SIZE = "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
# Tools differ in which name they look up: the stacks one by one, or gate and up fused. They have the same inputs.
SAME_INPUTS = {"ffn_gate_exps": ("ffn_up_exps", "ffn_gate_up_exps"), "ffn_up_exps": ("ffn_gate_exps", "ffn_gate_up_exps")}


@dataclass(frozen=True)
class Importance:
    """The inputs of one tensor.

    Attributes:
        sums: [E, in], sums over tokens of the squared input, weighted or not.
        counts: [E], the tokens, or the sum of their weights.
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> Tensor:
        """float32 [E, in] as llama-quantize takes it: ones for an expert without tokens."""
        counts = self.counts.to(torch.float32)[:, None]
        return torch.where(counts > 0, self.sums.to(torch.float32) / counts.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


@dataclass(frozen=True)
class ImportanceMatrix:
    """A whole file.

    Attributes:
        tensors: GGUF name → its inputs.
        datasets: names of the texts.
        chunks, chunk_size: how many windows of how many tokens.
    """

    tensors: dict[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    @property
    def uncovered(self) -> dict[str, tuple[int, ...]]:
        """GGUF name → experts without a token, for which llama-quantize takes ones; tensors without such experts are left out."""
        found = {name: (one.counts <= 0).nonzero().flatten().tolist() for name, one in self.tensors.items()}
        return {name: tuple(experts) for name, experts in found.items() if experts}


def write_imatrix(gguf: Any, path: Path, matrix: ImportanceMatrix) -> None:
    """Write the file that `llama-quantize --imatrix` reads. Gate, up and fused names are all written where one of them is given.

    Raises:
        BadInputError: shapes that do not belong together, or values that are no sums of squares.
    """
    tensors = dict(sorted({**_twins(matrix.tensors), **matrix.tensors}.items()))
    writer = gguf.GGUFWriter(path=None, arch="")
    writer.kv_data = [{}]
    writer.add_string(TYPE, "imatrix")
    writer.add_array(DATASETS, list(matrix.datasets))
    writer.add_uint32(CHUNKS, matrix.chunks)
    writer.add_uint32(CHUNK_SIZE, matrix.chunk_size)
    for name, one in tensors.items():
        sums, counts = _storable(name, one)
        writer.add_tensor(name + SUMS, sums)
        writer.add_tensor(name + COUNTS, counts)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _twins(tensors: Mapping[str, Importance]) -> dict[str, Importance]:
    return {
        name.replace(part, twin): one
        for name, one in tensors.items()
        for part, twins in SAME_INPUTS.items()
        if f".{part}." in name
        for twin in twins
    }


def _storable(name: str, one: Importance) -> tuple[np.ndarray, np.ndarray]:
    """Sums [E, in] and whole counts [E, 1] with the quotient of what was given."""
    sums, counts = one.sums.to(torch.float64), one.counts.to(torch.float64)
    if sums.ndim != 2 or counts.shape != sums.shape[:1]:
        raise BadInputError(f"{name}: sums {tuple(sums.shape)} and counts {tuple(counts.shape)}; they have to be [E, in] and [E]")
    if not bool(sums.isfinite().all() & counts.isfinite().all() & (sums >= 0).all() & (counts >= 0).all()):
        raise BadInputError(f"{name}: an importance that is negative or no number; is the model's activation finite?")
    whole = torch.where(counts > 0, counts.round().clamp(min=1), 0)
    sums = sums * torch.where(counts > 0, whole / counts.clamp(min=torch.finfo(torch.float64).tiny), 0)[:, None]
    return sums.to(torch.float32).numpy(), whole.to(torch.float32)[:, None].numpy()


def read_imatrix(gguf: Any, path: Path) -> ImportanceMatrix:
    """Read an importance matrix, anyone's.

    Raises:
        BadInputError: no GGUF file, one of something else, or sums without counts.
    """
    file = read_gguf(gguf, path)
    if file.metadata.get(TYPE) != "imatrix":
        raise BadInputError(f"{path}: a GGUF file of type {file.metadata.get(TYPE)!r}, no importance matrix")
    names = {name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)}
    lone = sorted(names ^ {name.removesuffix(COUNTS) for name in file.tensors if name.endswith(COUNTS)})
    if lone:
        raise BadInputError(f"{path}: {lone[0]} has sums without counts, or counts without sums")
    tensors = {name: Importance(_read(gguf, file, name + SUMS), _read(gguf, file, name + COUNTS).flatten()) for name in sorted(names)}
    datasets = file.metadata.get(DATASETS) or []
    return ImportanceMatrix(tensors, tuple(datasets), int(file.metadata.get(CHUNKS, 0)), int(file.metadata.get(CHUNK_SIZE, 0)))


def _read(gguf: Any, file: GgufFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    if tensor.type != "F32":
        raise BadInputError(f"{tensor.file}: {name} is {tensor.type}; sums and counts are F32")
    return dequantized(gguf, tensor)


__all__ = ["Importance", "ImportanceMatrix", "read_imatrix", "write_imatrix"]
