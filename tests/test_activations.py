"""Outputs whose inputs are rotated and rounded: streamed, loaded and generated from, against a naive run of the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebit
from moebit.errors import BadInputError
from moebit.evaluate.streaming import evaluate
from moebit.formats.opening import open_checkpoint
from moebit.model.structure import find_structure
from moebit.plan.plan import Plan
from moebit.quantize.report import Result
from moebit.streaming.stream import Stream
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints, quiet, random_model, save, windows
from tests.support.outputs import file_bytes, quantization, read_config, small_recipe, stored_tensors, token_file
from tests.support.rounded import oracle

A4 = {"bits": 4, "symmetric": False, "clip": 0.9, "qkv_bits": 4}
A8 = {"bits": 8, "symmetric": True, "clip": 1.0, "qkv_bits": 16}
# A rounded value that lies on a border falls on either side, depending on the last bit of a sum: then logits differ by more than rounding.
FLIPPED, SAME = 0.03, 1e-4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe-a4": ("olmoe", {"activations": A4}),
    "olmoe-hadamard-a4": ("olmoe", {"activations": A4, "rotation": {"online": "hadamard"}}),
    "qwen2_moe-duquant-a4": ("qwen2_moe", {"activations": A4, "rotation": {"online": "duquant"}}),
    "deepseek_v3-duquant-expert": ("deepseek_v3", {"activations": A4, "rotation": {"online": "duquant", "down": "expert"}}),
    "gpt_oss-hadamard-expert": ("gpt_oss", {"activations": A4, "rotation": {"online": "hadamard", "down": "expert"}}),
    "mixtral-a8": ("mixtral", {"activations": A8}),
    "qwen3_moe-duquant-alone": ("qwen3_moe", {"rotation": {"online": "duquant"}}),
}


def recipe(**sections: Any) -> dict[str, Any]:
    return {**small_recipe("rtn", weights={"symmetric": False}), **sections}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("text") / "t.jsonl", 400)


@pytest.fixture(scope="module")
def made(checkpoints: Checkpoints, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's output, made when first asked for."""
    directory = tmp_path_factory.mktemp("rounded")

    class Made(dict[str, Path]):
        def __missing__(self, case: str) -> Path:
            name, sections = CASES[case]
            moebit.quantize(checkpoints.path(ARCHITECTURES[name]), directory / case, recipe=recipe(**sections), text={"t": text})
            self[case] = directory / case
            return self[case]

    return Made()


def load(directory: Path, **options: Any) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, **options).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=windows()[:3], use_cache=False).logits.float()  # type: ignore[no-any-return]


