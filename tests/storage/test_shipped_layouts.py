"""GPTQ, AWQ, auto-round, bitsandbytes, ModelOpt and MLX: decoded value by value from the formats' definitions.

benchmarks/round_trips.py compares with the libraries themselves (benchmarks/results/round-trips.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage.files import read_header
from moebit.storage.shipped.entries import Shipped, check_shipped
from moebit.storage.shipped.reading import plain_config, read_shipped, shipped_config

OUT, IN, GROUP = 32, 64, 32
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Tensors = dict[str, Tensor]


def opened(directory: Path, tensors: Tensors, quantization: dict[str, Any]) -> Shipped:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return read_shipped(directory, read_header(directory / "model.safetensors"), quantization)


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(numbers)))


def words(codes: list[int], bits: int) -> list[int]:
    """Codes as 32-bit words with a sign, one long number from the lowest bit on."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    found = [number >> (32 * place) & 0xFFFFFFFF for place in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def assert_reads(shipped: Shipped, name: str, value: Tensor) -> None:
    """The whole matrix, and rows that begin and end anywhere."""
    entry = shipped.entries[name]
    assert (entry.dtype, entry.shape) == (value.dtype, tuple(value.shape))
    for start, stop in ((0, len(value)), (0, 0), (3, 4), (len(value) // 2 - 1, len(value) - 1)):
        assert torch.equal(entry.read(start, stop), value[start:stop]), (name, start, stop)
    check_shipped(shipped.entries.values())


# --- GPTQ and AWQ


def gptq(bits: int, version: int, scattered: bool) -> tuple[Tensors, Tensor]:
    generator = seeded(bits, version)
    groups = IN // GROUP
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=generator)
    zeros = torch.randint(version % 2, 2**bits, (OUT, groups), generator=generator)
    scale = (torch.rand(OUT, groups, generator=generator) + 0.1).half()
    index = torch.arange(IN) // GROUP
    index = index[torch.randperm(IN, generator=generator)] if scattered else index
    stored = {
        "x.qweight": torch.tensor([words(codes[o].tolist(), bits) for o in range(OUT)], dtype=torch.int32).T,
        "x.qzeros": torch.tensor(
            [words([z - (version == 1) for z in zeros[:, g].tolist()], bits) for g in range(groups)], dtype=torch.int32
        ),
        "x.scales": scale.T,
        "x.g_idx": index.int(),
    }
    value = torch.empty(OUT, IN)
    for o in range(OUT):
        for i in range(IN):
            g = int(index[i])
            value[o, i] = float(scale[o, g]) * (int(codes[o, i]) - int(zeros[o, g]))
    return stored, value.half()


@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, version: int, scattered: bool, tmp_path: Path) -> None:
    stored, value = gptq(bits, version, scattered)
    declared = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": scattered}
    shipped = opened(tmp_path, stored, {**declared, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]})
    assert_reads(shipped, "x.weight", value)
    assert shipped.scheme == f"int{bits} groups of 32{' in activation order' if scattered else ''}"
    assert shipped.average_bits > bits


def test_gptq_zero_point_0_of_version_1(tmp_path: Path) -> None:
    """GPTQModel takes one off a whole word, which borrows from the next field, and adds it to the whole word again."""
    stored, value = gptq(4, 2, False)
    stored["x.qzeros"] = torch.tensor(
        [[((word - 0x11111111) & 0xFFFFFFFF) for word in row] for row in stored["x.qzeros"].tolist()], dtype=torch.int64
    ).to(torch.int32)
    assert_reads(opened(tmp_path, stored, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}), "x.weight", value)


@pytest.mark.parametrize(("packing", "version"), [("auto_round:auto_gptq", 1), ("auto_round:gptqmodel", 2), ("auto_round", 2)])
def test_auto_round(packing: str, version: int, tmp_path: Path) -> None:
    stored, value = gptq(4, version, False)
    del stored["x.g_idx"]
    declared = {"quant_method": "intel/auto-round", "bits": 4, "group_size": GROUP, "packing_format": packing}
    assert_reads(opened(tmp_path, stored, declared), "x.weight", value)


