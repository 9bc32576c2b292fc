"""What a checkpoint's folder holds beside the weights that transformers loads, and which weights those are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moebit
from moebit.formats.output import INDEX
from moebit.storage.files import read_index
from moebit.storage.left_over import is_prediction, left_over
from tests.support.models import ARCHITECTURES, random_model, save
from tests.support.outputs import read_config, small_recipe, stored_tensors

GLM = ARCHITECTURES["glm4_moe"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose one shard has an index."""
    path = save(random_model(GLM), tmp_path / "source")
    shard = "model-00001-of-00001.safetensors"
    names = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / shard)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    return path


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("mtp.fc.weight", True),
        ("mtp.layers.0.mlp.experts.3.up_proj.weight", True),
        ("model.mtp_layers.0.enorm.weight", True),
        ("model.layers.2.eh_proj.weight", True),
        ("model.language_model.layers.3.enorm.weight", True),
        ("model.layers.1.eh_proj.weight", False),
        ("layers.0.attention.wq.weight", False),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", False),
        ("tok_embeddings.weight", False),
    ],
)
def test_names_of_multi_token_prediction(name: str, prediction: bool) -> None:
    assert is_prediction(name, 2) is prediction


@pytest.mark.parametrize("name", ["model.layers.2.eh_proj.weight", "mtp.fc.weight"])
def test_prediction_in_a_file_of_its_own_is_kept(name: str, source: Path, tmp_path: Path) -> None:
    value = torch.arange(32.0).reshape(4, 8)
    save_file({name: value, "model.layers.0.mlp.stray": torch.ones(2)}, source / "mtp.safetensors")
    found = moebit.inspect(source)
    assert found["not_in_model"] == [name]
    assert found["left_over"] == {"mtp.safetensors": 1}
    for format in ("native", "compressed-tensors"):
        out = tmp_path / format
        moebit.quantize(source, out, recipe=small_recipe("rtn"), format=format)
        assert torch.equal(stored_tensors(out)[name], value)
    ignore = read_config(tmp_path / "compressed-tensors")["quantization_config"]["ignore"]
    assert "mtp.fc" in ignore if "mtp" in name else r"re:model\.layers\.2\..*" in ignore


def test_other_files_are_named_and_not_read(source: Path) -> None:
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, source / "consolidated.safetensors")
    (source / "broken.safetensors").write_bytes(b"nothing")
    before = read_index(source)
    found = left_over(source, before, 2)
    assert found.files == {"broken.safetensors": 0, "consolidated.safetensors": 1}
    assert not found.prediction
    assert moebit.inspect(source)["left_over"] == found.files


def test_the_single_file_goes_before_an_older_index(source: Path) -> None:
    """transformers looks for model.safetensors first; so does moebit, and it says what of the index is not read."""
    shard = source / "model-00001-of-00001.safetensors"
    newer = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(shard).items()}
    save_file(newer, source / "model.safetensors")
    entries = read_index(source)
    assert {entry.file.name for entry in entries.values()} == {"model.safetensors"}
    assert torch.equal(entries["lm_head.weight"].read(), newer["lm_head.weight"])
    assert moebit.inspect(source)["left_over"] == {shard.name: len(newer)}


def test_types_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Kimi-K2 is DeepSeek-V3 under a name of its own, with code that is not run."""
    source = save(random_model(ARCHITECTURES["deepseek_v3"]), tmp_path / "source")
    config = read_config(source)
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (source / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": code}))
    assert moebit.inspect(source)["read_as"] == {"model_type": "kimi_k2", "as": "deepseek_v3"}
    moebit.quantize(source, tmp_path / "out", recipe=small_recipe("rtn"))
    written = read_config(tmp_path / "out")
    assert written["model_type"] == "deepseek_v3"
    assert "auto_map" not in written
    assert moebit.inspect(tmp_path / "out")["read_as"] is None
