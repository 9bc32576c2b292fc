"""Triton's products with packed codes against float64 products with naively dequantized weights, and when they are taken."""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.model.experts import dispatch
from moebit.runtime import PackedLinear, PackedMatrices, multiplied, paths, use
from moebit.runtime.packed_experts import pack_experts, packed_experts_forward
from tests.runtime.test_kernels import MIXED, error, fill, linear_of
from tests.support.devices import INSTALLED, interpreter, on_devices

OUTPUTS = 20
# (inputs, group, symmetric, type of the scales): several groups a row and one, groups and rows that end inside a unit of eight codes
CASES = [
    (256, 128, True, torch.bfloat16),
    (192, 64, False, torch.float32),
    (60, 20, False, torch.bfloat16),
    (100, -1, False, torch.float16),
    (44, 22, True, torch.float32),
]


def product(module: PackedMatrices, x: Tensor, counts: list[int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(product, wanted, everything that was written): expert e takes `counts[e]` rows of x; results two columns apart, from the second."""
    from moebit.runtime import triton_kernels

    weights, chosen = fill(module), [e for e, count in enumerate(counts) if count]
    bounds = [0, *torch.tensor([counts[e] for e in chosen]).cumsum(0).tolist()]
    tokens = torch.arange(bounds[-1]).flip(0) % len(x)
    parts = [weights[e] @ x[tokens[low:high]].double().T for e, low, high in zip(chosen, bounds, bounds[1:], strict=False)]
    y = torch.full((bounds[-1], 2 * OUTPUTS + 6), 7.0, device=device)
    rows = slice(1, 2 * OUTPUTS + 1, 2)
    triton_kernels.product(module.to(device).stack(), x.to(device), chosen, bounds, tokens.to(device), y, rows)
    return y[:, rows].clone().cpu(), torch.cat(parts, 1).T, y.cpu()


@on_devices
@pytest.mark.parametrize("counts", [[1, 0, 2, 1, 1, 1], [9, 11, 0, 9, 9, 9]], ids=["few", "many"])
@pytest.mark.parametrize(("inputs", "group", "symmetric", "scale_dtype"), CASES)
def test_products(inputs: int, group: int, symmetric: bool, scale_dtype: torch.dtype, counts: list[int], device: str) -> None:
    """All widths in one stack; an expert without tokens."""
    module = PackedMatrices(PackedSpec(MIXED, (OUTPUTS, inputs), group, symmetric, scale_dtype, stacked=True))
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    got, wanted, y = product(module, x, counts, device)
    assert error(got, wanted) < 1e-6
    y[:, 1 : 2 * OUTPUTS + 1 : 2] = 7
    assert bool((y == 7).all())


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """Few rows and many in one call: the former in float32 throughout, the latter with weights rounded to the type of the input."""
    module = PackedMatrices(PackedSpec((2, 3), (OUTPUTS, 64), 32, False, torch.float32, stacked=True))
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, wanted, _ = product(module, x, [2, 68], device)
    assert error(got[:2], wanted[:2]) < 1e-6
    assert 1e-5 < error(got[2:], wanted[2:]) < torch.finfo(dtype).eps


@interpreter
def test_codes_up_to_the_last_byte_of_a_mapped_file(tmp_path: Path) -> None:
    """No kernel may read beyond its codes, even where a tile has more rows than there are: behind a mapping there is nothing."""
    from moebit.runtime import triton_kernels

    module = PackedMatrices(PackedSpec((4, 4), (8, 512), -1, True, torch.float32, stacked=True))
    weights, size = fill(module), module.codes.numel()
    assert size % mmap.PAGESIZE == 0
    (tmp_path / "codes").write_bytes(bytes(module.codes.tolist()))
    module.codes = torch.from_file(str(tmp_path / "codes"), size=size, dtype=torch.uint8)
    x = torch.randn(9, 512)
    for rows in (1, 9):  # few, and many
        y = torch.empty(2 * rows, 8)
        triton_kernels.product(module.stack(), x, [0, 1], [0, rows, 2 * rows], torch.arange(rows).repeat(2), y, slice(None))
        assert error(y, torch.cat([x[:rows].double() @ w.T for w in weights])) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_they_compile_for_devices(tmp_path: Path) -> None:
    """Triton's compiler and assembler need no device: machine code for compute capabilities 8.0 and 9.0, for every type of input.

    The solver's must divide as IEEE has it and fuse nothing, the tiles must go to tensor cores.
    """
    program = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moebit.runtime import triton_kernels as products
from moebit.tensor import triton_kernels as solver

def compiled(kernel, types, constants, capability, **options):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, **options}).asm
    assert len(asm["cubin"])
    return asm["ptx"]

bytes_of = {"codes": "*u8", "zeros": "*u8", "bits_of": "*i32", "code_at": "*i64", "zero_at": "*i64", "tokens": "*i64", "table": "*i32"}
for number, (x, capability) in enumerate((("bf16", 90), ("fp16", 80), ("fp32", 90))):
    types = {**bytes_of, "x": "*" + x, "y": "*fp32", "scale": ("*bf16", "*fp16", "*fp32")[number]}
    flags = {"SYMMETRIC": number == 0, "WHOLE": number != 2, "WIDEST": (4, 8, 6)[number]}
    compiled(products._few, types, {**flags, **products.FEW_TILE}, capability)
    ptx = compiled(products._many, types, {**flags, **products.MANY_TILE}, capability)
    assert x == "fp32" or "mma" in ptx
for work, dtype, capability in (("fp32", torch.float32, 90), ("fp64", torch.float64, 80)):
    types = {"group": "*i64", "codes": "*u8"} | {name: "*" + work for name in "w carried f d scale zero qmax error loss".split()}
    constants = {"ROWS": solver.ROWS, "COLUMNS": 128, "BEYOND": solver.BEYOND, "MAGIC": solver.MAGIC[dtype]}
    ptx = compiled(solver._gptq_block, types, constants, capability, enable_fp_fusion=False)
    assert "fma.rn.f" not in ptx and "div.rn.f" in ptx and "div.full" not in ptx
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


class Gated(nn.Module):
    """Experts as transformers has them: interleaved gate and up, biases."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, True, False, False, False

    def __init__(self, experts: int, hidden: int, inside: int) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(experts, *s)) for s in ((2 * inside, hidden), (hidden, inside)))
        self.gate_up_proj_bias, self.down_proj_bias = (nn.Parameter(torch.randn(experts, n)) for n in (2 * inside, hidden))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up[:, ::2].sigmoid() * gate_up[:, 1::2]


