"""What cannot work is refused before any work: by name, with a remedy, and without a trace on the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moebit
from moebit.errors import BadInputError, MoebitError
from moebit.plan.plan import Plan
from tests.support.models import ARCHITECTURES, Checkpoints, quiet, random_model, save
from tests.support.outputs import Outputs, file_bytes, small_recipe, token_file

MIXTRAL = ARCHITECTURES["mixtral"]
GPTQ, RTN = small_recipe("gptq"), small_recipe("rtn")


@pytest.fixture
def model(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to be damaged."""
    return shutil.copytree(checkpoints.path(MIXTRAL), tmp_path / "model")  # type: ignore[no-any-return]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return token_file(tmp_path / "text.jsonl", 6 * 24)


def refusal(model: Path | str, out: Path, **options: Any) -> str:
    """The message with which `quantize` refuses; nothing was made of `out`."""
    partial = out.with_name(out.name + ".partial")
    before, interrupted = file_bytes(out.parent) if out.parent.is_dir() else {}, partial.exists()
    with pytest.raises(BadInputError) as error:
        moebit.quantize(model, out, **{"recipe": RTN, **options})
    if out.parent.is_dir():
        assert file_bytes(out.parent) == before
    assert partial.exists() == interrupted
    return str(error.value)


def contains(message: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in message, message


def change_tensors(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def drop_tensor(model: Path, layer: int, ending: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if f"layers.{layer}." in name and name.endswith(ending))]

    change_tensors(model, drop)


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


# --- the checkpoint


def test_no_such_model(tmp_path: Path) -> None:
    contains(refusal(tmp_path / "none", tmp_path / "out"), tmp_path / "none", "no such directory", "hub id")
    (tmp_path / "empty").mkdir()
    contains(refusal(tmp_path / "empty", tmp_path / "out"), tmp_path / "empty", "config.json")


def test_config_that_is_no_json(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')
    contains(refusal(model, tmp_path / "out"), "config.json", "not valid JSON")


def test_unknown_architecture(model: Path, tmp_path: Path) -> None:
    change_config(model, model_type="mixtrall")
    contains(refusal(model, tmp_path / "out"), "mixtrall", "newer transformers")


def test_no_weights(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    contains(refusal(model, tmp_path / "out"), model, "no safetensors")


def test_missing_shard(tmp_path: Path) -> None:
    model = save(random_model(MIXTRAL), tmp_path / "model", max_shard_size="300KB")
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    contains(refusal(model, tmp_path / "out"), shards[1].name, "missing", "download")


def test_truncated_shard(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size - 100)
    contains(refusal(model, tmp_path / "out"), file, "truncated", "again")


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 100, (20).to_bytes(8, "little") + b"<html>not found</html>"])
def test_a_shard_that_is_none(content: bytes, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(content)
    contains(refusal(model, tmp_path / "out"), "model.safetensors", "not a safetensors file", "again")


def test_missing_tensor(model: Path, tmp_path: Path) -> None:
    drop_tensor(model, 1, "self_attn.k_proj.weight")
    contains(refusal(model, tmp_path / "out"), "model.layers.1.self_attn.k_proj.weight", "lacks 1 tensor", "config.json")


def test_missing_expert(model: Path, tmp_path: Path) -> None:
    drop_tensor(model, 1, "experts.5.w2.weight")
    contains(refusal(model, tmp_path / "out"), "model.layers.1.mlp.experts.down_proj")


def test_wrong_shape(model: Path, tmp_path: Path) -> None:
    """Tensors that agree with each other but not with the configuration."""
    change_config(model, intermediate_size=48)
    contains(refusal(model, tmp_path / "out"), "model.layers.0.mlp.experts.gate_up_proj", [8, 64, 64], [8, 96, 64], "config.json")


def test_one_tensor_of_another_shape(model: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if n.endswith("layers.0.self_attn.o_proj.weight"))
        tensors[name] = tensors[name][:, :-1].contiguous()

    change_tensors(model, cut)
    contains(refusal(model, tmp_path / "out"), "model.layers.0.self_attn.o_proj.weight", [64, 63], [64, 64])


def test_one_expert_of_another_shape(model: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if n.endswith("experts.3.w1.weight") and "layers.1." in n)
        tensors[name] = tensors[name][:-1].contiguous()

    change_tensors(model, cut)
    contains(refusal(model, tmp_path / "out"), "model.layers.1.mlp.experts.gate_up_proj", "do not fit together")


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_weights_that_are_no_numbers(value: float, says: str, model: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[next(n for n in tensors if n.endswith("experts.3.w1.weight") and "layers.1." in n)][7, 11] = value

    change_tensors(model, spoil)
    contains(refusal(model, tmp_path / "out"), "layers.1.", "experts.3.w1.weight", f" {says} ", "[7, 11]", "damaged")


def test_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    contains(refusal(tmp_path / "llama", tmp_path / "out"), "LlamaForCausalLM", "dense")


def test_already_quantized(outputs: Outputs, model: Path, tmp_path: Path) -> None:
    contains(refusal(outputs.rtn(MIXTRAL), tmp_path / "out"), "already quantized", "full-precision")
    change_config(model, quantization_config={"quant_method": "compressed-tensors"})
    contains(refusal(model, tmp_path / "out"), "already quantized", "compressed-tensors", "full-precision")


def test_unfinished_output_as_a_model(model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "model.partial")
    contains(refusal(tmp_path / "model.partial", tmp_path / "out"), "model.partial", "unfinished", "--resume")


# --- the text


def test_no_text(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", recipe=GPTQ), "--text", "rtn")


def test_too_little_text(model: Path, tmp_path: Path) -> None:
    text = token_file(tmp_path / "short.jsonl", 5 * 24 + 23)
    message = refusal(model, tmp_path / "out", recipe=GPTQ, text={"short": text})
    contains(message, "'short'", "143 tokens", "5 windows of 24", "6 are needed", "calibration.samples=5", "calibration.seq_len")


def test_the_same_name_twice(model: Path, text: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", recipe=GPTQ, text=[f"a={text}", f"a={text}"]), "'a'", "twice", "NAME=FILE")


def test_missing_text(model: Path, tmp_path: Path) -> None:
    for recipe in (GPTQ, RTN):  # a recipe without calibration does not make a wrong path right
        contains(refusal(model, tmp_path / "out", recipe=recipe, text={"a": tmp_path / "none.txt"}), "no such file", tmp_path / "none.txt")


def test_text_that_is_not_utf8(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"caf\xe9 " * 200)
    contains(refusal(model, tmp_path / "out", recipe=GPTQ, text=[str(tmp_path / "t.txt")]), tmp_path / "t.txt", "not UTF-8", "convert")


def test_text_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("words " * 200)
    contains(refusal(model, tmp_path / "out", recipe=GPTQ, text=[str(tmp_path / "t.txt")]), tmp_path / "t.txt", "tokenizer", "input_ids")


def test_ids_of_another_vocabulary(model: Path, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", 200, vocabulary=1000)
    contains(refusal(model, tmp_path / "out", recipe=GPTQ, text={"t": text}), text, "vocabulary of 128", "tokenizer")


def test_windows_longer_than_the_context(model: Path, tmp_path: Path) -> None:
    text = token_file(tmp_path / "t.jsonl", 2000)
    message = refusal(model, tmp_path / "out", recipe=small_recipe(samples=2, seq_len=256), text={"t": text})
    contains(message, "calibration.seq_len 256", "128")


# --- the recipe


def test_unknown_recipe_key(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", recipe={"weights": {"bts": 4}}), "weights.bts", "unknown key", "'bits'")
    contains(refusal(model, tmp_path / "out", overrides={"solver.methd": "rtn"}), "solver.methd", "unknown key", "'method'")


def test_unknown_preset(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", recipe="gtpq-w4"), "'gtpq-w4'", "did you mean 'gptq-w4'")


def test_unknown_format(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", format="exl2"), "format", "native", "dense")


def test_group_size_that_does_not_divide(model: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The recipe's has a fallback; one that was asked of a module by name has none."""
    override = {"match": "re:.*experts$", "group_size": 64}
    message = refusal(model, tmp_path / "out", overrides={"weights.overrides": [override]})
    contains(message, "weights.overrides", "model.layers.0.mlp.experts", "group size 64", "32 input channels", "one of 32, -1")
    shared = checkpoints.path(ARCHITECTURES["qwen2_moe"])
    plan = moebit.quantize(shared, tmp_path / "out", recipe=small_recipe("rtn", weights={"group_size": 32}), dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.group_sizes["model.layers.0.mlp.shared_expert.down_proj"] == -1  # it has 40 input channels


def test_ignore_pattern_for_nothing(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", overrides={"weights.ignore": ["*.q_porj"]}), "'*.q_porj'", "matches no", "model.layers.0.")


def test_everything_ignored(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", overrides={"weights.ignore": ["*"]}), "quantizes nothing", "ignored")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", device="cuda"), "cuda", "--device cpu")


# --- the plan of bit widths

AT = "model.layers.0"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["version", "experts", "linears"]),
        ('{"version": 2}', ["version"]),
        (
            '{"version": 1, "experts": {"NAME.mlp.experts": {"down_proj": [4, 4]}}}',
            ["NAME.mlp.experts.down_proj", "2 widths for 8 experts"],
        ),
        ('{"version": 1, "experts": {"NAME.mlp.experts": {"down_proj": 7}}}', ["NAME.mlp.experts.down_proj", "7 bits", "2, 3, 4, 5, 6, 8"]),
        ('{"version": 1, "experts": {"NAME.mlp.experts": {"down": 4}}}', ["NAME.mlp.experts", "down"]),
        ('{"version": 1, "experts": {"NAME.mlp.experts": 4}}', ["NAME.mlp.experts"]),
        ('{"version": 1, "experts": {"NAME.mlp.expert": {"down_proj": 4}}}', ["NAME.mlp.expert ", "NAME.mlp.experts"]),
        ('{"version": 1, "linears": {"NAME.self_attn.qproj": 4}}', ["NAME.self_attn.qproj", "nearest: NAME.self_attn.q_proj"]),
        ('{"version": 1, "linears": {"NAME.self_attn.q_proj": 1}}', ["NAME.self_attn.q_proj", "1 bits"]),
        ('{"version": 1, "linears": {"NAME.self_attn.q_proj": [4]}}', ["NAME.self_attn.q_proj"]),
        ('{"version": 1, "linears": {"NAME.mlp.experts": 4}}', ["NAME.mlp.experts"]),
        ('{"version": 1, "linear": {"NAME.self_attn.q_proj": 4}}', ["linear"]),
    ],
)
def test_plans(content: str, says: list[str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content.replace("NAME", AT))
    contains(refusal(model, tmp_path / "out", plan=tmp_path / "plan.json"), *(part.replace("NAME", AT) for part in says))


def test_missing_plan(model: Path, tmp_path: Path) -> None:
    contains(refusal(model, tmp_path / "out", plan=str(tmp_path / "none.json")), "--plan", "no such file", tmp_path / "none.json")


# --- the output


def test_existing_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    contains(refusal(model, out), out, "exists", "--overwrite")
    (tmp_path / "file").write_text("x")
    contains(refusal(model, tmp_path / "file"), tmp_path / "file", "exists")


def test_interrupted_output(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("{}\n")
    contains(refusal(model, tmp_path / "out"), partial, "interrupted", "--resume", "--overwrite")


def test_the_input_as_output(model: Path, tmp_path: Path) -> None:
    """--overwrite replaces outputs, not the checkpoint that is being read: not by its own name, not by another."""
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "link", tmp_path / "other" / ".." / "model"):
        (tmp_path / "other").mkdir(exist_ok=True)
        contains(refusal(model, out, overwrite=True), model)


def test_no_disk_space(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    for recipe in (GPTQ, RTN):
        contains(refusal(model, tmp_path / "out", recipe=recipe, text={"t": text}), tmp_path, "needed", "0.00 GB are free", "-o")


def test_parent_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    contains(refusal(model, tmp_path / "file" / "out"), tmp_path / "file", "cannot write", "-o")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(model: Path, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    contains(refusal(model, parent / "out"), parent, "cannot write", "-o")


def test_parent_that_says_no(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for whoever the permissions do not hold back."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    contains(refusal(model, tmp_path / "out"), tmp_path, "cannot write", "-o")


def test_dry_run_refuses_alike(model: Path, tmp_path: Path) -> None:
    """The dry run looks at everything but the disk, and leaves nothing."""
    contains(refusal(model, tmp_path / "out", dry_run=True, recipe=GPTQ), "--text")
    plan = moebit.quantize(model, tmp_path / "out", recipe=RTN, dry_run=True)
    assert plan.size_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_refusal_is_a_moebit_error() -> None:
    assert issubclass(BadInputError, MoebitError)
