"""What moebit reads from a checkpoint against what transformers' `from_pretrained` and the safetensors library read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moebit.errors import BadInputError
from moebit.model.opening import open_hub_checkpoint
from moebit.model.skeleton import dematerialize, materialize, skeleton
from moebit.model.structure import decoder_list
from moebit.storage.checkpoint import resolve
from moebit.storage.config import load_config
from moebit.storage.files import INDEX
from moebit.storage.hub import HubWeights
from tests.support.models import ARCHITECTURES, EXPERTS, Architecture, Checkpoints, quiet, random_model, save
from tests.support.observer import observed
from tests.support.opened import Opened

CHUNKS = [(0, EXPERTS), (0, 3), (3, EXPERTS)]
MIXTRAL = ARCHITECTURES["mixtral"]


def expert_names(names: Iterable[str]) -> list[str]:
    """Parameters that hold one row of the first axis per expert."""
    return [name for name in names if name.rpartition(".")[0].endswith(".experts")]


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by the safetensors library."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# --- every architecture


def test_parameters_equal_from_pretrained(opened: Opened) -> None:
    expected = opened.reference.model.state_dict()
    on_disk = stored(opened.checkpoint.path)
    tied = set(opened.reference.model.all_tied_weights_keys)
    for name, tensor in expected.items():
        mine = opened.weights.parameter(name)
        assert torch.equal(mine.float(), tensor), name
        if name not in tied:
            assert {on_disk[part].dtype for part in opened.weights.stored_names(name)} == {mine.dtype}, name
    assert opened.weights.available() | tied == set(expected)
    assert opened.weights.unused == []


def test_every_expert_parameter_is_tested(opened: Opened) -> None:
    layers = sum(opened.architecture.moe)
    assert len(expert_names(opened.reference.model.state_dict())) == layers * (4 if opened.architecture.bias else 2)


def test_expert_rows_are_slices(opened: Opened) -> None:
    expected = opened.reference.model.state_dict()
    for name in expert_names(expected):
        for start, stop in [(3, 6), (0, 1), (7, 8), (0, EXPERTS)]:
            assert torch.equal(opened.weights.expert_rows(name, start, stop).float(), expected[name][start:stop]), (name, start, stop)


def test_expert_rows_read_only_these_experts(opened: Opened) -> None:
    """The point of reading in chunks: three experts of eight cost three eighths of the bytes."""
    for name in expert_names(opened.weights.available()):
        with observed("moebit.read") as read:
            rows = opened.weights.expert_rows(name, 3, 6)
        assert sum(size for *_, size in read) == rows.nbytes, name


@pytest.mark.parametrize("chunks", [CHUNKS[:1], CHUNKS[1:]], ids=["whole", "chunks"])
def test_stored_form_gives_the_stored_tensors_back(opened: Opened, chunks: list[tuple[int, int]]) -> None:
    on_disk = stored(opened.checkpoint.path)
    written: dict[str, Tensor] = {}
    for name in sorted(opened.weights.available()):
        if name not in expert_names([name]):
            pieces = [opened.weights.stored_form(name, opened.weights.parameter(name))]
        else:
            pieces = [opened.weights.stored_form(name, opened.weights.expert_rows(name, *span), span[0]) for span in chunks]
        for key in {key for piece in pieces for key in piece}:
            assert key not in written, f"{key} comes from two parameters"
            parts = [piece[key] for piece in pieces if key in piece]
            # Experts that are stored stacked come back stacked, a chunk at a time; those stored one by one each in one piece.
            assert len(parts) == 1 or len(parts) == len(pieces)
            written[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    assert written.keys() == on_disk.keys()
    for key, tensor in on_disk.items():
        assert same(written[key], tensor), key


def test_stored_names(opened: Opened) -> None:
    named = [part for name in opened.weights.available() for part in opened.weights.stored_names(name)]
    assert sorted(named) == sorted(stored(opened.checkpoint.path)), "every stored tensor belongs to one parameter"


def test_sharded_equals_single(opened: Opened, tmp_path: Path) -> None:
    sharded = save(random_model(opened.architecture), tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    checkpoint = open_hub_checkpoint(sharded)
    assert checkpoint.weights.available() == opened.weights.available()
    for name in opened.weights.available():
        assert same(checkpoint.weights.parameter(name), opened.weights.parameter(name)), name
    for name in expert_names(opened.weights.available()):
        assert same(checkpoint.weights.expert_rows(name, 2, 5), opened.weights.expert_rows(name, 2, 5)), name
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))


def test_skeleton_is_on_meta_but_its_computed_buffers_are_right(opened: Opened) -> None:
    model = opened.checkpoint.model
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    expected = dict(opened.reference.model.named_non_persistent_buffers())
    computed = dict(model.named_non_persistent_buffers())
    assert computed.keys() == expected.keys()
    fresh = dict(skeleton(opened.checkpoint.config).named_non_persistent_buffers())  # the reference's may have changed with use (longrope)
    with quiet():
        built = AutoModelForCausalLM.from_config(opened.checkpoint.config)
    for name, value in built.named_non_persistent_buffers():
        assert same(fresh[name], value), name


def test_materialize_and_back(opened: Opened) -> None:
    expected = opened.reference.layers
    index = opened.architecture.first_moe
    name = f"{opened.reference.layers_name}.{index}"
    layer = opened.checkpoint.model.get_submodule(name)
    experts = layer.get_submodule(f"{opened.architecture.block}.experts")
    materialize(layer, name, opened.weights, skip=[experts])
    try:
        for key, tensor in expected[index].state_dict().items():
            mine = layer.state_dict()[key]
            if key.startswith(f"{opened.architecture.block}.experts."):
                assert mine.device.type == "meta"
            else:
                assert same(mine, tensor), key
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert all(isinstance(parameter, nn.Parameter) for parameter in layer.parameters())
    finally:
        dematerialize(layer)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


def test_layers_in_bf16_are_what_transformers_loads_in_bf16(opened: Opened) -> None:
    """The types of all parameters and buffers, those kept in float32 among them, and their values."""
    with quiet():
        expected = AutoModelForCausalLM.from_pretrained(opened.checkpoint.path, dtype=torch.bfloat16)
    checkpoint = open_hub_checkpoint(opened.checkpoint.path, torch.bfloat16)
    name = f"{opened.reference.layers_name}.{opened.architecture.first_moe}"
    layer, theirs = checkpoint.model.get_submodule(name), expected.get_submodule(name)
    materialize(layer, name, checkpoint.weights)
    mine = dict(layer.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert mine[key].dtype == tensor.dtype, key
        assert torch.equal(mine[key], tensor), key
    for key, buffer in checkpoint.model.named_non_persistent_buffers():
        assert buffer.dtype == expected.get_buffer(key).dtype, key


# --- tied embeddings


@pytest.fixture
def tied(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return copied(checkpoints, ARCHITECTURES["qwen2_moe"], tmp_path)


def copied(checkpoints: Checkpoints, architecture: Architecture, directory: Path) -> Path:
    return Path(shutil.copytree(checkpoints.path(architecture), directory / architecture.name))


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_tied_head_is_read_from_the_embeddings(tied: Path) -> None:
    assert "lm_head.weight" not in stored(tied)
    weights = open_hub_checkpoint(tied).weights
    assert same(weights.parameter("lm_head.weight"), stored(tied)["model.embed_tokens.weight"])


def test_tied_head_that_is_stored_too(tied: Path) -> None:
    edit(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    weights = open_hub_checkpoint(tied).weights
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert same(weights.parameter(name), stored(tied)["model.embed_tokens.weight"])


def test_tied_embeddings_stored_under_the_heads_name(tied: Path) -> None:
    """transformers ties in both directions: whichever of the two is stored counts."""
    embeddings = stored(tied)["model.embed_tokens.weight"]
    edit(tied, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    with quiet():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tied).model.embed_tokens.weight, embeddings)
    weights = open_hub_checkpoint(tied).weights
    assert same(weights.parameter("model.embed_tokens.weight"), embeddings)


# --- what is wrong with a checkpoint is said by name, with what to do about it


@pytest.fixture
def mixtral(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return copied(checkpoints, MIXTRAL, tmp_path)


EXPERT = "model.layers.1.block_sparse_moe.experts.5"


def test_the_names_used_below_are_those_on_disk(mixtral: Path) -> None:
    assert {f"{EXPERT}.{leaf}.weight" for leaf in ("w1", "w2", "w3")} < set(stored(mixtral))


def test_missing_tensor(mixtral: Path) -> None:
    edit(mixtral, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(BadInputError, match=r"lacks 1 tensors of Mixtral.*, first 'model\.layers\.1\.input_layernorm\.weight'; .*shard"):
        open_hub_checkpoint(mixtral)


@pytest.mark.parametrize("leaves", [("w1",), ("w2",), ("w3",), ("w1", "w3"), ("w1", "w2", "w3")], ids="+".join)
def test_missing_expert(mixtral: Path, leaves: tuple[str, ...]) -> None:
    edit(mixtral, lambda tensors: [tensors.pop(f"{EXPERT}.{leaf}.weight") for leaf in leaves])
    with pytest.raises(BadInputError, match=r"model\.layers\.1\.mlp\.experts\.(gate_up|down)_proj"):
        open_hub_checkpoint(mixtral)


def test_all_experts_of_a_layer_missing(mixtral: Path) -> None:
    edit(mixtral, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.block_sparse_moe.experts." in name])
    with pytest.raises(BadInputError, match=r"lacks 2 tensors .*first 'model\.layers\.1\.mlp\.experts\.down_proj'"):
        open_hub_checkpoint(mixtral)


def test_one_expert_of_another_shape(mixtral: Path) -> None:
    edit(mixtral, lambda tensors: tensors.update({f"{EXPERT}.w2.weight": torch.zeros(64, 31)}))
    with pytest.raises(BadInputError, match=r"model\.layers\.1\.mlp\.experts\.down_proj"):
        open_hub_checkpoint(mixtral)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hidden_size": 32}, r"(model\.embed_tokens|lm_head)\.weight"),
        ({"vocab_size": 64}, r"(model\.embed_tokens|lm_head)\.weight"),
        ({"num_local_experts": 4}, r"model\.layers\.0\.mlp\.(gate|experts)"),
        ({"intermediate_size": 16}, r"model\.layers\.0\.mlp\.experts"),
    ],
)
def test_configuration_of_another_model(mixtral: Path, changes: dict[str, Any], name: str) -> None:
    edit_config(mixtral, **changes)
    with pytest.raises(BadInputError, match=rf"tensor '{name}.*has shape .*the configuration says .*do not belong together"):
        open_hub_checkpoint(mixtral)


def test_more_layers_than_stored(mixtral: Path) -> None:
    edit_config(mixtral, num_hidden_layers=3)
    with pytest.raises(BadInputError, match=r"lacks \d+ tensors .*'model\.layers\.2\."):
        open_hub_checkpoint(mixtral)


def test_tensors_that_no_parameter_wants_are_listed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """DeepSeek-V3's checkpoints hold a further layer, for predicting more than one token, that transformers doesn't load."""
    path = copied(checkpoints, ARCHITECTURES["deepseek_v3"], tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(32, 64)}
    before = open_hub_checkpoint(path).weights.available()
    edit(path, lambda tensors: tensors.update(extra))
    weights = open_hub_checkpoint(path).weights
    assert isinstance(weights, HubWeights)
    assert sorted(weights.unused) == sorted(extra)
    assert weights.available() == before


def test_unknown_architecture(mixtral: Path) -> None:
    edit_config(mixtral, model_type="mixtral_of_the_future")
    with pytest.raises(BadInputError, match=r"does not know the architecture 'mixtral_of_the_future' (?s:.*)newer transformers"):
        open_hub_checkpoint(mixtral)


def test_no_model_type(mixtral: Path) -> None:
    edit_config(mixtral, model_type=..., architectures=...)
    with pytest.raises(BadInputError, match=r"architecture None"):
        open_hub_checkpoint(mixtral)


def test_no_causal_language_model(mixtral: Path) -> None:
    edit_config(mixtral, model_type="vit")
    with pytest.raises(BadInputError, match=r"no causal language model for 'vit'"):
        open_hub_checkpoint(mixtral)


def test_configuration_that_is_no_json(mixtral: Path) -> None:
    (mixtral / "config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"config\.json: not valid JSON"):
        load_config(mixtral)


def test_dense_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with quiet():
        path = save(AutoModelForCausalLM.from_config(config), tmp_path / "llama")
    checkpoint = open_hub_checkpoint(path)
    with pytest.raises(BadInputError, match=r"LlamaForCausalLM has no routed experts .*a quantizer for dense models"):
        decoder_list(checkpoint.model)


@pytest.mark.parametrize("method", ["gptq", "fp8", "compressed-tensors", "moebit"])
def test_already_quantized(mixtral: Path, method: str) -> None:
    edit_config(mixtral, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(BadInputError, match=rf"already quantized \({method}\); give the full-precision checkpoint"):
        open_hub_checkpoint(mixtral)


def test_truncated_shard_is_named(mixtral: Path) -> None:
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInputError, match=r"model\.safetensors: truncated"):
        open_hub_checkpoint(mixtral)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = save(random_model(MIXTRAL), tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))[1]
    (path / shard).unlink()
    with pytest.raises(BadInputError, match=shard):
        open_hub_checkpoint(path)


def test_resolve(mixtral: Path, tmp_path: Path) -> None:
    assert resolve(mixtral) == resolve(str(mixtral)) == mixtral
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"empty: no config\.json here"):
        resolve(tmp_path / "empty")
    for nowhere in (str(tmp_path / "nowhere"), "./some/model", "a/b/c", "nowhere"):
        with pytest.raises(BadInputError, match="no such directory"):
            resolve(nowhere)
