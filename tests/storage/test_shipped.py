"""Checkpoints that are shipped quantized read like the plain ones that hold exactly their dequantized values.

The oracles are this file's own loops over blocks, transformers' dequantization, and the decompressor of compressed-tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

import moebit
from moebit.cli import app
from moebit.errors import BadInputError
from moebit.formats.opening import open_checkpoint
from moebit.model.opening import open_hub_checkpoint
from moebit.plan.plan import Plan
from moebit.storage.checkpoint import Checkpoint, checkpoint_fingerprint
from moebit.storage.hub import HubWeights
from moebit.storage.shipped import entries as shipped_entries
from moebit.storage.shipped import reading
from tests.support.models import ARCHITECTURES, EXPERTS, HIDDEN, INTERMEDIATE, quiet, random_model, save
from tests.support.observer import observed
from tests.support.outputs import REPORTS, file_bytes, read_config, small_recipe, stored_tensors, token_file

DEEPSEEK, GPT_OSS, QWEN3 = ARCHITECTURES["deepseek_v3"], ARCHITECTURES["gpt_oss"], ARCHITECTURES["qwen3_moe"]
UNEVEN = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 200}  # no multiples of 128
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
EXPERT = "model.layers.1.mlp.experts.3.up_proj"

Tensors = dict[str, Tensor]
Ship = Callable[[str, Tensor], tuple[Tensors, Tensor]]


def is_projection(name: str) -> bool:
    return "_proj" in name and name.endswith("weight") and "layernorm" not in name


def compressed_config(weights: dict[str, Any], format: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


def write(source: Path, directory: Path, tensors: Tensors, quantization: dict[str, Any] | None, second: str = "$^") -> Path:
    """A checkpoint like `source` with other tensors; names that match `second` go to a second file."""
    directory.mkdir(parents=True)
    config = read_config(source) | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(config))
    shards: dict[str, Tensors] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    weight_map = {name: list(shards)[bool(re.search(second, name))] for name in tensors}
    for name, tensor in tensors.items():
        shards[weight_map[name]][name] = tensor.contiguous()
    for shard, content in shards.items():
        save_file(content, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def make_pair(
    directory: Path, source: Path, ship: Ship, quantization: dict[str, Any], chosen: Callable[[str], bool] = is_projection
) -> tuple[Path, Path]:
    """(shipped, plain): every chosen tensor as `ship` stores it, and the value that this stands for."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in stored_tensors(source).items():
        parts, value = ship(name, tensor) if chosen(name) else ({name: tensor}, tensor)
        stored |= parts
        plain[name] = value
    return write(source, directory / "shipped", stored, quantization, second="scale"), write(source, directory / "plain", plain, None)


def by_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """bfloat16: block after block times its scale; matrices or stacks of them."""
    if codes.ndim == 3:
        return torch.stack([by_blocks(c, s, block) for c, s in zip(codes, scale, strict=True)])
    result = torch.full(codes.shape, float("nan"), dtype=torch.bfloat16)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            rows, columns = (slice(i * size, (i + 1) * size) for i, size in zip((row, column), block, strict=True))
            result[rows, columns] = (codes[rows, columns].float() * float(scale[row, column])).bfloat16()
    return result


