"""The native format against a reader written from its description."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moebit.errors import BadInputError
from moebit.formats.native import NativeWeights, PackedSpec, average_bits, packed_specs, put, quantization_config
from moebit.model.experts import ExpertsLayout
from moebit.storage.files import ShardFile, read_header
from moebit.tensor import QTensor, UniformGrid, UniformParams
from tests.support.outputs import read_stack, row_bytes

EXPERTS, OUT, IN, GROUP = 6, 5, 12, 4  # neither 5 x 12 nor 5 x 3 is a multiple of 8: rows end in padding
WIDTHS = (2, 3, 4, 5, 6, 8)
UNIFORM = [(width,) * EXPERTS for width in WIDTHS]
MIXED = [(2, 3, 4, 5, 6, 8), (8, 2, 2, 3, 8, 5)]
GRIDS = list(itertools.product(UNIFORM + MIXED, (True, False), (-1, GROUP)))
NAME = "model.layers.3.mlp.experts"


def spec_of(
    bits: tuple[int, ...], symmetric: bool, group_size: int, shape: tuple[int, int] = (OUT, IN), stacked: bool = True
) -> PackedSpec:
    return PackedSpec(bits, shape, group_size, symmetric, torch.float32, stacked)


def random_stack(spec: PackedSpec, seed: int = 0) -> QTensor:
    """Every code and zero point of the width may occur; the extremes do."""
    generator = torch.Generator().manual_seed(seed)
    (out, inputs), experts = spec.shape, len(spec.bits)
    groups = 1 if spec.group_size == -1 else inputs // spec.group_size
    codes, zeros = torch.empty(experts, out, inputs, dtype=torch.uint8), torch.empty(experts, out, groups, dtype=torch.uint8)
    for expert, width in enumerate(spec.bits):
        codes[expert] = torch.randint(0, 2**width, (out, inputs), generator=generator)
        codes[expert, 0, :2] = torch.tensor([0, 2**width - 1])
        zeros[expert] = 2 ** (width - 1) if spec.symmetric else torch.randint(0, 2**width, (out, groups), generator=generator)
    scale = torch.randn(experts, out, groups, generator=generator).to(spec.scale_dtype)
    return QTensor(
        codes,
        UniformParams(scale, zeros),
        torch.tensor(spec.bits),
        UniformGrid(spec.group_size, spec.symmetric, scale_dtype=spec.scale_dtype),
    )


def matrices(q: QTensor, start: int, stop: int) -> QTensor:
    return QTensor(
        q.codes[start:stop], UniformParams(q.params.scale[start:stop], q.params.zero_point[start:stop]), q.bits[start:stop], q.grid
    )


def by_hand(q: QTensor) -> np.ndarray:
    """scale * (code - zero point) in float64, straight from the stack."""
    width = q.codes.shape[2] // q.params.scale.shape[2]
    scale, zero = (t.double().repeat_interleave(width, 2) for t in (q.params.scale, q.params.zero_point))
    return (scale * (q.codes.double() - zero)).numpy()


def write(path: Path, stacks: dict[str, tuple[PackedSpec, QTensor]], chunks: tuple[tuple[int, int], ...]) -> Path:
    specs = {}
    for name, (spec, _) in stacks.items():
        specs |= spec.specs(name)
    with ShardFile(path, specs) as shard:
        for start, stop in chunks:
            for name, (spec, q) in stacks.items():
                put(shard, name, spec, matrices(q, start, stop), start)
    return path


class NoModel(nn.Module):
    """A module that expects nothing more than what is packed."""

    def __init__(self) -> None:
        super().__init__()
        self.all_tied_weights_keys: dict[str, str] = {}


def native_weights(path: Path, specs: dict[str, dict[str, PackedSpec]], layouts: dict[str, ExpertsLayout] | None = None) -> NativeWeights:
    return NativeWeights(NoModel(), read_header(path), specs, layouts or {})


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), GRIDS)
def test_experts_read_back(tmp_path: Path, bits: tuple[int, ...], symmetric: bool, group_size: int) -> None:
    """Written in chunks out of order, read back by the naive reader and through NativeWeights, whole and in ranges."""
    shapes = {"gate_proj": (OUT, IN), "up_proj": (OUT, IN), "down_proj": (IN, OUT)}
    sizes = {p: group_size if p != "down_proj" else -1 for p in shapes}  # 4 does not divide down's 5 inputs
    specs = {p: spec_of(bits, symmetric, sizes[p], shape) for p, shape in shapes.items()}
    stacks = {p: random_stack(spec, seed) for seed, (p, spec) in enumerate(specs.items())}
    path = write(tmp_path / "s.safetensors", {f"{NAME}.{p}": (specs[p], stacks[p]) for p in shapes}, ((4, 6), (0, 1), (1, 4)))

    stored = load_file(path)
    for p, q in stacks.items():
        naive = read_stack(stored, f"{NAME}.{p}", list(bits), shapes[p], symmetric)
        assert np.array_equal(naive, by_hand(q)), p
        assert np.array_equal(naive.astype(np.float32), q.dequantize().numpy()), p
        assert torch.equal(stored[f"{NAME}.{p}.scale"], q.params.scale), p
        assert stored[f"{NAME}.{p}.bits"].tolist() == list(bits), p
        assert (f"{NAME}.{p}.zero_point" in stored) == (not symmetric)

    for interleaved, transposed in ((False, False), (True, True)):
        layout = ExpertsLayout(EXPERTS, IN, OUT, True, interleaved, transposed, False)
        weights = native_weights(path, {NAME: specs}, {NAME: layout})
        gate, up, down = (torch.from_numpy(by_hand(stacks[p])).float() for p in shapes)
        first = torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
        for start, stop in ((0, EXPERTS), (2, 5), (5, 6)):
            for leaf, wanted in (("gate_up_proj", first), ("down_proj", down)):
                wanted = wanted.transpose(1, 2) if transposed else wanted
                assert torch.equal(weights.expert_rows(f"{NAME}.{leaf}", start, stop), wanted[start:stop]), (leaf, start, stop)


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(b, s, g) for b, s, g in GRIDS if b in UNIFORM])
def test_linears_read_back(tmp_path: Path, bits: tuple[int, ...], symmetric: bool, group_size: int) -> None:
    spec = spec_of(bits[:1], symmetric, group_size, stacked=False)
    q = random_stack(spec)
    path = write(tmp_path / "s.safetensors", {"model.q": (spec, q)}, ((0, 1),))
    stored = load_file(path)
    assert stored["model.q.codes"].shape == (OUT, row_bytes(IN, bits[0]))
    assert stored["model.q.scale"].shape == (OUT, 1 if group_size == -1 else IN // group_size)
    assert np.array_equal(read_stack(stored, "model.q", [bits[0]], (OUT, IN), symmetric)[0], by_hand(q)[0])
    read = native_weights(path, {"model.q": {"": spec}}).parameter("model.q.weight")
    assert torch.equal(read, torch.from_numpy(by_hand(q)[0]).float())


def test_bytes_of_a_known_matrix(tmp_path: Path) -> None:
    """Two rows of nine 3-bit codes: the format pinned bit by bit."""
    codes = torch.tensor([[[1, 2, 3, 4, 5, 6, 7, 0, 5], [7, 7, 7, 7, 7, 7, 7, 7, 7]]], dtype=torch.uint8)
    spec = PackedSpec((3,), (2, 9), 3, False, torch.float32, stacked=False)
    zeros = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=torch.uint8)
    q = QTensor(codes, UniformParams(torch.ones(1, 2, 3), zeros), torch.tensor([3]), UniformGrid(3, False))
    stored = load_file(write(tmp_path / "s.safetensors", {"w": (spec, q)}, ((0, 1),)))
    # value i at bits [3i, 3i + 3): 1 | 2<<3 | 3<<6 | 4<<9 | 5<<12 | 6<<15 | 7<<18 = 0x1F58D1, and the ninth opens a new 3 bytes
    assert stored["w.codes"].tolist() == [[0xD1, 0x58, 0x1F, 5, 0, 0], [0xFF, 0xFF, 0xFF, 7, 0, 0]]
    assert stored["w.zero_point"].tolist() == list((1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12 | 6 << 15).to_bytes(3, "little"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = replace(spec_of((3,) * EXPERTS, False, GROUP), scale_dtype=dtype)
    q = random_stack(spec)
    stored = load_file(write(tmp_path / "s.safetensors", {"w": (spec, q)}, ((0, EXPERTS),)))
    assert stored["w.scale"].dtype == dtype
    assert np.array_equal(read_stack(stored, "w", list(spec.bits), spec.shape, False), by_hand(q))


def test_announced_widths_are_held(tmp_path: Path) -> None:
    spec = spec_of((3,) * EXPERTS, True, -1)
    with ShardFile(tmp_path / "s.safetensors", spec.specs("w")) as shard:
        with pytest.raises(ValueError, match="announced"):
            put(shard, "w", spec, random_stack(replace(spec, bits=(4,) * EXPERTS)))
        put(shard, "w", spec, random_stack(spec))


def test_average_bits_by_hand() -> None:
    """8 x bytes of codes, scales and zero points / weights, counted with a pencil."""
    # 6 experts of 5 x 12, groups of 4, bits 2 3 4 5 6 8: rows of 16 values, 2 bytes a bit
    codes = 5 * 2 * (2 + 3 + 4 + 5 + 6 + 8)
    scales = 6 * 5 * 3 * 4
    zeros = 2 * (2 + 3 + 4 + 5 + 6 + 8)  # 5 x 3 values in one row of 16
    mixed = spec_of((2, 3, 4, 5, 6, 8), False, GROUP)
    assert average_bits({NAME: {"up_proj": mixed}}) == pytest.approx(8 * (codes + scales + zeros) / 360, rel=1e-12)
    # beside it a symmetric 4-bit linear 7 x 10 with one bf16 scale a row: rows of 16 values, 8 bytes
    linear = PackedSpec((4,), (7, 10), -1, True, torch.bfloat16, stacked=False)
    together = 8 * (codes + scales + zeros + 7 * 8 + 7 * 2) / (360 + 70)
    assert average_bits({NAME: {"up_proj": mixed}, "q": {"": linear}}) == pytest.approx(together, rel=1e-12)


def test_config_round_trip() -> None:
    specs = {
        NAME: {
            "gate_proj": spec_of(MIXED[0], False, GROUP),
            "up_proj": spec_of(UNIFORM[1], False, GROUP),
            "down_proj": spec_of(MIXED[1], False, -1),
        },
        "model.q": {"": PackedSpec((5,), (7, 10), -1, True, torch.bfloat16, stacked=False)},
    }
    specs[NAME]["down_proj"] = replace(specs[NAME]["down_proj"], group_size=GROUP, shape=(IN, IN))
    config = quantization_config(specs)
    assert config["modules"][NAME]["projections"]["gate_proj"]["bits"] == list(MIXED[0])
    assert config["modules"][NAME]["projections"]["up_proj"]["bits"] == 3
    assert packed_specs(config) == specs


def test_a_later_format_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"format version 3.*newer"):
        packed_specs({"format_version": 3, "modules": {}})


def test_damaged_outputs_are_refused(tmp_path: Path) -> None:
    spec = spec_of((3,), False, -1, stacked=False)
    path = write(tmp_path / "s.safetensors", {"q": (spec, random_stack(spec))}, ((0, 1),))
    with pytest.raises(BadInputError, match=r"'p\.codes' is missing"):
        native_weights(path, {"p": {"": spec}})
    with pytest.raises(BadInputError, match=r"q\.codes.*damaged"):
        native_weights(path, {"q": {"": replace(spec, bits=(4,))}})