@on_devices
def test_experts(device: str) -> None:
    """Experts with many tokens, with one and with none, of several widths each; unused slots."""
    torch.manual_seed(0)
    module: Any = Gated(4, 48, 16)
    specs = {p: PackedSpec((2, 4, 8, 5), (16, 48), 16, False, torch.float32, stacked=True) for p in ("gate_proj", "up_proj")}
    pack_experts(module, "experts", specs | {"down_proj": PackedSpec((3, 3, 6, 4), (48, 16), 16, True, torch.float32, stacked=True)})
    weights = {p: fill(getattr(module, p), seed) for seed, p in enumerate(("gate_proj", "up_proj", "down_proj"))}
    x, ids, affinity = torch.randn(10, 48), torch.tensor([[0, 1], *[[0, 4]] * 8, [2, 0]]), torch.rand(10, 2)
    wanted = torch.zeros(10, 48, dtype=torch.float64)
    for token, k in ((t, k) for t in range(10) for k in range(2) if ids[t, k] < 4):
        e = int(ids[token, k])
        bias, down_bias = module.gate_up_proj_bias[e].double(), module.down_proj_bias[e].double()
        gate, up = (weights[p][e] @ x[token].double() + bias[i::2] for i, p in enumerate(("gate_proj", "up_proj")))
        wanted[token] += affinity[token, k] * (weights["down_proj"][e] @ (gate.sigmoid() * up) + down_bias)
    use(module.to(device), "triton")
    with torch.no_grad():
        got = packed_experts_forward(module, x.to(device), ids.to(device), affinity.to(device))
    assert dispatch(ids, affinity, 4).bounds == [0, 10, 11, 12, 12]
    assert error(got.cpu(), wanted.detach()) < 1e-6


# --- choosing


@interpreter
def test_use_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    module = linear_of(4)
    assert multiplied(module) == ("auto",)
    assert multiplied(use(module, "triton")) == ("triton",)
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    with pytest.raises(BadInputError, match="lies on cpu, and 'triton' is for CUDA devices"):
        use(module, "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match="Triton is not installed"):
        use(module, "triton")
    away = PackedLinear(module.spec, False, torch.float32).to("meta")
    with pytest.raises(BadInputError, match="lies on meta, and 'float' is for CPUs"):
        use(away, "float")


def test_what_auto_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    for installed, wanted in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, installed=installed: installed or None)
        assert [paths.taken("auto", device) for device in (cpu, cuda, torch.device("meta"))] == ["auto", wanted, "reference"]
        assert paths.by_triton("auto", cuda, torch.bfloat16) == installed
        assert not paths.by_triton("auto", cpu, torch.bfloat16)
        assert not paths.by_triton("auto", cuda, torch.float64)
        assert not paths.compiled("auto", cuda, torch.bfloat16)
