"""The storages of compressed-tensors beside symmetric integers, against the compressed-tensors library: zero points, FP4, FP8 in blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

import moebit
from moebit.errors import BadInputError
from moebit.formats.compressed_matrix import matrix_specs, matrix_tensors, storage
from moebit.formats.native import PackedSpec
from moebit.formats.opening import open_checkpoint
from moebit.plan.plan import Plan
from moebit.tensor import Float8Grid, QTensor, UniformGrid, solve_rtn
from moebit.tensor.grids.fp4 import FP4_GRIDS
from tests.formats.library import by_the_library, plain_transformers, reference_logits, reference_model
from tests.support.models import ARCHITECTURES, Architecture, Checkpoints, random_model, save
from tests.support.outputs import stored_tensors, token_file

FORMAT = "compressed-tensors"
ASYMMETRIC = {"weights": {"bits": 4, "group_size": 32, "symmetric": False}}
NVFP4 = {"weights": {"type": "nvfp4"}}
MXFP4 = {"weights": {"type": "mxfp4"}}
BLOCKS = {"weights": {"type": "fp8-block"}, "activations": {"bits": 8, "symmetric": True}}
W4A8 = {"weights": {"bits": 4, "group_size": 128}, "activations": {"bits": 8, "symmetric": True, "type": "fp8"}}
WIDE = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_key_value_heads": 4}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return {"solver": {"method": "rtn"}, "format": FORMAT, **recipe}


def written(checkpoint: Path, directory: Path, recipe: dict[str, Any], **options: Any) -> Path:
    return moebit.quantize(checkpoint, directory, recipe=full(recipe), **options).path  # type: ignore[union-attr]


# --- one matrix, against the library


def random_stack(inputs: int = 256, out: int = 256) -> Tensor:
    return torch.randn(2, out, inputs, generator=torch.Generator().manual_seed(1))


def decompressed(spec: PackedSpec, tensors: dict[str, Tensor], weights: QuantizationArgs) -> Tensor:
    kind = storage(spec)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=kind)
    return BaseCompressor.get_value_from_registry(kind).decompress(tensors, scheme)["weight"]  # type: ignore[no-any-return]


def checked(spec: PackedSpec, q: QTensor, args: QuantizationArgs, dtype: torch.dtype) -> None:
    for number in range(2):
        tensors = matrix_tensors(spec, q, number)
        assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == {
            suffix: (s.dtype, s.shape) for suffix, s in matrix_specs(spec, spec.bits[0]).items()
        }
        assert torch.equal(decompressed(spec, tensors, args).to(dtype), q.dequantize(dtype)[number])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, -1])
def test_zero_points(bits: int, group_size: int) -> None:
    w = random_stack(96, 12) + 0.7
    q = solve_rtn(w, bits, UniformGrid(group_size, False, scale_dtype=torch.bfloat16))
    assert len(q.params.zero_point.unique()) > 1
    spec = PackedSpec((bits,) * 2, (12, 96), group_size, False, torch.bfloat16, stacked=True)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    checked(spec, q, QuantizationArgs(num_bits=bits, type="int", symmetric=False, **strategy), torch.bfloat16)


@pytest.mark.parametrize(("kind", "group_size", "strategy"), [("nvfp4", 16, "tensor_group"), ("mxfp4", 32, "group")])
def test_fp4(kind: str, group_size: int, strategy: str) -> None:
    q = solve_rtn(random_stack(), 4, FP4_GRIDS[kind])
    spec = PackedSpec((4, 4), (256, 256), group_size, True, torch.bfloat16, stacked=True, ggml=kind)
    checked(spec, q, QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy=strategy, group_size=group_size), torch.bfloat16)


def test_small_blocks_beside_large_ones_do_not_underflow() -> None:
    """A block of 1e-6 beside ones: its scale is not 0 and its weights do not become 0."""
    w = torch.ones(1, 16, 64)
    w[:, :, 16:32] = 1e-6
    q = solve_rtn(w, 4, FP4_GRIDS["nvfp4"])
    spec = PackedSpec((4,), (16, 64), 16, True, torch.bfloat16, stacked=True, ggml="nvfp4")
    tensors = matrix_tensors(spec, q, 0)
    assert bool((tensors["weight_scale"].float() > 0).all())
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    read = decompressed(spec, tensors, args).float()
    assert bool((read[:, 16:32] - 1e-6).abs().max() < 0.5e-6)
    torch.testing.assert_close(read[:, :16], torch.ones(16, 16), rtol=0, atol=1 / 16)


def test_fp8_in_blocks() -> None:
    w = random_stack()
    w[:, 128:] *= 8
    q = solve_rtn(w, 8, Float8Grid(128, torch.float32, 128))
    spec = PackedSpec((8, 8), (256, 256), 128, True, torch.float32, True, float8=True, input_bits=8, input_float8=True, block_rows=128)
    assert matrix_tensors(spec, q, 0)["weight_scale"].shape == (2, 2)
    largest = w[0].unflatten(0, (2, 128)).unflatten(2, (2, 128)).abs().amax((1, 3))
    torch.testing.assert_close(matrix_tensors(spec, q, 0)["weight_scale"] * 448, largest)
    checked(spec, q, QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128]), torch.float32)


# --- whole outputs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> dict[str, tuple[Path, Path]]:
    """name -> (checkpoint, output)."""
    directory, olmoe = tmp_path_factory.mktemp("kinds"), ARCHITECTURES["olmoe"]
    small = checkpoints.path(olmoe)
    wide = save(random_model(olmoe, **WIDE), directory / "wide")
    made = {
        "asymmetric": (small, ASYMMETRIC),
        "nvfp4": (small, NVFP4),
        "mxfp4": (small, MXFP4),
        "blocks": (wide, BLOCKS),
        "w4a8": (wide, W4A8),
    }
    return {name: (checkpoint, written(checkpoint, directory / name, recipe)) for name, (checkpoint, recipe) in made.items()}


NAMES = ["asymmetric", "nvfp4", "mxfp4", "blocks", "w4a8"]


@pytest.mark.parametrize("name", NAMES)
def test_moebit_reads_what_the_library_reads(name: str, outputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, output = outputs[name]
    wanted = reference_model(checkpoint, output, tmp_path, torch.float32).state_dict()
    weights = open_checkpoint(output).weights
    for parameter in weights.available():
        assert torch.equal(weights.parameter(parameter).float(), wanted[parameter]), parameter
        if wanted[parameter].ndim == 3:
            assert torch.equal(weights.expert_rows(parameter, 2, 5).float(), wanted[parameter][2:5]), parameter
    assert moebit.verify(output)["state"] == "fine"
    plan = moebit.quantize(checkpoint, "nowhere", recipe=full({"weights": {}, **read_recipe(name)}), dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.size_bytes == sum(tensor.nbytes for tensor in stored_tensors(output).values())


def read_recipe(name: str) -> dict[str, Any]:
    return {"asymmetric": ASYMMETRIC, "nvfp4": NVFP4, "mxfp4": MXFP4, "blocks": BLOCKS, "w4a8": W4A8}[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_near_the_originals(name: str, outputs: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, output = outputs[name]
    original, read = stored_tensors(checkpoint), by_the_library(output)
    assert read.keys() == original.keys()
    for key, value in original.items():
        away = float((read[key].float() - value.float()).norm() / value.float().norm())
        assert away < (0.05 if name == "blocks" else 0.16), (key, away)


@pytest.mark.parametrize("name", ["asymmetric", "nvfp4"])
def test_linears_that_engines_join_share_the_scale_of_the_matrix(name: str, outputs: dict[str, tuple[Path, Path]]) -> None:
    stored = stored_tensors(outputs["nvfp4"][1])
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")):
        assert len({float(stored[f"model.layers.1.{one}.weight_global_scale"]) for one in group}) == 1


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("asymmetric", "zero point"),
        ("nvfp4", "global scale"),
        ("nvfp4", "experts"),
        ("mxfp4", "exponent"),
    ],
)
def test_planted_errors_are_noticed(name: str, planted: str, outputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """What the comparison with the original allows is passed by each of these by far."""
    checkpoint, output = outputs[name]
    tensors = stored_tensors(output)
    first, second = ("model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj")
    if planted == "zero point":
        tensors[f"{first}.weight_zero_point"] += 0x11111111
    elif planted == "global scale":
        tensors[f"{first}.weight_global_scale"] = torch.ones(1)
    elif planted == "exponent":
        tensors[f"{first}.weight_scale"] += 1
    else:
        for leaf in ("weight_packed", "weight_scale"):
            tensors[f"{first}.{leaf}"], tensors[f"{second}.{leaf}"] = tensors[f"{second}.{leaf}"], tensors[f"{first}.{leaf}"]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((output / "config.json").read_text())
    read, original = by_the_library(tmp_path)[f"{first}.weight"].float(), stored_tensors(checkpoint)[f"{first}.weight"].float()
    assert float((read - original).norm() / original.norm()) > 0.25


@pytest.mark.slow
def test_logits_of_mxfp4_in_transformers(outputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """In bfloat16, the type in which transformers dequantizes it."""
    checkpoint, output = outputs["mxfp4"]
    logits, errors = plain_transformers(tmp_path, {"mxfp4": (output, "bfloat16")})
    assert not errors
    wanted = reference_logits(checkpoint, output, tmp_path, torch.bfloat16)
    assert float((logits["mxfp4"] - wanted).norm() / wanted.norm()) < 0.02


# --- what engines make of it, and recipes


@pytest.mark.parametrize(
    ("recipe", "engine", "says"),
    [
        (ASYMMETRIC, "transformers", "zero points"),
        (NVFP4, "transformers", "NVFP4"),
        (MXFP4, "sglang", "scope: experts"),
        ({"weights": {"bits": 3, "group_size": 32}}, "sglang", "not of 3"),
    ],
)
def test_refused_by_one_engine(recipe: dict[str, Any], engine: str, says: str, checkpoints: Checkpoints) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    with pytest.raises(BadInputError, match=f"{engine} cannot run.*{says}"):
        moebit.quantize(path, "nowhere", recipe=full(recipe), engine=engine, dry_run=True)
    plan = moebit.quantize(path, "nowhere", recipe=full(recipe), engine="vllm", dry_run=True)
    assert isinstance(plan, Plan)


def test_solved_fp4_is_nearer_than_rounded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    olmoe = ARCHITECTURES["olmoe"]
    path, text = checkpoints.path(olmoe), {"t": token_file(tmp_path / "t.jsonl", 1200)}
    calibration = {"samples": 16, "seq_len": 32}
    solved = written(path, tmp_path / "solved", {**NVFP4, "solver": {"method": "gptq"}, "calibration": calibration}, text=text)
    rounded = written(path, tmp_path / "rounded", NVFP4)
    kl = {out: moebit.evaluate(out, against=path, text=text, window=32)["texts"]["t"]["kl"] for out in (solved, rounded)}
    assert kl[solved] < 0.9 * kl[rounded]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"weights": {"type": "nvfp4"}, "format": "native"}, "does not hold it"),
        ({"weights": {"type": "nvfp4"}, "format": "gguf"}, "tensor of its own"),
        ({"weights": {"type": "nvfp4"}, "solver": {"method": "gptq", "scales": "dynamic", "act_order": False}}, "fixed before the solve"),
        ({"weights": {"type": "fp8-block"}, "solver": {"method": "rtn"}}, "activations.bits: 8"),
        ({**W4A8, "weights": {"bits": 4, "group_size": 64}}, "groups of 128"),
    ],
)
def test_recipes_that_are_refused(recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        moebit.load_recipe({"format": FORMAT, **recipe})


def test_what_blocks_do_not_divide_is_kept(checkpoints: Checkpoints) -> None:
    """Rows of 64 have no blocks of 128: everything is kept, so that nothing is left to be quantized."""
    with pytest.raises(BadInputError, match="do not divide its rows of"):
        moebit.quantize(checkpoints.path(ARCHITECTURES["olmoe"]), "nowhere", recipe=full(BLOCKS), dry_run=True)


# --- group sizes that do not divide, and overrides


def sizes(architecture: Architecture, checkpoints: Checkpoints, weights: dict[str, Any]) -> Plan:
    recipe = {"solver": {"method": "rtn"}, "weights": {"bits": 4, **weights}}
    plan = moebit.quantize(checkpoints.path(architecture), "nowhere", recipe=recipe, dry_run=True)
    assert isinstance(plan, Plan)
    return plan


def test_another_group_size_where_rows_need_one(checkpoints: Checkpoints) -> None:
    """Rows of 64 in attention, of 64 and 32 in experts, which have one group size for all projections."""
    olmoe = ARCHITECTURES["olmoe"]
    plan = sizes(olmoe, checkpoints, {"group_size": 128})
    assert {spec.group_size for spec in plan.linears.values()} == {64}
    assert {spec.group_size for parts in plan.experts.values() for spec in parts.values()} == {32}
    assert plan.describe()["other_group_sizes"]["model.layers.0.mlp.experts"] == 32
    row = sizes(olmoe, checkpoints, {"group_size": 64, "group_size_fallback": "row"})
    assert {spec.group_size for parts in row.experts.values() for spec in parts.values()} == {-1}
    assert {spec.group_size for spec in row.linears.values()} == {64}
    kept = sizes(olmoe, checkpoints, {"group_size": 64, "group_size_fallback": "keep"})
    assert not kept.experts
    assert "does not divide its 32" in kept.kept["model.layers.0.mlp.experts"]


def test_overrides(checkpoints: Checkpoints) -> None:
    overrides = [{"match": "re:q_proj$", "bits": 8}, {"match": "*.layers.1.mlp.experts", "bits": 3, "group_size": -1}]
    plan = sizes(ARCHITECTURES["olmoe"], checkpoints, {"group_size": 32, "overrides": overrides})
    widths = {name: (spec.bits[0], spec.group_size) for name, spec in plan.linears.items()}
    assert widths["model.layers.0.self_attn.q_proj"] == (8, 32)
    assert widths["model.layers.0.self_attn.k_proj"] == (4, 32)
    assert {(s.bits[0], s.group_size) for s in plan.experts["model.layers.1.mlp.experts"].values()} == {(3, -1)}
    assert {(s.bits[0], s.group_size) for s in plan.experts["model.layers.0.mlp.experts"].values()} == {(4, 32)}
    with pytest.raises(BadInputError, match="'nothing' matches no linear"):
        sizes(ARCHITECTURES["olmoe"], checkpoints, {"group_size": 32, "overrides": [{"match": "nothing", "bits": 8}]})
    with pytest.raises(BadInputError, match="group size 128 does not divide"):
        sizes(ARCHITECTURES["olmoe"], checkpoints, {"group_size": 32, "overrides": [{"match": "*", "group_size": 128}]})
