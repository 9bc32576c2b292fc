"""GGUF files read as checkpoints: llama.cpp's converter writes them, PyPI's gguf says what their values are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

import moebit
from moebit.errors import BadInputError
from moebit.formats.gguf.converter import Converter
from moebit.formats.opening import open_checkpoint
from tests.support.gguf import write_plain
from tests.support.outputs import small_recipe, stored_tensors

PERMUTED, SHARED = "mixtral", "qwen2_moe"


def folder(checkpoint: Path, directory: Path) -> Path:
    """The configuration and the tokenizer of a checkpoint, without its weights."""
    shutil.copytree(checkpoint, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    return directory


def q8(value: Tensor) -> Tensor:
    """What PyPI's gguf makes of the rows in blocks of 32 with float16 scales."""
    rows = value.float().reshape(-1, value.shape[-1]).numpy()
    decoded = dequantize(quantize(rows, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(np.ascontiguousarray(decoded)).view(value.shape)


@pytest.fixture(scope="module", params=[PERMUTED, SHARED])
def plain(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint(request.param)


def test_reads_what_the_converter_wrote(converter: Converter, plain: Path, tmp_path: Path) -> None:
    rows = write_plain(converter, plain, folder(plain, tmp_path / "f32") / "model.gguf")
    write_plain(converter, plain, folder(plain, tmp_path / "q8") / "model.gguf", "MOSTLY_Q8_0", rows)
    originals = open_checkpoint(plain).weights
    exact, rounded = open_checkpoint(tmp_path / "f32"), open_checkpoint(tmp_path / "q8" / "model.gguf")
    assert exact.shipped is None
    assert rounded.shipped is not None
    assert rounded.shipped.scheme == "GGUF Q8_0"
    assert rounded.shipped.average_bits == 8.5
    assert exact.weights.available() == rounded.weights.available() == originals.available()
    for name in originals.available():
        value = originals.parameter(name)
        assert torch.equal(exact.weights.parameter(name), value), name
        found = rounded.weights.parameter(name)
        assert torch.equal(found, value if found.dtype == torch.float32 else q8(value).half()), name
    stacked = next(name for name in sorted(originals.available()) if name.endswith("experts.down_proj"))
    assert torch.equal(exact.weights.expert_rows(stacked, 3, 5), originals.parameter(stacked)[3:5])
    vector = next(name for name in sorted(originals.available()) if name.endswith("layernorm.weight"))
    assert torch.equal(exact.weights.rows(vector, 2, 7), originals.parameter(vector)[2:7])


def test_quantizes_as_the_plain_checkpoint(converter: Converter, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    plain = checkpoint(SHARED)
    write_plain(converter, plain, folder(plain, tmp_path / "in") / "model.gguf")
    for path in (plain, tmp_path / "in"):
        moebit.quantize(path, tmp_path / f"out-{path.name}", recipe=small_recipe("rtn"))
    one, other = (stored_tensors(tmp_path / f"out-{path.name}") for path in (plain, tmp_path / "in"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_refusals(converter: Converter, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    plain = checkpoint(SHARED)
    here = folder(plain, tmp_path / "in")
    write_plain(converter, plain, here / "model.gguf")
    whole = (here / "model.gguf").read_bytes()
    (tmp_path / "alone").mkdir()
    shutil.copy(here / "model.gguf", tmp_path / "alone" / "model.gguf")
    with pytest.raises(BadInputError, match=r"there is no config\.json beside it"):
        open_checkpoint(tmp_path / "alone" / "model.gguf")
    (here / "model.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(BadInputError, match=r"model\.gguf: .*truncated"):
        open_checkpoint(here)
    (here / "model.gguf").write_bytes(whole)
    (here / "other.gguf").write_bytes(whole)
    with pytest.raises(BadInputError, match="2 GGUF files"):
        open_checkpoint(here)
    other = folder(checkpoint(PERMUTED), tmp_path / "other")
    shutil.copy(here / "model.gguf", other)
    with pytest.raises(
        BadInputError, match=r"of the architecture .qwen2moe.; config\.json beside it describes a model that llama\.cpp calls .llama."
    ):
        open_checkpoint(other)