def streamed(directory: Path, chunk: int) -> Tensor:
    checkpoint = open_checkpoint(directory)
    stream = Stream(checkpoint, find_structure(checkpoint.model), windows()[:3])
    for index in range(len(stream.structure.layers)):
        stream.step(index, chunk)
    return torch.cat([piece for _, piece in stream.logits()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the same logits everywhere


@pytest.mark.parametrize("case", CASES)
def test_against_a_naive_run(case: str, made: dict[str, Path], checkpoints: Checkpoints) -> None:
    architecture = ARCHITECTURES[CASES[case][0]]
    output, original = made[case], checkpoints.path(architecture)
    wanted = logits(oracle(architecture, original, output))
    loaded = logits(load(output, dtype=torch.float32))
    at_once, in_chunks = streamed(output, 8), streamed(output, 3)
    for got in (loaded, at_once, in_chunks):
        assert distance(got, wanted) < (FLIPPED if "activations" in CASES[case][1] else SAME)
    assert distance(wanted, checkpoints.reference(architecture).logits[:3]) > 2 * FLIPPED  # there is something to see


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=str)
def test_every_architecture(architecture: Architecture, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Rotated inputs alone, where every digit counts, and with everything that can be rounded."""
    original = checkpoints.path(architecture)
    rotation = {"online": "hadamard", "down": "expert"}
    for name, sections in {"turned": {"rotation": rotation}, "rounded": {"rotation": rotation, "activations": {**A4, "bits": 8}}}.items():
        output = tmp_path / name
        moebit.quantize(original, output, recipe=recipe(**sections))
        wanted, limit = logits(oracle(architecture, original, output)), SAME if name == "turned" else FLIPPED
        assert distance(logits(load(output, dtype=torch.float32)), wanted) < limit
        assert distance(streamed(output, 3), wanted) < limit


def test_what_is_written(made: dict[str, Path]) -> None:
    """The configuration says version 2, and every tensor of every transform is there."""
    config = read_config(made["qwen2_moe-duquant-a4"])["quantization_config"]
    assert config["format_version"] == 2
    said, tensors = config["activations"], stored_tensors(made["qwen2_moe-duquant-a4"])
    assert said["inputs"] == {"bits": 4, "symmetric": False, "clip": 0.9}
    assert said["attention"] == {**said["inputs"], "modules": [f"model.layers.{i}.self_attn" for i in (0, 1)]}
    layer = "model.layers.0."
    read = {linear: name for name, entry in said["transforms"].items() for linear in entry["linears"] if linear.startswith(layer)}
    assert read == {
        **{f"{layer}self_attn.{p}_proj": f"{layer}self_attn.q_proj.transform" for p in "qkv"},
        f"{layer}self_attn.o_proj": f"{layer}self_attn.o_proj.transform",
        **{f"{layer}mlp.shared_expert.{p}_proj": f"{layer}mlp.experts.first_transform" for p in ("gate", "up")},
        f"{layer}mlp.shared_expert.down_proj": f"{layer}mlp.shared_expert.down_proj.transform",
    }
    assert said["transforms"][f"{layer}mlp.experts.first_transform"]["channels"] == 64
    assert said["transforms"][f"{layer}mlp.experts.down_transform"] == {
        "kind": "duquant", "channels": 32, "block": 32, "count": 1, "linears": [],
    }  # fmt: skip
    assert said["transforms"][f"{layer}mlp.shared_expert.down_proj.transform"]["block"] == 8  # of 40 channels
    stored = {name for name in tensors if "transform." in name}
    assert stored == {f"{name}.{leaf}" for name in said["transforms"] for leaf in ("first", "permutation", "second")}
    own = read_config(made["deepseek_v3-duquant-expert"])["quantization_config"]["activations"]["transforms"]
    assert own["model.layers.1.mlp.experts.down_transform"]["count"] == 8
    plain = read_config(made["mixtral-a8"])["quantization_config"]["activations"]
    assert plain == {"inputs": {"bits": 8, "symmetric": True, "clip": 1.0}}


def test_weights_only_outputs_say_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    moebit.quantize(checkpoints.path(ARCHITECTURES["mixtral"]), tmp_path / "out", recipe=recipe())
    config = read_config(tmp_path / "out")["quantization_config"]
    assert config["format_version"] == 1
    assert "activations" not in config


def test_evaluate_sees_the_rounding(checkpoints: Checkpoints, made: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """The same weights with inputs of 8 and of 3 bits: the fewer, the further from full precision."""
    original = checkpoints.path(ARCHITECTURES["mixtral"])
    moebit.quantize(original, tmp_path / "a3", recipe=recipe(activations={**A8, "bits": 3}))
    moebit.quantize(original, tmp_path / "a16", recipe=recipe())
    kl = {
        name: evaluate(path, against=original, text={"t": text}, window=16, max_tokens=160)["texts"]["t"]["kl"]
        for name, path in {"a16": tmp_path / "a16", "a8": made["mixtral-a8"], "a3": tmp_path / "a3"}.items()
    }
    assert kl["a16"] == pytest.approx(kl["a8"], rel=0.2)
    assert kl["a8"] != kl["a16"]
    assert kl["a3"] > 3 * kl["a8"]


# --- transforms


@pytest.mark.parametrize(
    ("method", "online"),
    [
        ("rtn", "hadamard"),
        ("gptq", "duquant"),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("rtn", "duquant"), ("gptq", "hadamard"))),
    ],
)
def test_the_function_stays(method: str, online: str, checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """Eight bits of weights and whole activations: hardly anything changes, rotated or not."""
    architecture = ARCHITECTURES["qwen2_moe"]
    original, changes = checkpoints.path(architecture), {}
    for rotation in ("none", online):
        chosen = {**small_recipe(method, weights={"bits": 8}), "rotation": {"online": rotation, "down": "expert"}}
        moebit.quantize(original, tmp_path / rotation, recipe=chosen, text={"t": text})
        changes[rotation] = distance(logits(load(tmp_path / rotation, dtype=torch.float32)), checkpoints.reference(architecture).logits[:3])
    assert changes[online] < 2 * changes["none"] < 0.1


def test_gptq_solves_for_rotated_inputs(checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """On the calibration inputs of the first layer GPTQ's outputs are nearer than round-to-nearest's, as without a rotation."""
    architecture = ARCHITECTURES["olmoe"]
    original, ids = checkpoints.path(architecture), torch.tensor(json.loads(text.read_text())["input_ids"])[:384].view(16, 24)

    def queries(model: Any) -> Tensor:
        seen: list[Tensor] = []
        hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: seen.append(out))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        hook.remove()
        return seen[0]

    wanted, errors = queries(checkpoints.reference(architecture).model), {}
    for method in ("rtn", "gptq"):
        chosen = {**small_recipe(method, weights={"bits": 3}, samples=12), "rotation": {"online": "hadamard"}}
        moebit.quantize(original, tmp_path / method, recipe=chosen, text={"t": text})
        errors[method] = distance(queries(load(tmp_path / method, dtype=torch.float32)), wanted)
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_channels_that_no_block_divides(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """An odd number of channels has no block: said in the plan, and that input is left as it is."""
    architecture = ARCHITECTURES["mixtral"]
    original = save(random_model(architecture, intermediate_size=33), tmp_path / "odd")
    chosen = recipe(activations=A8, rotation={"online": "hadamard"})
    plan = moebit.quantize(original, tmp_path / "out", recipe=chosen, dry_run=True)
    assert isinstance(plan, Plan)
    said = plan.describe()["activations"]
    assert set(said["untransformed"]) == {f"model.layers.{i}.mlp.experts.down_transform" for i in (0, 1)}
    moebit.quantize(original, tmp_path / "out", recipe=chosen)
    wanted = logits(oracle(architecture, original, tmp_path / "out"))
    assert distance(logits(load(tmp_path / "out", dtype=torch.float32)), wanted) < FLIPPED


# --- bytes


@pytest.mark.parametrize("case", ["qwen2_moe-duquant-a4", pytest.param("deepseek_v3-duquant-expert", marks=pytest.mark.slow)])
def test_the_same_bytes_again_and_after_an_interruption(
    case: str, made: dict[str, Path], checkpoints: Checkpoints, text: Path, tmp_path: Path
) -> None:
    name, sections = CASES[case]
    arguments: dict[str, Any] = {"recipe": recipe(**sections), "text": {"t": text}}

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moebit.quantize(checkpoints.path(ARCHITECTURES[name]), tmp_path / "out", progress=stop, **arguments)
    moebit.quantize(checkpoints.path(ARCHITECTURES[name]), tmp_path / "out", resume=True, **arguments)
    assert file_bytes(tmp_path / "out") == file_bytes(made[case])
    moebit.quantize(checkpoints.path(ARCHITECTURES[name]), tmp_path / "other", seed=1, **arguments)
    assert file_bytes(tmp_path / "other").keys() == file_bytes(made[case]).keys()
    assert {n for n, data in file_bytes(tmp_path / "other").items() if data != file_bytes(made[case])[n]} & {
        n for n in file_bytes(made[case]) if n.endswith(".safetensors")
    }


@pytest.mark.slow
def test_little_memory(made: dict[str, Path], checkpoints: Checkpoints, text: Path, tmp_path: Path) -> None:
    """A few experts at a time, activations in files: transforms of experts are written in pieces."""
    architecture = ARCHITECTURES["deepseek_v3"]
    result = moebit.quantize(
        checkpoints.path(architecture), tmp_path / "out", recipe=recipe(**CASES["deepseek_v3-duquant-expert"][1]), text={"t": text},
        memory=2**17,
    )  # fmt: skip
    assert isinstance(result, Result)
    assert result.plan.chunk[1] < 8
    wanted = logits(oracle(architecture, checkpoints.path(architecture), tmp_path / "out"))
    assert distance(logits(load(tmp_path / "out", dtype=torch.float32)), wanted) < FLIPPED


# --- the life of a loaded model


def test_save_and_load_again(made: dict[str, Path], tmp_path: Path) -> None:
    loaded = load(made["qwen2_moe-duquant-a4"])
    with quiet():
        loaded.save_pretrained(tmp_path)
    assert (
        read_config(tmp_path)["quantization_config"]["activations"]
        == read_config(made["qwen2_moe-duquant-a4"])["quantization_config"]["activations"]
    )
    assert torch.equal(logits(load(tmp_path)), logits(loaded))


def test_bfloat16(made: dict[str, Path]) -> None:
    """Transforms stay float32; logits are those of float32 but for rounding of the type and its flips."""
    loaded = load(made["qwen2_moe-duquant-a4"], dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.transform"
    assert torch.equal(loaded.get_submodule(name).first, stored_tensors(made["qwen2_moe-duquant-a4"])[f"{name}.first"])
    whole = logits(load(made["qwen2_moe-duquant-a4"], dtype=torch.float32))
    assert distance(logits(loaded), whole) < 0.3


def test_eager_and_sdpa(made: dict[str, Path]) -> None:
    """Whatever attention runs behind the rounding; a plain one chosen later is refused."""
    a, b = (load(made["olmoe-a4"], dtype=torch.float32, attn_implementation=name) for name in ("eager", "sdpa"))
    assert distance(logits(a), logits(b)) < FLIPPED
    b.set_attn_implementation("sdpa")
    with pytest.raises(BadInputError, match="moebit-sdpa"):
        logits(b)


def test_decoding_with_a_cache(made: dict[str, Path]) -> None:
    """Token by token, keys from the cache: the same logits as all at once."""
    loaded = load(made["olmoe-hadamard-a4"], dtype=torch.float32)
    prompt = windows()[:1]
    with torch.no_grad():
        whole, cache, steps = loaded(input_ids=prompt, use_cache=False).logits, None, []
        for position in range(prompt.shape[1]):
            out = loaded(input_ids=prompt[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert distance(torch.cat(steps, 1), whole) < FLIPPED


# --- what is said about it


def test_inspect_and_plan(made: dict[str, Path], checkpoints: Checkpoints) -> None:
    said = moebit.inspect(made["olmoe-hadamard-a4"])["quantized"]
    rounding = {"bits": 4, "symmetric": False, "clip": 0.9}
    assert said["activations"] == {
        "inputs": rounding, "attention": {**rounding, "modules": 2}, "transforms": {"kind": "hadamard", "count": 8},
    }  # fmt: skip
    assert said["engines"]["transformers"]["runs"]
    assert not said["engines"]["vllm"]["runs"]
    assert "activations" not in moebit.inspect(checkpoints.path(ARCHITECTURES["olmoe"]))
    plan = moebit.inspect(checkpoints.path(ARCHITECTURES["qwen3_next"]), recipe(activations=A4))["plan"]["activations"]
    assert plan["attention"]["modules"] == 1
    assert set(plan["inputs_only"]) == {"model.layers.0", "model.layers.2"}  # linear attention
    assert all("interface" in why for why in plan["inputs_only"].values())


@pytest.mark.parametrize("leaf", ["first", "permutation", "second", "signs"])
def test_verify_knows_transforms(leaf: str, made: dict[str, Path], tmp_path: Path) -> None:
    case = "olmoe-hadamard-a4" if leaf == "signs" else "qwen2_moe-duquant-a4"
    assert moebit.verify(made[case])["state"] == "fine"
    directory = Path(shutil.copytree(made[case], tmp_path / "copy"))
    name = f"model.layers.1.mlp.experts.down_transform.{leaf}"
    file = next(f for f in directory.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = moebit.verify(directory)
    assert found["state"] == "damaged"
    assert any(name in finding["where"] and "these are not" in finding["what"] for finding in found["findings"])


def test_verify_misses_transforms(made: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made["olmoe-hadamard-a4"], tmp_path / "copy"))
    config = read_config(directory)
    said = config["quantization_config"]["activations"]["transforms"]
    gone = next(iter(said))
    entry = said.pop(gone)
    said["model.layers.7.transform"] = entry
    (directory / "config.json").write_text(json.dumps(config))
    whats = " ".join(f"{finding['what']} {finding['where']}" for finding in moebit.verify(directory)["findings"])
    assert "says nothing of this transform" in whats
    assert "'model.layers.7', which is not quantized" in whats
    assert "'model.layers.7.transform.signs', which no shard has" in whats
    config["quantization_config"] |= {"activations": None}
    (directory / "config.json").write_text(json.dumps(config))
    assert any("format_version is 2 without" in finding["what"] for finding in moebit.verify(directory)["findings"])


def test_old_readers_refuse(made: dict[str, Path]) -> None:
    """Version 1 knows nothing of inputs: an output that needs them has another number."""
    assert quantization(made["olmoe-a4"])
    assert read_config(made["olmoe-a4"])["quantization_config"]["format_version"] != 1


# --- compressed-tensors and dense


def test_other_formats(checkpoints: Checkpoints, tmp_path: Path) -> None:
    original = checkpoints.path(ARCHITECTURES["mixtral"])
    with pytest.raises(BadInputError, match="dense has no place"):
        moebit.quantize(original, tmp_path / "d", recipe=recipe(activations=A8), format="dense")
    with pytest.raises(BadInputError, match=r"rotation\.online: hadamard: format dense"):
        moebit.quantize(original, tmp_path / "d", recipe=recipe(rotation={"online": "hadamard"}), format="dense")
    with pytest.raises(BadInputError, match=r"4 bits.*compressed-tensors"):
        moebit.quantize(original, tmp_path / "d", recipe=recipe(activations=A4), format="compressed-tensors")