def fp8(block: tuple[int, int] = (128, 128), suffix: str = "_scale_inv", dtype: torch.dtype = torch.float32) -> Ship:
    """Blocks of different magnitudes, so that a scale in the wrong place shows."""

    def ship(name: str, tensor: Tensor) -> tuple[Tensors, Tensor]:
        *stack, out, inputs = tensor.shape
        generator = torch.Generator().manual_seed(len(name))
        codes = (tensor.float() * 400).to(torch.float8_e4m3fn)
        shape = (*stack, -(-out // block[0]), -(-inputs // block[1]))
        scale = ((0.5 + torch.rand(shape, generator=generator)) / 400).to(dtype)
        return {name: codes, f"{name}{suffix}": scale}, by_blocks(codes, scale.float(), block)

    return ship


def compressor(weights: dict[str, Any], format: str = "pack-quantized", scale_dtype: torch.dtype = torch.bfloat16) -> Ship:
    """The library's own compressor and decompressor, with random zero points where the grid has some."""
    args = QuantizationArgs(**weights)
    scheme, library = QuantizationScheme(targets=["Linear"], weights=args), BaseCompressor.get_value_from_registry(format)

    def ship(name: str, tensor: Tensor) -> tuple[Tensors, Tensor]:
        owner, (out, inputs) = name.removesuffix(".weight"), tensor.shape
        block = {"tensor": (out, inputs), "channel": (1, inputs), "group": (1, args.group_size), "block": args.block_structure}[
            args.strategy
        ]
        grid = (1,) if args.strategy == "tensor" else (-(-out // block[0]), -(-inputs // block[1]))
        generator = torch.Generator().manual_seed(len(name))
        largest = 448 if args.type == "float" else 2 ** (args.num_bits - 1)
        scale = ((0.5 + torch.rand(grid, generator=generator)) * 0.15 / largest).to(scale_dtype)
        state = {"weight": tensor.to(scale_dtype), "weight_scale": scale}
        if not args.symmetric:
            half = 2 ** (args.num_bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, grid, generator=generator, dtype=torch.int8)
        stored = library.compress(state, scheme)
        return {f"{owner}.{leaf}": value for leaf, value in stored.items()}, library.decompress(stored, scheme)["weight"]

    return ship


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain DeepSeek-V3 of uneven shapes."""
    return save(random_model(DEEPSEEK, **UNEVEN), tmp_path_factory.mktemp("deepseek") / "source")


@pytest.fixture(scope="session")
def blocks(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same as fp8 blocks of 128x128, and plain with these values."""
    return make_pair(tmp_path_factory.mktemp("blocks"), deepseek, fp8(), BLOCKS)


@pytest.fixture(scope="session")
def packed(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Experts packed to int4 in groups, as Kimi-K2 is; the rest plain."""
    directory = tmp_path_factory.mktemp("packed")
    weights = {**INT4, "group_size": 8}
    return make_pair(directory, deepseek, compressor(weights), compressed_config(weights), lambda name: ".experts." in name)


@pytest.fixture(scope="session")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """gpt-oss with random codes and exponents, and plain with what transformers makes of them."""
    directory = tmp_path_factory.mktemp("mxfp4")
    generator = torch.Generator().manual_seed(0)

    def ship(name: str, tensor: Tensor) -> tuple[Tensors, Tensor]:
        experts, inputs, out = tensor.shape
        codes = torch.randint(0, 256, (experts, out, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 123, (experts, out, inputs // 32), generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": codes, f"{name}_scales": scales}, convert_moe_packed_tensors(codes, scales)

    source = save(random_model(GPT_OSS), directory / "source")
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    return make_pair(directory, source, ship, config, lambda name: name.endswith(("gate_up_proj", "down_proj")))


@pytest.fixture(params=["blocks", "packed", "mxfp4"])
def pair(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def weights_of(checkpoint: Checkpoint) -> HubWeights:
    assert isinstance(checkpoint.weights, HubWeights)
    return checkpoint.weights


def assert_reads_as(shipped: Path, plain: Path) -> Checkpoint:
    """Every tensor, its type and shape, whole and in rows that begin and end anywhere."""
    checkpoint = open_hub_checkpoint(shipped)
    expected = stored_tensors(plain)
    assert set(weights_of(checkpoint).entries) == set(expected)
    for name, value in expected.items():
        entry = weights_of(checkpoint).entries[name]
        assert (entry.name, entry.dtype, entry.shape) == (name, value.dtype, tuple(value.shape))
        read = entry.read()
        assert read.dtype == value.dtype
        assert torch.equal(read, value), name
        count = len(value)
        for start, stop in ((0, 0), (count // 3, count // 2 + 1), (count - 1, count), (1, count)):
            assert torch.equal(entry.read(start, stop), value[start:stop]), (name, start, stop)
    return checkpoint


# --- values


def test_reads_as_the_plain_checkpoint(pair: tuple[Path, Path]) -> None:
    checkpoint = assert_reads_as(*pair)
    plain = open_hub_checkpoint(pair[1])
    assert checkpoint.shipped is not None
    assert plain.shipped is None
    weights, other = weights_of(checkpoint), weights_of(plain)
    assert weights.available() == other.available()
    assert weights.unused == other.unused == []
    for name in weights.available():
        assert torch.equal(weights.parameter(name), other.parameter(name)), name
    assert checkpoint.weights.plain_bytes == sum(tensor.nbytes for tensor in stored_tensors(pair[1]).values())
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in pair[0].glob("*.safetensors"))


def test_large_tensors_are_dequantized_piece_by_piece(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_entries, "PIECE_BYTES", 3 * 4 * UNEVEN["hidden_size"])
    assert_reads_as(*pair)


@pytest.mark.parametrize(
    ("block", "suffix", "dtype"),
    [
        ((24, 40), "_scale_inv", torch.float32),
        ((1, 160), "_scale", torch.bfloat16),
        ((128, 128), "_scale_inv", torch.float8_e8m0fnu),
    ],
    ids=["odd-blocks", "bfloat16-scales", "e8m0-scales"],
)
def test_fp8_blocks(block: tuple[int, int], suffix: str, dtype: torch.dtype, deepseek: Path, tmp_path: Path) -> None:
    config = {**BLOCKS, "weight_block_size": list(block)}
    assert_reads_as(*make_pair(tmp_path, deepseek, fp8(block, suffix, dtype), config))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), ("out",), ("out", 1)], ids=str)
def test_fp8_without_blocks(shape: tuple[Any, ...], deepseek: Path, tmp_path: Path) -> None:
    def ship(name: str, tensor: Tensor) -> tuple[Tensors, Tensor]:
        codes, out = tensor.mul(400).to(torch.float8_e4m3fn), tensor.shape[0]
        scale = torch.rand(tuple(out if size == "out" else size for size in shape)) / 400
        value = torch.stack([codes[row].float() * float(scale.flatten()[row if scale.numel() > 1 else 0]) for row in range(out)])
        owner = name.removesuffix(".weight")
        return {name: codes, f"{name}_scale_inv": scale, f"{owner}.activation_scale": torch.tensor(1.0)}, value.bfloat16()

    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    checkpoint = assert_reads_as(*make_pair(tmp_path, deepseek, ship, config))
    assert checkpoint.shipped is not None
    described = checkpoint.shipped.describe()
    assert described["scheme"] == "fp8 with a scale per tensor or channel"
    assert described["activation_scales_left_out"] == described["tensors"] > 0


@pytest.mark.parametrize("block", [(32, 32), (48, 24)], ids=str)
def test_fp8_stacks_of_experts(block: tuple[int, int], tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in (0, 2):
            prefix = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([tensors[f"{prefix}.{e}.{p}_proj.weight"] for e in range(EXPERTS)]) for p in ("gate", "up", "down")
            )
            result |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.down_proj": down}
        return result

    source = save(random_model(QWEN3).bfloat16(), tmp_path / "source")
    fused = write(source, tmp_path / "fused", fuse(stored_tensors(source)), None)
    config = {**BLOCKS, "weight_block_size": list(block)}
    shipped, plain = make_pair(tmp_path, fused, fp8(block), config, lambda name: ".experts." in name)
    checkpoint = assert_reads_as(shipped, plain)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    assert torch.equal(checkpoint.weights.expert_rows(name, 3, 5), stored_tensors(plain)[name][3:5])


COMPRESSED = {
    "int4": (INT4, "pack-quantized", torch.bfloat16),
    "int4-float32-scales": (INT4, "pack-quantized", torch.float32),
    "int4-float16-scales": (INT4, "pack-quantized", torch.float16),
    "int4-asymmetric": ({**INT4, "group_size": 8, "symmetric": False}, "pack-quantized", torch.bfloat16),
    "int4-channel": ({**INT4, "strategy": "channel", "group_size": None}, "pack-quantized", torch.bfloat16),
    "int2": ({**INT4, "num_bits": 2, "group_size": 8}, "pack-quantized", torch.bfloat16),
    "int8-packed": ({**INT4, "num_bits": 8, "group_size": 8}, "pack-quantized", torch.bfloat16),
    "int8-packed-channel-asymmetric": (
        {**INT4, "num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False}, "pack-quantized", torch.bfloat16
    ),
    "int8": ({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, "int-quantized", torch.bfloat16),
    "int8-tensor": ({"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}, "int-quantized", torch.float32),
    "int8-asymmetric": ({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, "int-quantized", torch.bfloat16),
    "fp8-channel": ({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, "float-quantized", torch.bfloat16),
    "fp8-tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}, "float-quantized", torch.float32),
    "fp8-blocks": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 8], "symmetric": True},
        "float-quantized",
        torch.bfloat16,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("weights", "format", "dtype"), COMPRESSED.values(), ids=list(COMPRESSED))
def test_compressed_tensors(weights: dict[str, Any], format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against the library's decompressor, and the output channels are no multiple of what a word holds."""
    library = compressor(weights, format, dtype)
    source = save(random_model(QWEN3, intermediate_size=100).bfloat16(), tmp_path / "source")

    def ship(name: str, tensor: Tensor) -> tuple[Tensors, Tensor]:
        stored, value = library(name, tensor)
        return stored, value if dtype == torch.float16 else value.bfloat16()

    def chosen(name: str) -> bool:
        return is_projection(name) and not (weights["strategy"] == "group" and "layers.1.mlp.down_proj" in name)  # 100 is no multiple

    shipped, plain = make_pair(tmp_path, source, ship, compressed_config(weights, format), chosen)
    assert_reads_as(shipped, plain)


def test_compressed_groups_by_name(tmp_path: Path, deepseek: Path) -> None:
    """int4 experts beside fp8 attention; what no group names is plain."""
    fp8_args = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    experts, attention = compressor({**INT4, "group_size": 8}), compressor(fp8_args, "float-quantized")
    groups = {
        "experts": {"targets": [r"re:.*mlp\.experts\..*"], "weights": {**INT4, "group_size": 8}, "format": "pack-quantized"},
        "others": {"targets": ["Linear"], "weights": fp8_args, "format": "float-quantized"},
    }
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ["re:.*shared.*"]}
    pair = make_pair(
        tmp_path,
        deepseek,
        lambda name, tensor: (experts if ".experts." in name else attention)(name, tensor),
        config,
        lambda name: is_projection(name) and "shared" not in name,
    )
    checkpoint = assert_reads_as(*pair)
    assert checkpoint.shipped is not None
    assert checkpoint.shipped.scheme == "int4 groups of 8 and fp8 per channel"


@pytest.mark.parametrize("which", ["fp8", "mxfp4", "compressed-tensors"])
def test_transformers_reads_the_same(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The whole model as transformers loads it (dequantized, on the CPU); its fp8 needs shapes of whole blocks."""
    if which == "fp8":
        source = save(random_model(DEEPSEEK), tmp_path / "source")
        path = make_pair(tmp_path, source, fp8((8, 8)), {**BLOCKS, "weight_block_size": [8, 8]})[0]
    else:
        path = request.getfixturevalue("packed" if which == "compressed-tensors" else which)[0]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    weights, state = open_hub_checkpoint(path).weights, model.state_dict()
    compared = 0
    for name in weights.available():
        if name in state and state[name].dtype == torch.bfloat16:
            compared += torch.equal(weights.parameter(name), state[name])
            assert torch.equal(weights.parameter(name), state[name]), name
    assert compared > 20


# --- only what is asked for


def bytes_read(checkpoint: Checkpoint, name: str, start: int, stop: int) -> dict[str, int]:
    """Stored tensor -> bytes of it that reading some experts takes."""
    read: dict[str, int] = {}
    with observed("moebit.read") as events:
        checkpoint.weights.expert_rows(name, start, stop)
    for _, stored, _, size in events:
        read[stored] = read.get(stored, 0) + size
    return read


def test_reads_only_the_experts_asked_for(blocks: tuple[Path, Path], packed: tuple[Path, Path], mxfp4: tuple[Path, Path]) -> None:
    for path, (leaves) in ((blocks[0], ("weight", "weight_scale_inv")), (packed[0], ("weight_packed", "weight_scale"))):
        read = bytes_read(open_hub_checkpoint(path), "model.layers.1.mlp.experts.down_proj", 3, 5)
        tensors = stored_tensors(path)
        assert read == {
            n: tensors[n].nbytes for e in (3, 4) for leaf in leaves for n in [f"model.layers.1.mlp.experts.{e}.down_proj.{leaf}"]
        }
    prefix = "model.layers.1.mlp.experts.gate_up_proj"
    read = bytes_read(open_hub_checkpoint(mxfp4[0]), prefix, 3, 5)
    rows = 2 * 2 * INTERMEDIATE * HIDDEN // 32  # 2 experts
    assert read == {f"{prefix}_blocks": 16 * rows, f"{prefix}_scales": rows}


def test_reads_only_the_rows_asked_for(blocks: tuple[Path, Path]) -> None:
    entry = weights_of(open_hub_checkpoint(blocks[0])).entries[f"{EXPERT}.weight"]
    with observed("moebit.read", lambda file, name, skip, size: (name, size)) as sizes:
        entry.read(129, 131)
    assert sorted(sizes) == [(f"{EXPERT}.weight", 2 * 160), (f"{EXPERT}.weight_scale_inv", 2 * 4)]


# --- from end to end


def assert_same_weights(one: Path, other: Path) -> None:
    """Every file is the same, but for what names the input."""
    names = {"moebit.json", "README.md"}
    assert file_bytes(one, REPORTS | names) == file_bytes(other, REPORTS | names)


@pytest.mark.parametrize("format", ["native", "dense"])
def test_rounds_like_the_plain_checkpoint(pair: tuple[Path, Path], format: str, tmp_path: Path) -> None:
    recipe = small_recipe("rtn", weights={"scope": "experts"})
    for number, path in enumerate(pair):
        moebit.quantize(path, tmp_path / str(number), recipe=recipe, format=format)
    assert_same_weights(tmp_path / "0", tmp_path / "1")
    config = read_config(tmp_path / "0")
    assert config.get("quantization_config", {}).get("quant_method") == ("moebit" if format == "native" else None)
    kinds = {tensor.dtype for tensor in stored_tensors(tmp_path / "0").values()}
    assert kinds <= {torch.bfloat16, torch.float32} | ({torch.uint8} if format == "native" else set())


def test_gptq_and_evaluation_like_the_plain_checkpoint(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    text = [f"t={token_file(tmp_path / 'text.jsonl', 300)}"]
    results = []
    for number, path in enumerate(blocks):
        out = tmp_path / str(number)
        moebit.quantize(path, out, recipe=small_recipe("gptq"), text=text)
        results.append(moebit.evaluate(out, against=path, text=text, window=24)["texts"])
        results[-1]["itself"] = moebit.evaluate(path, text=text, window=24)["texts"]
    assert_same_weights(tmp_path / "0", tmp_path / "1")
    assert results[0] == results[1]
    assert results[0]["t"]["kl"] > 0


@pytest.mark.parametrize("which", ["packed", "mxfp4"])
def test_evaluates_like_the_plain_checkpoint(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    text = [f"t={token_file(tmp_path / 'text.jsonl', 100)}"]
    shipped, plain = request.getfixturevalue(which)
    result = moebit.evaluate(shipped, against=plain, text=text, window=20)
    assert abs(result["texts"]["t"]["kl"]) < 1e-7  # sums of equal numbers, which may lie differently in memory
    assert result["texts"]["t"]["routing_exact"] == 1


def test_average_bits(blocks: tuple[Path, Path], packed: tuple[Path, Path], tmp_path: Path) -> None:
    """8 x bytes of codes and scales / weights, counted in the files."""
    text = [f"t={token_file(tmp_path / 'text.jsonl', 50)}"]
    for path, parts in ((blocks[0], r"float8|scale_inv"), (packed[0], r"weight_packed|weight_scale")):
        tensors = stored_tensors(path)
        stored = sum(t.nbytes for n, t in tensors.items() if re.search(parts, f"{n} {t.dtype}"))
        weights = sum(
            t.numel() * (8 if t.dtype == torch.int32 else 1) for n, t in tensors.items() if re.search("float8|packed", f"{n} {t.dtype}")
        )
        assert moebit.evaluate(path, text=text, window=20)["average_bits"] == pytest.approx(8 * stored / weights)


def test_plan_knows_the_size_of_what_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for format in ("native", "dense"):
        recipe = small_recipe("rtn", weights={"scope": "experts"})
        plan = moebit.quantize(pair[0], tmp_path / format, recipe=recipe, format=format, dry_run=True)
        assert isinstance(plan, Plan)
        moebit.quantize(pair[0], tmp_path / format, recipe=recipe, format=format)
        assert plan.size_bytes == sum(tensor.nbytes for tensor in stored_tensors(tmp_path / format).values())


def test_what_the_class_does_not_use_is_kept_as_stored(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    """A layer for predicting further tokens, behind the last one."""
    tensors = stored_tensors(blocks[0])
    extra = {
        "model.layers.2.eh_proj.weight": torch.randn(160, 320).to(torch.float8_e4m3fn),
        "model.layers.2.eh_proj.weight_scale_inv": torch.rand(2, 3),
        "model.layers.2.enorm.weight": torch.rand(160).bfloat16(),
        "model.layers.2.gain": torch.rand(160).bfloat16(),  # no weight and its scale, though they are called so
        "model.layers.2.gain_scale": torch.rand(160).bfloat16(),
    }
    path = write(blocks[0], tmp_path / "with-extra", tensors | extra, BLOCKS)
    plan = moebit.quantize(path, tmp_path / "out", recipe=small_recipe("rtn"), dry_run=True)
    assert isinstance(plan, Plan)
    assert sorted(plan.describe()["kept_as_stored"]) == sorted(extra)
    moebit.quantize(path, tmp_path / "out", recipe=small_recipe("rtn"))
    written = stored_tensors(tmp_path / "out")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8))
    assert plan.size_bytes == sum(tensor.nbytes for tensor in written.values())


# --- what is said about it


@pytest.mark.parametrize(
    ("which", "scheme"), [("blocks", "fp8 blocks of 128x128"), ("packed", "int4 groups of 8"), ("mxfp4", "mxfp4 groups of 32")]
)
def test_is_reported(which: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    shipped, plain = request.getfixturevalue(which)
    described = moebit.inspect(shipped)["shipped"]
    assert (described["scheme"], described["read_as"]) == (scheme, "bfloat16")
    assert moebit.inspect(plain)["shipped"] is None
    moebit.quantize(shipped, tmp_path / "out", recipe=small_recipe("rtn"))
    assert json.loads((tmp_path / "out" / "moebit.json").read_text())["shipped"] == described


def test_fingerprint_covers_every_file(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    """Scales lie in a file of their own here."""
    before = checkpoint_fingerprint(open_checkpoint(blocks[0]))
    tensors = stored_tensors(blocks[0])
    assert checkpoint_fingerprint(open_checkpoint(write(blocks[0], tmp_path / "same", tensors, BLOCKS, second="scale"))) == before
    changed = {name: t.bfloat16() if name == f"{EXPERT}.weight_scale_inv" else t for name, t in tensors.items()}
    assert checkpoint_fingerprint(open_checkpoint(write(blocks[0], tmp_path / "changed", changed, BLOCKS, second="scale"))) != before


def test_screens_say_it(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    extra = {"model.layers.2.enorm.weight": torch.rand(160).bfloat16()}
    path = write(blocks[0], tmp_path / "with-extra", stored_tensors(blocks[0]) | extra, BLOCKS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"version": 1, **small_recipe("rtn")}))
    result = CliRunner().invoke(app, ["inspect", str(path), "--recipe", str(recipe)])
    said = " ".join(result.output.split())
    assert "shipped quantized: fp8 blocks of 128x128, read as bfloat16" in said
    assert "kept as stored: 1 tensors that the model class does not use, first model.layers.2.enorm.weight" in said


# --- what is wrong with it


def changed(path: Path, directory: Path, change: Callable[[Tensors], Any], quantization: dict[str, Any] | None = None) -> Path:
    tensors = stored_tensors(path)
    change(tensors)
    return write(path, directory, tensors, quantization)


def refusal(path: Path) -> str:
    with pytest.raises(BadInputError) as caught:
        moebit.quantize(path, path.parent / "never", recipe=small_recipe("rtn"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("which", "removed"),
    [
        ("blocks", f"{EXPERT}.weight_scale_inv"),
        ("packed", f"{EXPERT}.weight_scale"),
        ("mxfp4", "model.layers.1.mlp.experts.down_proj_scales"),
    ],
)
def test_missing_scales(which: str, removed: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = changed(request.getfixturevalue(which)[0], tmp_path / "bad", lambda tensors: tensors.pop(removed))
    assert re.search(rf"tensor '{re.escape(removed)}' is missing, without which .* cannot be read; is a shard missing\?", refusal(path))


@pytest.mark.parametrize(
    ("which", "name", "shape"),
    [
        ("blocks", f"{EXPERT}.weight_scale_inv", (2, 3)),
        ("blocks", f"{EXPERT}.weight_scale_inv", (2, 1)),
        ("packed", f"{EXPERT}.weight_scale", (136, 19)),
        ("packed", f"{EXPERT}.weight_scale", (135, 20)),
    ],
)
def test_scales_of_a_wrong_shape(which: str, name: str, shape: tuple[int, ...], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(which)[0]
    said = refusal(changed(path, tmp_path / "bad", lambda tensors: tensors.update({name: torch.ones(shape)})))
    assert name in said
    assert str(list(shape)) in said
    assert "download the checkpoint again" in said


def test_exponents_of_a_wrong_shape(mxfp4: tuple[Path, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj_scales"
    said = refusal(changed(mxfp4[0], tmp_path / "bad", lambda tensors: tensors.update({name: tensors[name][:, :-1]})))
    assert f"tensor {name!r} is uint8 [8, 63, 1]" in said
    assert "download the checkpoint again" in said


@pytest.mark.parametrize(
    ("which", "name", "place", "value", "says"),
    [
        ("blocks", f"{EXPERT}.weight", (3, 5), float("nan"), r"up_proj\.weight' holds nan at \[3, 5\]"),
        ("blocks", f"{EXPERT}.weight_scale_inv", (1, 0), float("inf"), r"weight_scale_inv' holds inf at \[1, 0\]"),
        ("blocks", f"{EXPERT}.weight_scale_inv", (1, 0), 1e37, r"weight_scale_inv' holds the scale 1e\+37, .* overflow bfloat16"),
        ("mxfp4", "model.layers.1.mlp.experts.down_proj_scales", (1, 2, 0), 255, r"_scales' holds a scale that is no finite number"),
        ("packed", f"{EXPERT}.weight_shape", (1,), 161, r"weight_shape' holds \[136, 161\]"),
    ],
)  # fmt: skip
def test_damaged_values(
    which: str, name: str, place: tuple[int, ...], value: float, says: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name][place] = value

    assert re.search(says, refusal(changed(request.getfixturevalue(which)[0], tmp_path / "bad", spoil)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            r"already quantized \(awq\); give the full-precision checkpoint: .* reads fp8, mxfp4, compressed",
        ),
        ({"quant_method": "bitsandbytes"}, r"already quantized \(bitsandbytes\); give the full-precision checkpoint"),
        ({**BLOCKS, "weight_block_size": [128]}, r"\(fp8\); give the full-precision checkpoint: weight_block_size \[128\]"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\); .* no tensor here is; .* take quantization_config out"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\); .*: config_groups"),
        (compressed_config(INT4, "nvfp4-pack-quantized"), r"\(compressed-tensors\); .* this is nvfp4-pack-quantized"),
        (compressed_config({**INT4, "num_bits": 3}), r"does not read pack-quantized weights with num_bits 3"),
        (compressed_config(INT4, transform_config={"a": {}}), r"rotated \(transform_config\)"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_schemes_that_are_not_read(config: dict[str, Any], says: str, deepseek: Path, tmp_path: Path) -> None:
    assert re.search(says, refusal(write(deepseek, tmp_path / "bad", stored_tensors(deepseek), config)))


def test_tensors_that_do_not_fit_the_scheme(blocks: tuple[Path, Path], packed: tuple[Path, Path], tmp_path: Path) -> None:
    def said(number: int, path: Path, change: Callable[[Tensors], Any], config: dict[str, Any] | None = None) -> str:
        return refusal(changed(path, tmp_path / str(number), change, config))

    plain = said(0, blocks[0], lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].bfloat16()}))
    assert f"'{EXPERT}.weight' is bfloat16 and has scales in '{EXPERT}.weight_scale_inv'" in plain
    both = said(1, packed[0], lambda t: t.update({f"{EXPERT}.weight": torch.ones(136, 160)}))
    assert f"'{EXPERT}.weight' is float32 and has scales" in both
    scattered = said(2, packed[0], lambda t: t.update({f"{EXPERT}.weight_g_idx": torch.zeros(160, dtype=torch.int32)}))
    assert f"{EXPERT}: its groups are scattered (weight_g_idx)" in scattered
    assert "full-precision" in scattered
    zero = said(3, packed[0], lambda t: None, compressed_config({**INT4, "group_size": 8, "symmetric": False}))
    assert ".weight_zero_point' is missing" in zero
    elsewhere = compressed_config({**INT4, "group_size": 8})
    elsewhere["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn.*"]
    assert "no target in config_groups of config.json is for it" in said(4, packed[0], lambda t: None, elsewhere)


def test_8_bit_floats_that_nothing_explains(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    path = write(blocks[1], tmp_path / "bad", stored_tensors(blocks[0]), None)
    assert re.search(r"tensor '.*' is float8_e4m3fn, but config\.json has no quantization_config", refusal(path))


def test_quantization_declared_for_the_text_part() -> None:
    inner = {"model_type": "x", "quantization_config": BLOCKS}
    config = {"model_type": "y", "text_config": inner}
    assert reading.shipped_config(config) == BLOCKS
    assert reading.plain_config(config) == {"model_type": "y", "text_config": {"model_type": "x"}}
    assert reading.shipped_config({"model_type": "y", "text_config": {}}) is None


def test_rows_out_of_range(blocks: tuple[Path, Path]) -> None:
    entry = weights_of(open_hub_checkpoint(blocks[0])).entries[f"{EXPERT}.weight"]
    with pytest.raises(IndexError, match="rows 5 to 200 of 136"):
        entry.read(5, 200)