def awq() -> tuple[Tensors, Tensor]:
    generator, groups = seeded(7), IN // GROUP
    codes = torch.randint(0, 16, (IN, OUT), generator=generator)
    zeros = torch.randint(0, 16, (groups, OUT), generator=generator)
    scale = (torch.rand(groups, OUT, generator=generator) + 0.1).half()

    def packed(values: Tensor) -> Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return torch.tensor([[words([row[8 * w + o] for o in order], 4)[0] for w in range(OUT // 8)] for row in values.tolist()])

    value = torch.tensor([[float(scale[i // GROUP, o]) * (codes[i, o] - zeros[i // GROUP, o]) for i in range(IN)] for o in range(OUT)])
    return {"x.qweight": packed(codes).int(), "x.qzeros": packed(zeros).int(), "x.scales": scale}, value.half()


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP},
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_awq"},
    ],
    ids=["awq", "older-keys", "auto-round"],
)
def test_awq(declared: dict[str, Any], tmp_path: Path) -> None:
    stored, value = awq()
    assert_reads(opened(tmp_path, stored, declared), "x.weight", value)


# --- bitsandbytes


def blocks(shape: tuple[int, ...], nested: bool, block: int = 64) -> tuple[Tensors, Tensor]:
    """Random codes of a random table; the blocks end inside rows, and the last one early."""
    generator, count = seeded(*shape), int(torch.tensor(shape).prod())
    table = torch.rand(16, generator=generator) * 2 - 1
    codes = torch.randint(0, 16, (count,), generator=generator).tolist()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    number = -(-count // block)
    stored: Tensors = {"x.weight.quant_map": table}
    if nested:
        inner, steps = torch.randint(0, 256, (number,), generator=generator), torch.rand(256, generator=generator)
        outer = torch.rand(-(-number // 2), generator=generator)
        state |= {"nested_blocksize": 2, "nested_offset": 0.25, "nested_dtype": "float32"}
        magnitude = [float(torch.tensor(0.25) + steps[inner[b]] * outer[b // 2]) for b in range(number)]
        stored |= {"x.weight.absmax": inner.to(torch.uint8), "x.weight.nested_absmax": outer, "x.weight.nested_quant_map": steps}
    else:
        stored["x.weight.absmax"] = torch.rand(number, generator=generator)
        magnitude = stored["x.weight.absmax"].tolist()
    padded = [*codes, 0][: count + count % 2]
    pairs = [padded[i] << 4 | padded[i + 1] for i in range(0, len(padded), 2)]
    stored["x.weight"] = torch.tensor(pairs, dtype=torch.uint8).view(-1, 1)
    stored["x.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    value = torch.tensor([float(table[code]) * magnitude[i // block] for i, code in enumerate(codes)])
    return stored, value.view(shape).bfloat16()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(9, 25), (16, 64), (3, 5, 32)], ids=str)
def test_bitsandbytes_blocks(shape: tuple[int, ...], nested: bool, tmp_path: Path) -> None:
    stored, value = blocks(shape, nested)
    shipped = opened(tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    entry = shipped.entries["x.weight"]
    for start, stop in ((0, len(value)), (1, 2), (len(value) - 1, len(value))):
        assert torch.allclose(entry.read(start, stop).float(), value[start:stop].float(), rtol=2**-7, atol=0)  # float32 or float64 products
    assert (torch.tensor([torch.equal(entry.read(r, r + 1), entry.read()[r : r + 1]) for r in range(len(value))])).all()
    check_shipped(shipped.entries.values())
    assert shipped.scheme == "nf4 blocks of 64"


def test_bitsandbytes_channels(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (6, 10), dtype=torch.int8, generator=seeded(1))
    scale = torch.rand(6, generator=seeded(2))
    stored = {"x.weight": codes, "x.SCB": scale, "x.weight_format": torch.tensor(0, dtype=torch.uint8), "x.bias": torch.ones(6)}
    shipped = opened(tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert set(shipped.entries) == {"x.weight", "x.bias"}
    value = (codes.double() * scale.double()[:, None] / 127).bfloat16()
    assert torch.allclose(shipped.entries["x.weight"].read(2, 5).float(), value[2:5].float(), rtol=2**-7)


# --- ModelOpt and MLX


def fp4_rows(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """(bytes [rows, width / 2], values [rows, width])."""
    codes = torch.randint(0, 16, (rows, width), generator=seeded(rows, width))
    stored = torch.tensor([[row[i] | row[i + 1] << 4 for i in range(0, width, 2)] for row in codes.tolist()], dtype=torch.uint8)
    return stored, torch.tensor([[(-1 if code & 8 else 1) * FP4[code & 7] for code in row] for row in codes.tolist()])


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    stored, numbers = fp4_rows(OUT, IN)
    scale = (torch.rand(OUT, IN // 16, generator=seeded(3)) * 100).to(torch.float8_e4m3fn)
    shared = torch.tensor(0.0125)
    value = torch.tensor([[float(numbers[o, i]) * float(scale[o, i // 16]) for i in range(IN)] for o in range(OUT)]) * shared
    parts = {"x.weight": stored, "x.weight_scale": scale, "x.weight_scale_2": shared, "x.input_scale": torch.tensor(1.0)}
    shipped = opened(tmp_path, parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    found = shipped.entries["x.weight"].read()
    assert torch.allclose(found.float(), value, rtol=2**-8)
    assert shipped.describe()["activation_scales_left_out"] == 1


def test_modelopt_stacks_stored_by_input(tmp_path: Path) -> None:
    """Experts [E, in, out], as transformers has those of Llama 4 and gpt-oss, lie as [E, in / 2, out]."""
    both = [fp4_rows(OUT, IN), fp4_rows(OUT + 1, IN)]
    stored = torch.stack([rows[:OUT].T for rows, _ in both])
    scale = torch.ones(2, IN // 16, OUT).to(torch.float8_e4m3fn)
    parts = {"e.down_proj": stored, "e.down_proj_scale": scale, "e.down_proj_scale_2": torch.tensor([1.0, 2.0])}
    entry = opened(tmp_path, parts, {"quant_method": "modelopt"}).entries["e.down_proj"]
    assert entry.shape == (2, IN, OUT)
    for expert, (_, numbers) in enumerate(both):
        assert torch.equal(entry.read(expert, expert + 1)[0].float(), numbers[:OUT].T * (expert + 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_affine(bits: int, tmp_path: Path) -> None:
    generator = seeded(bits)
    codes = torch.randint(0, 2**bits, (2, OUT, IN), generator=generator)
    scale, offset = (torch.randn(2, OUT, IN // GROUP, generator=generator) for _ in range(2))
    packed = torch.tensor([[words(row, bits) for row in matrix] for matrix in codes.tolist()], dtype=torch.int32).view(torch.uint32)
    parts = {f"b.mlp.switch_mlp.up_proj.{leaf}": t for leaf, t in (("weight", packed), ("scales", scale), ("biases", offset))}
    shipped = opened(
        tmp_path, parts, {"quant_method": "mlx", "bits": 8, "group_size": 64, "b.mlp.switch_mlp.up_proj": dict(bits=bits, group_size=GROUP)}
    )
    assert set(shipped.entries) == {f"b.mlp.experts.{expert}.up_proj.weight" for expert in (0, 1)}
    for expert in (0, 1):
        value = (
            codes[expert].double().unflatten(1, (-1, GROUP)) * scale[expert].double()[..., None] + offset[expert].double()[..., None]
        ).flatten(1)
        found = shipped.entries[f"b.mlp.experts.{expert}.up_proj.weight"].read(3, OUT)
        assert torch.allclose(found.double(), value[3:], rtol=2**-8, atol=1e-5)
    assert 0 < shipped.average_bits - bits <= 2


def test_mlx_names_and_plain_stacks(tmp_path: Path) -> None:
    """Mixtral's block names its matrices otherwise; what did not fit into groups is stored plain."""
    stack = torch.randn(2, 4, 6)
    parts = {"l.block_sparse_moe.switch_mlp.gate_proj.weight": stack, "norm.weight": torch.ones(4)}
    stored, numbers = fp4_rows(OUT, IN)
    parts |= {"x.weight": stored.view(torch.int32).view(torch.uint32), "x.scales": torch.full((OUT, IN // 32), 128, dtype=torch.uint8)}
    shipped = opened(tmp_path, parts, {"quant_method": "mlx", "bits": 4, "group_size": 32, "mode": "mxfp4"})
    assert torch.equal(shipped.entries["x.weight"].read().float(), 2 * numbers)
    for expert in (0, 1):
        assert torch.equal(shipped.entries[f"l.block_sparse_moe.experts.{expert}.w1.weight"].read(1, 3), stack[expert, 1:3])


def test_mlx_is_declared_without_a_method() -> None:
    sizes = {"group_size": 64, "bits": 4}
    assert shipped_config({"quantization": sizes, "quantization_config": sizes}) == {**sizes, "quant_method": "mlx"}
    assert plain_config({"quantization": sizes, "quantization_config": sizes, "a": 1}) == {"a": 1}


# --- compressed-tensors as it packed before version 0.18, and with scattered groups


def apart(codes: list[int], bits: int) -> list[int]:
    """Words of whole codes, with unused bits above them."""
    each = 32 // bits
    return [word for first in range(0, len(codes), each) for word in words(codes[first : first + each], bits)[:1]]


def compressed(weights: dict[str, Any], version: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "version": version, "config_groups": {"group_0": group}}


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
@pytest.mark.parametrize(("bits", "width"), [(3, 64), (5, 64), (6, 96), (7, 32), (3, 16)], ids=str)
def test_packings_of_compressed_tensors(bits: int, width: int, version: str, tmp_path: Path) -> None:
    """16 codes of 3 bits take two words either way: then the version tells."""
    lay, generator, half = (apart if version == "0.17.1" else words), seeded(bits, width), 2 ** (bits - 1)
    size = min(width, 32)
    codes = torch.randint(0, 2**bits, (OUT + 5, width), generator=generator)
    zeros = torch.randint(0, 2**bits, (OUT + 5, width // size), generator=generator)
    scale = torch.rand(OUT + 5, width // size, generator=generator)
    parts = {
        "x.weight_packed": torch.tensor([lay(row, bits) for row in codes.tolist()], dtype=torch.int32),
        "x.weight_zero_point": torch.tensor([lay(column, bits) for column in zeros.T.tolist()], dtype=torch.int32).T,
        "x.weight_scale": scale,
        "x.weight_shape": torch.tensor([OUT + 5, width]),
    }
    declared = compressed({"num_bits": bits, "strategy": "group", "group_size": size, "symmetric": False}, version)
    signed, away = codes - half, (zeros - half).repeat_interleave(size, 1)
    value = ((signed - away) * scale.repeat_interleave(size, 1)).bfloat16()
    assert_reads(opened(tmp_path, parts, declared), "x.weight", value)


def test_scattered_groups_of_compressed_tensors(tmp_path: Path) -> None:
    generator = seeded(11)
    codes, scale = torch.randint(0, 16, (OUT, IN), generator=generator), torch.rand(OUT, IN // GROUP, generator=generator)
    index = (torch.arange(IN) // GROUP)[torch.randperm(IN, generator=generator)]
    packed = torch.tensor([words(row, 4) for row in codes.tolist()], dtype=torch.int32)
    parts = {"x.weight_packed": packed, "x.weight_scale": scale, "x.weight_g_idx": index.int()}
    declared = compressed({"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True, "actorder": "group"}, "0.9.0")
    assert_reads(opened(tmp_path, parts, declared), "x.weight", ((codes - 8) * scale[:, index]).bfloat16())


# --- what is wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x.scales": None}, r"'x\.scales' is missing"),
        ({"x.qzeros": None}, r"'x\.qzeros' is missing"),
        ({"x.scales": torch.ones(1, OUT)}, r"'x\.scales' is float32 \[1, 32\], expected scales \[2, 32\]"),
        ({"x.qzeros": torch.zeros(2, 5, dtype=torch.int32)}, r"'x\.qzeros' is int32 \[2, 5\], expected int32 zero points \[2, 4\]"),
        ({"x.g_idx": torch.full((IN,), 2, dtype=torch.int32)}, r"'x\.g_idx' names a group outside of the 2 there are"),
        ({"x.g_idx": torch.zeros(IN + 1, dtype=torch.int32)}, r"'x\.qweight' of shape \[8, 32\] holds no codes"),
        ({"x.scales": torch.full((2, OUT), float("nan"))}, r"'x\.scales' holds a scale that is no finite number"),
    ],
)  # fmt: skip
def test_damaged_gptq(change: dict[str, Tensor | None], says: str, tmp_path: Path) -> None:
    stored = {name: tensor for name, tensor in {**gptq(4, 1, False)[0], **change}.items() if tensor is not None}
    with pytest.raises(BadInputError, match=says):
        check_shipped(opened(tmp_path, stored, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}).entries.values())


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (b"{x}", "holds no JSON"),
        (b"x" * 5000, "expected the bytes of a short JSON text"),
        ({"shape": [2**30, 2**30]}, r"expected the \d+ bytes of"),
        ({"blocksize": 0}, "blocksize"),
        ({"blocksize": 32}, "expected 8 magnitudes"),
        ({"quant_type": "int4"}, "quant_type"),
    ],
    ids=["json", "long", "huge", "nothing", "other-blocks", "other-type"],
)
def test_damaged_bitsandbytes(state: bytes | dict[str, Any], says: str, tmp_path: Path) -> None:
    whole = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [9, 25]}
    state = state if isinstance(state, bytes) else json.dumps(whole | state).encode()
    stored = {**blocks((9, 25), False)[0], "x.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8)}
    with pytest.raises(BadInputError, match=says):
        opened(tmp_path, stored, {"quant_method": "bitsandbytes"})


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "2, 3, 4, 8 bits, this has 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "this is 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "AWQ's version gemm, this is gemv"),
        ({"quant_method": "awq", "bits": "4", "group_size": 32}, "are no numbers"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}, "whole numbers, this holds mx_fp"),
        ({"quant_method": "hqq"}, "moebit reads fp8, mxfp4, compressed-tensors"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_variants_that_are_not_read(declared: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=says):
        opened(tmp_path, gptq(4, 1, False)[0], declared)
