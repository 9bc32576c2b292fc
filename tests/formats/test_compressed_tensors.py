"""compressed-tensors outputs against the compressed-tensors library and against transformers alone, in a process without moebit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import moebit
from moebit.errors import BadInputError
from moebit.formats.compressed_matrix import matrix_specs, matrix_tensors
from moebit.formats.native import PackedSpec
from moebit.formats.opening import open_checkpoint
from moebit.plan.bitplan import BitPlan
from moebit.plan.plan import Plan
from moebit.tensor import Float8Grid, QTensor, UniformGrid, solve_rtn
from moebit.tensor.layouts.words import pack_words, unpack_words
from tests.formats.library import by_the_library, engines_model, plain_transformers, reference_logits, reference_model
from tests.support.models import ARCHITECTURES, EXPERTS, HIDDEN, INTERMEDIATE, Architecture, Checkpoints, random_model, save, windows
from tests.support.outputs import read_config, stored_tensors, token_file
from tests.test_activations import streamed

METHOD = "compressed-tensors"
CHANNEL = {"weights": {"bits": 4, "group_size": -1}}
GROUPED = {"weights": {"bits": 4, "group_size": 32}}
EIGHT = {"weights": {"bits": 8, "group_size": -1}, "activations": {"bits": 8, "symmetric": True}}
FP8 = {"weights": {"type": "fp8", "bits": 8, "group_size": -1}, "activations": {"bits": 8, "symmetric": True}}
NAMED = [ARCHITECTURES[name] for name in ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "qwen2_moe")]


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return {"solver": {"method": "rtn", "clip_search": False}, "format": METHOD, **recipe}


# --- one matrix, against the library


def args(bits: int, group_size: int, kind: str = "int") -> QuantizationArgs:
    grouped = {"strategy": "group", "group_size": group_size} if group_size != -1 else {"strategy": "channel"}
    return QuantizationArgs(num_bits=bits, type=kind, symmetric=True, **grouped)


def decompressed(storage: str, tensors: dict[str, Tensor], weights: QuantizationArgs) -> Tensor:
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=storage)
    return BaseCompressor.get_value_from_registry(storage).decompress(tensors, scheme)["weight"]  # type: ignore[no-any-return]


def stack(bits: int, group_size: int, dtype: torch.dtype, inputs: int, signed: bool = False, float8: bool = False) -> QTensor:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(3, 5, inputs, generator=generator)
    w[1, 2] = 0  # a row without a grid of its own
    return solve_rtn(w, bits, Float8Grid(group_size, dtype) if float8 else UniformGrid(group_size, True, signed, dtype), clip_search=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("group_size", "inputs"), [(32, 96), (-1, 96), (-1, 37), (-1, 1)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_decompresses_what_was_meant(bits: int, group_size: int, inputs: int, dtype: torch.dtype) -> None:
    for signed in (False, True):
        q = stack(bits, group_size, dtype, inputs, signed)
        spec = PackedSpec((bits,) * 3, (5, inputs), group_size, True, dtype, stacked=True)
        for number in range(3):
            tensors = matrix_tensors(spec, q, number)
            assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == {
                suffix: (s.dtype, s.shape) for suffix, s in matrix_specs(spec, bits).items()
            }
            value = decompressed("pack-quantized", tensors, args(bits, group_size))
            assert value.dtype == dtype
            assert torch.equal(value, q.dequantize(dtype)[number])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("inputs", [1, 7, 8, 31, 32, 33, 160])
def test_words_are_the_librarys(bits: int, inputs: int) -> None:
    codes = torch.randint(0, 2**bits, (4, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(inputs))
    packed = pack_words(codes, bits)
    assert torch.equal(packed, pack_to_int32((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack_words(packed, bits, inputs), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_eight_bits_for_eight_bit_activations(dtype: torch.dtype) -> None:
    q = stack(8, -1, dtype, 37)
    tensors = matrix_tensors(PackedSpec((8,) * 3, (5, 37), -1, True, dtype, True, input_bits=8), q, 2)
    assert tensors["weight"].dtype == torch.int8
    assert torch.equal(decompressed("int-quantized", tensors, args(8, -1)), q.dequantize(dtype)[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8(dtype: torch.dtype) -> None:
    q = stack(8, -1, dtype, 37, float8=True)
    tensors = matrix_tensors(PackedSpec((8,) * 3, (5, 37), -1, True, dtype, True, float8=True, input_bits=8), q, 2)
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(decompressed("float-quantized", tensors, args(8, -1, "float")), q.dequantize(dtype)[2])


def test_fp8_is_the_nearest_float() -> None:
    """Against every float8 number there is: none is nearer to weight / scale than the chosen one."""
    w = torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q = solve_rtn(w.float(), 8, Float8Grid(-1), clip_search=False)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    scaled = w[0].float().double() / q.params.scale[0].double()
    best = (scaled.unsqueeze(-1) - numbers).abs().amin(-1)
    chosen = (q.dequantize(torch.float64)[0] / q.params.scale[0].double() - scaled).abs()
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-4)
    assert float(scaled.abs().max()) == pytest.approx(448, rel=1e-6)


# --- whole outputs


@dataclass
class Written:
    """compressed-tensors outputs of the tiny checkpoints, each made once."""

    directory: Path
    checkpoints: Checkpoints
    made: dict[str, Path] = field(default_factory=dict)

    def output(self, architecture: Architecture, name: str, recipe: dict[str, Any], **options: Any) -> Path:
        key = f"{architecture}-{name}"
        if key not in self.made:
            path = self.checkpoints.path(architecture)
            self.made[key] = moebit.quantize(path, self.directory / key, recipe=full(recipe), **options).path  # type: ignore[union-attr]
        return self.made[key]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Written:
    return Written(tmp_path_factory.mktemp("written"), checkpoints)


@pytest.mark.parametrize("architecture", NAMED, ids=str)
@pytest.mark.parametrize(("name", "recipe"), [("channel", CHANNEL), ("w8a8", EIGHT), ("fp8", FP8)])
def test_names_shapes_and_errors(name: str, recipe: dict[str, Any], architecture: Architecture, written: Written) -> None:
    """The checkpoint's own tensors, one by one; what is quantized differs by less than a step of its grid, the rest not at all."""
    output = written.output(architecture, name, recipe)
    original = stored_tensors(written.checkpoints.path(architecture))
    stored, read = stored_tensors(output), by_the_library(output)
    assert read.keys() == original.keys()
    quantized = {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")}
    experts = {name for name in original if ".experts." in name}
    assert experts <= quantized
    assert not [name for name in quantized if "gate." in name or "embed" in name or "lm_head" in name or "norm" in name]
    for key, value in original.items():
        if key not in quantized:
            assert torch.equal(read[key], value), key
            continue
        scale = stored[f"{key}_scale"].float()
        step = scale * (32 if name == "fp8" else 1)  # the widest step between two float8 numbers
        assert bool(((read[key].float() - value.float()).abs() <= 0.51 * step + 0.01 * value.float().abs()).all()), key


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_what_stays_whole_is_ignored(architecture: Architecture, written: Written) -> None:
    """Under the names of transformers and of the checkpoint: head, routers, gates of shared experts."""
    output = written.output(architecture, "channel", CHANNEL)
    ignored = read_config(output)["quantization_config"]["ignore"]
    stored = stored_tensors(output)
    whole = {
        key.removesuffix(".weight") for key, value in stored.items() if key.endswith(".weight") and value.ndim == 2 and "embed" not in key
    }
    assert whole <= set(ignored)
    assert "lm_head" in ignored
    assert not [name for name in ignored if f"{name}.weight_scale" in stored]
    assert any(name.endswith("gate") for name in ignored)


def test_grids_that_differ_are_groups_with_targets(written: Written) -> None:
    """Attention in 8 bits, experts in 4: the experts' group first, and every quantized tensor fits exactly one."""
    output = mixed_output(written, ARCHITECTURES["mixtral"])
    config = read_config(output)["quantization_config"]
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [4, 8]
    assert all("experts" in target for target in config["config_groups"]["group_0"]["targets"])
    assert by_the_library(output).keys() == stored_tensors(written.checkpoints.path(ARCHITECTURES["mixtral"])).keys()


def mixed_output(written: Written, architecture: Architecture) -> Path:
    """Experts in 4 bits, linears in 8."""
    path = written.checkpoints.path(architecture)
    plan = moebit.quantize(path, "nowhere", recipe=full(CHANNEL), dry_run=True)
    assert isinstance(plan, Plan)
    return written.output(architecture, "mixed", CHANNEL, plan=BitPlan({}, dict.fromkeys(plan.linears, 8)))


def test_unknown_layers_are_kept_and_ignored(tmp_path: Path) -> None:
    model = save(random_model(ARCHITECTURES["deepseek_v3"]), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    more = {f"model.layers.2.{name}": torch.randn(4, 4) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}
    save_file({**tensors, **more}, model / "model.safetensors", {"format": "pt"})
    output = moebit.quantize(model, tmp_path / "out", recipe=full(CHANNEL)).path  # type: ignore[union-attr]
    assert r"re:model\.layers\.2\..*" in read_config(output)["quantization_config"]["ignore"]
    assert torch.equal(stored_tensors(output)["model.layers.2.eh_proj.weight"], more["model.layers.2.eh_proj.weight"])


# --- transformers alone


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_logits_in_transformers_without_moebit(written: Written, tmp_path: Path) -> None:
    outputs: dict[str, tuple[Architecture, Path, str]] = {}
    for architecture in NAMED:
        dtype = "bfloat16" if architecture.dtype == torch.bfloat16 else "float32"
        outputs[f"{architecture} channel"] = (architecture, written.output(architecture, "channel", CHANNEL), dtype)
    olmoe, mixtral = ARCHITECTURES["olmoe"], ARCHITECTURES["mixtral"]
    outputs["olmoe grouped"] = (olmoe, written.output(olmoe, "3", {"weights": {"bits": 3, "group_size": 32}}), "float32")
    outputs["olmoe fp8"] = (olmoe, written.output(olmoe, "fp8", FP8), "float32")
    kept = {**FP8, "weights": {**FP8["weights"], "ignore": ["model.layers.1.mlp.experts"]}}
    outputs["olmoe fp8, experts of a layer whole"] = (olmoe, written.output(olmoe, "fp8 kept", kept), "float32")
    outputs["mixtral mixed"] = (mixtral, mixed_output(written, mixtral), "float32")
    logits, errors = plain_transformers(tmp_path, {name: (path, dtype) for name, (_, path, dtype) in outputs.items()})
    assert not errors
    for name, (architecture, path, dtype) in outputs.items():
        wanted = reference_logits(written.checkpoints.path(architecture), path, tmp_path, getattr(torch, dtype))
        away = float((logits[name] - wanted).norm() / wanted.norm())
        # In bfloat16, grouped and single products round differently; fp8 inputs sit on ties that the last bit of a sum decides.
        assert away < (0.02 if "fp8" in name or dtype == "bfloat16" else 1e-5), (name, away)
        other = written.checkpoints.reference(architecture).logits
        assert float((logits[name] - other).norm() / other.norm()) > 0.02, name  # the weights are not the original's


# --- what no engine runs, and what one runs and another does not


def refusal(path: Path, recipe: dict[str, Any], **options: Any) -> str:
    with pytest.raises(BadInputError) as error:
        moebit.quantize(path, "nowhere", recipe=full(recipe), dry_run=True, **options)
    return str(error.value)


def experts(layer: int, block: str = "mlp") -> str:
    return f"model.layers.{layer}.{block}.experts"


def same(bits: int | list[int]) -> dict[str, int | list[int]]:
    return dict.fromkeys(("gate_proj", "up_proj", "down_proj"), bits)


@pytest.mark.parametrize(
    ("recipe", "plan", "says"),
    [
        (GROUPED, {"experts": {experts(0): same([4, 8] * 4)}}, ["no engine", "different widths", "model.layers.0.mlp.experts", "[4, 8]"]),
        (GROUPED, {"experts": {experts(1): {"down_proj": 8}}}, ["no engine", "projections", "gate_proj 4", "down_proj 8"]),
        (EIGHT, {"experts": {experts(0): same(4)}}, ["4 bits", "8-bit activations"]),
    ],
)
def test_refused_for_every_engine(checkpoints: Checkpoints, recipe: dict[str, Any], plan: dict[str, Any] | None, says: list[str]) -> None:
    bits = BitPlan(plan.get("experts", {}), plan.get("linears", {})) if plan else None
    message = refusal(checkpoints.path(ARCHITECTURES["olmoe"]), recipe, plan=bits)
    assert all(part in message for part in says), message


LAYERS = BitPlan({experts(1): same(8)}, {})
ONE_KEY = BitPlan({}, {"model.layers.0.self_attn.k_proj": 8})
KEPT = {"weights": {"bits": 4, "group_size": 32, "ignore": ["model.layers.1.mlp.experts"]}}
ODD = {"weights": {"bits": 3, "group_size": -1}}


@pytest.mark.parametrize(
    ("recipe", "plan", "engine", "says"),
    [
        (GROUPED, LAYERS, "transformers", "8 bits and others 4"),
        (KEPT, None, "transformers", "stay in full precision"),
        (EIGHT, None, "transformers", "int8 experts"),
        (GROUPED, ONE_KEY, "vllm", "q_proj 4, k_proj 8"),
        (CHANNEL, None, "vllm", "hidden size of 64"),
        (ODD, None, "vllm", "3 bits with one scale a channel"),
    ],
    ids=["layers", "kept", "w8a8", "one of qkv", "small channel", "odd channel"],
)
def test_one_engine_and_not_the_other(
    checkpoints: Checkpoints, recipe: dict[str, Any], plan: BitPlan | None, engine: str, says: str
) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    message = refusal(path, recipe, plan=plan, engine=engine)
    assert f"{engine} cannot run" in message
    assert says in message
    other = {"vllm": "transformers", "transformers": "vllm"}[engine]
    for wanted in ("any", other):
        decided = moebit.quantize(path, "nowhere", recipe=full(recipe), plan=plan, engine=wanted, dry_run=True)
        assert isinstance(decided, Plan)
        assert {name: verdict.runs for name, verdict in decided.engines.items() if name != "sglang"} == {engine: False, other: True}


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_stacked_experts_are_refused(checkpoints: Checkpoints, name: str) -> None:
    message = refusal(checkpoints.path(ARCHITECTURES[name]), CHANNEL)
    assert "stored stacked" in message
    assert "native or dense" in message


def test_other_formats_and_engines(checkpoints: Checkpoints) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    assert "vllm cannot run" in refusal(path, {**GROUPED, "format": "native"}, engine="vllm")
    assert "choose one of transformers, vllm, sglang, llama.cpp, mlx, gptqmodel, any" in refusal(path, GROUPED, engine="llama")
    dense = moebit.quantize(path, "nowhere", recipe=full({**GROUPED, "format": "dense"}), engine="vllm", dry_run=True)
    assert isinstance(dense, Plan)
    assert all(verdict.runs for verdict in dense.engines.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_rules_refuse_does_not_run(written: Written, tmp_path: Path) -> None:
    """The rules for transformers are no stricter than transformers: what they call impossible fails or computes something else there."""
    olmoe = ARCHITECTURES["olmoe"]
    outputs = {
        "layers": written.output(olmoe, "layers", GROUPED, plan=LAYERS),
        "kept": written.output(olmoe, "kept", KEPT),
        "w8a8": written.output(olmoe, "w8a8", EIGHT),
    }
    logits, errors = plain_transformers(tmp_path, {name: (path, "float32") for name, path in outputs.items()})
    for name, path in outputs.items():
        if name not in errors:
            wanted = reference_logits(written.checkpoints.path(olmoe), path, tmp_path, torch.float32)
            assert float((logits[name] - wanted).norm() / wanted.norm()) > 0.01, name


# --- reading back


@pytest.mark.parametrize("architecture", NAMED, ids=str)
def test_reading_back(architecture: Architecture, written: Written, tmp_path: Path) -> None:
    """Every parameter as the library decompresses it and transformers converts it."""
    output = written.output(architecture, "channel", CHANNEL)
    weights = open_checkpoint(output).weights
    wanted = reference_model(written.checkpoints.path(architecture), output, tmp_path, torch.float32).state_dict()
    assert weights.available() <= set(wanted)
    assert len(weights.available()) >= len(wanted) - 1  # a tied head is stored once
    for name in weights.available():
        assert torch.equal(weights.parameter(name).float(), wanted[name]), name
        if wanted[name].ndim == 3:
            assert torch.equal(weights.expert_rows(name, 2, 5).float(), wanted[name][2:5]), name


def test_evaluate_and_inspect(written: Written, tmp_path: Path) -> None:
    """KL to the original as of the dense output of the same recipe, which holds the same weights in float32."""
    mixtral = ARCHITECTURES["mixtral"]
    path, text = written.checkpoints.path(mixtral), {"t": token_file(tmp_path / "t.jsonl", 200)}
    output = written.output(mixtral, "channel", CHANNEL)
    dense = moebit.quantize(path, tmp_path / "dense", recipe=full({**CHANNEL, "format": "dense"})).path  # type: ignore[union-attr]
    packed, plain = (moebit.evaluate(model, against=path, text=text, window=32) for model in (output, dense))
    assert packed["texts"]["t"]["kl"] == pytest.approx(plain["texts"]["t"]["kl"], rel=1e-6)
    assert packed["texts"]["t"]["kl"] > 0
    weights = 2 * EXPERTS * 3 * HIDDEN * INTERMEDIATE + 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2)
    rows = 2 * EXPERTS * (2 * INTERMEDIATE + HIDDEN) + 2 * (2 * HIDDEN + 2 * HIDDEN // 2)
    assert packed["average_bits"] == pytest.approx(4 + 32 * rows / weights)
    found = moebit.inspect(output)["quantized"]
    assert found["format"] == METHOD
    assert found["average_bits"] == packed["average_bits"]
    assert {name: verdict["runs"] for name, verdict in found["engines"].items()} == {
        "transformers": True,
        "vllm": False,
        "sglang": True,
    }


@pytest.mark.parametrize(("architecture", "name"), [("qwen2_moe", "w8a8"), ("mixtral", "fp8")])
def test_inputs_are_rounded_as_engines_do(architecture: str, name: str, written: Written, tmp_path: Path) -> None:
    """Streamed, as `evaluate` has them: the logits of a naive run that rounds every input. Few numbers fall to the other side of a tie."""
    recipe, of_it = {"w8a8": EIGHT, "fp8": FP8}[name], ARCHITECTURES[architecture]
    output, original = written.output(of_it, name, recipe), written.checkpoints.path(of_it)
    with torch.no_grad():
        wanted = engines_model(original, output, tmp_path)(input_ids=windows()[:3], use_cache=False).logits
        whole = reference_model(original, output, tmp_path, torch.float32)(input_ids=windows()[:3], use_cache=False).logits
    got, rounding = streamed(output, 3), float((wanted - whole).norm())
    assert float((got - wanted).norm()) < 0.1 * rounding
    assert rounding > 0.003 * float(whole.norm())
    said = moebit.inspect(output)["quantized"]["activations"]["inputs"]
    assert said == {"bits": 8, "symmetric": True, "clip": 1.0, **({"float8": True} if name == "fp8" else {})}


def test_activations_of_others_are_refused(written: Written, tmp_path: Path) -> None:
    output = written.output(ARCHITECTURES["mixtral"], "w8a8", EIGHT)
    shutil.copytree(output, tmp_path / "static")
    config = read_config(output)
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    (tmp_path / "static" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match=r"'dynamic': False.*8 bits per token"):
        open_checkpoint(tmp_path / "static")


def test_the_plan_knows_the_size(written: Written, checkpoints: Checkpoints) -> None:
    for name, recipe in (("channel", CHANNEL), ("w8a8", EIGHT), ("fp8", FP8)):
        mixtral = ARCHITECTURES["mixtral"]
        plan = moebit.quantize(checkpoints.path(mixtral), "nowhere", recipe=full(recipe), dry_run=True)
        assert isinstance(plan, Plan)
        output = written.output(mixtral, name, recipe)
        assert plan.size_bytes == sum(tensor.nbytes for tensor in stored_tensors(output).values())


def test_a_packed_output_is_not_quantized_again(written: Written, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="already quantized"):
        moebit.quantize(written.output(ARCHITECTURES["olmoe"], "grouped", GROUPED), tmp_path / "again", recipe=full(GROUPED))


@pytest.mark.parametrize(("gone", "says"), [("weight_scale", "is missing"), ("weight_shape", "is missing")])
def test_damaged(gone: str, says: str, written: Written, tmp_path: Path) -> None:
    output = written.output(ARCHITECTURES["mixtral"], "channel", CHANNEL)
    tensors = stored_tensors(output)
    first = next(name for name in tensors if name.endswith(gone))
    save_file({name: value for name, value in tensors.items() if name != first}, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "moebit.json"):
        (tmp_path / name).write_text((output / name).read_text())
    with pytest.raises(BadInputError, match=says):
        open_checkpoint(tmp_path)
