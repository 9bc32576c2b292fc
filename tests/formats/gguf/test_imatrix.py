"""Importance matrices: what is written is what llama.cpp's loader computes with, read by PyPI's gguf and not by moebit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter
from moebit.formats.gguf.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix

SUMS = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def matrix(counts: list[float]) -> ImportanceMatrix:
    return ImportanceMatrix({"blk.0.ffn_gate_exps.weight": Importance(SUMS, torch.tensor(counts))}, ("a", "b"), 4, 512)


def loaders_means(path: Path, name: str) -> np.ndarray:
    """What llama-quantize makes of a file: counts rounded half away from zero, quotients, ones without tokens."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
    assert sums.dtype == counts.dtype == np.float32
    assert counts.shape == (len(sums), 1)
    whole = np.floor(counts + 0.5)
    return np.where(whole > 0, sums / np.maximum(whole, 1), 1.0)


@pytest.mark.parametrize("name", ["ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"])
def test_the_loader_gets_the_means(converter: Converter, tmp_path: Path, name: str) -> None:
    write_imatrix(converter.gguf, tmp_path / "x.gguf", matrix([2.0, 0.25, 7.4]))
    found = loaders_means(tmp_path / "x.gguf", f"blk.0.{name}.weight")
    assert np.allclose(found, SUMS.numpy() / np.array([[2.0], [0.25], [7.4]]), rtol=1e-6)


def test_what_is_written_is_read(converter: Converter, tmp_path: Path) -> None:
    given = matrix([2.0, 0.0, 7.0])
    assert given.uncovered == {"blk.0.ffn_gate_exps.weight": (1,)}
    write_imatrix(converter.gguf, tmp_path / "x.gguf", given)
    found = read_imatrix(converter.gguf, tmp_path / "x.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (("a", "b"), 4, 512)
    one = found.tensors["blk.0.ffn_gate_exps.weight"]
    assert torch.equal(one.counts, torch.tensor([2.0, 0.0, 7.0]))
    assert torch.equal(one.mean[1], torch.ones(8))
    assert np.allclose(one.mean.numpy(), loaders_means(tmp_path / "x.gguf", "blk.0.ffn_gate_exps.weight"))


def test_metadata_is_that_of_llama_imatrix(converter: Converter, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    write_imatrix(converter.gguf, tmp_path / "x.gguf", matrix([1.0, 1.0, 1.0]))
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    said = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert said == {"general.type": "imatrix", "imatrix.datasets": ["a", "b"], "imatrix.chunk_count": 4, "imatrix.chunk_size": 512}


def test_no_importances_are_refused(converter: Converter, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="negative or no number"):
        write_imatrix(converter.gguf, tmp_path / "x.gguf", matrix([1.0, float("nan"), 1.0]))
    with pytest.raises(BadInputError, match=r"have to be \[E, in\] and \[E\]"):
        write_imatrix(converter.gguf, tmp_path / "x.gguf", matrix([1.0, 1.0]))
