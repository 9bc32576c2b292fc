"""Every way of multiplying packed matrices against float64 products with naively dequantized weights, and how one is chosen."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import moebit
from moebit.errors import BadInputError
from moebit.formats.native import PackedSpec
from moebit.runtime import PATHS, PackedLinear, PackedMatrices, paths, use, vectors
from moebit.runtime import Path as Way
from moebit.runtime.packed import PackedModule
from tests.runtime.test_load import load, logits
from tests.support.devices import INTERPRETED
from tests.support.models import ARCHITECTURES, quiet
from tests.support.outputs import Outputs, read_matrix, row_bytes

MIXED = (2, 3, 4, 5, 6, 8)
INTEGERS = pytest.mark.skipif(not vectors.AVAILABLE, reason="this processor lacks the instructions")
# (inputs, group): several per row, one per row, odd numbers of everything, groups that no vector fits
SHAPES = ((256, 128), (384, 192), (192, 64), (160, 32), (704, -1), (100, -1), (60, 20), (1280, 64))
CASES = [(*shape, torch.bfloat16) for shape in SHAPES] + [(*SHAPES[n], dtype) for n in (0, 3) for dtype in (torch.float32, torch.float16)]
OUTPUTS = 37


def fill(module: PackedModule, seed: int = 0) -> Tensor:
    """Random bytes in a module's buffers; the weights [E, O, I] that they mean, float64, value by value."""
    generator = torch.Generator().manual_seed(seed)
    spec = module.spec
    for name, buffer in module.named_buffers():
        if name == "scale":
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
        elif name == "bits":
            buffer.copy_(torch.tensor(spec.bits))
        else:
            buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8, generator=generator))
    codes = bytes(module.codes.flatten().tolist())
    zeros = None if spec.symmetric else bytes(module.zero_point.tolist())
    scale = module.scale.double().numpy().reshape(len(spec.bits), spec.shape[0], -1)
    matrices, code_at, zero_at = [], 0, 0
    for expert, bits in enumerate(spec.bits):
        code_size, zero_size = spec.shape[0] * row_bytes(spec.shape[1], bits), row_bytes(spec.shape[0] * scale.shape[2], bits)
        own = None if zeros is None else zeros[zero_at : zero_at + zero_size]
        matrices.append(read_matrix(codes[code_at : code_at + code_size], own, scale[expert], bits, spec.shape))
        code_at, zero_at = code_at + code_size, zero_at + zero_size
    return torch.from_numpy(np.stack(matrices))


def stack_of(inputs: int, group: int, symmetric: bool, scale_dtype: torch.dtype, bits: tuple[int, ...] = MIXED) -> PackedMatrices:
    return PackedMatrices(PackedSpec(bits, (OUTPUTS, inputs), group, symmetric, scale_dtype, stacked=True))


def linear_of(bits: int, inputs: int = 256, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> PackedLinear:
    return PackedLinear(PackedSpec((bits,), (OUTPUTS, inputs), 64, True, torch.bfloat16, stacked=False), bias, dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


# --- the kernels


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("inputs", "group", "scale_dtype"), CASES)
def test_products_and_weights(inputs: int, group: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """Ragged: some matrices twice, one not at all; rows of the result two apart, as interleaved gates have them."""
    from moebit.runtime.kernels import dequantize_into, float_product, integer_product, integers_serve

    module = stack_of(inputs, group, symmetric, scale_dtype)
    weights = fill(module)
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0, 3], x[3] = 30.0, 0.0  # an outlier, and a row of nothing
    chosen, bounds, tokens = [0, 1, 3, 4, 5], [0, 1, 3, 4, 6, 9], torch.tensor([4, 0, 1, 2, 2, 3, 0, 1, 2])
    wanted = torch.cat([weights[e] @ x[tokens[low:high]].double().T for e, low, high in zip(chosen, bounds, bounds[1:], strict=False)], 1).T
    products = [(float_product, 2e-6)]
    if vectors.AVAILABLE and (inputs, group) != (60, 20):
        products.append((integer_product, 2e-4))
    for product, tolerance in products:
        y = torch.full((9, 2 * OUTPUTS + 6), 7.0)
        product(module.stack(), x, chosen, bounds, tokens, y, slice(1, 2 * OUTPUTS + 1, 2))
        got = y[:, 1 : 2 * OUTPUTS + 1 : 2]
        assert error(got, wanted) < tolerance, product.__name__
        assert not got[5].any()
        y[:, 1 : 2 * OUTPUTS + 1 : 2] = 7
        assert bool((y == 7).all())
    assert vectors.AVAILABLE or not integers_serve(module.stack())
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.full((2 * OUTPUTS + 6, inputs), 7.0, dtype=dtype)
        for e in range(len(MIXED)):
            dequantize_into(module.stack(), e, target, slice(1, 2 * OUTPUTS + 1, 2))
            assert torch.equal(target[1 : 2 * OUTPUTS + 1 : 2], weights[e].float().to(dtype))
        target[1 : 2 * OUTPUTS + 1 : 2] = 7
        assert bool((target == 7).all())


@INTEGERS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    module = linear_of(4)
    fill(module)
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[1, 200] = bad
    y = use(module, "integer")(x)
    assert bool(y[0].isfinite().all())
    assert not bool(y[1].isfinite().any())


@INTEGERS
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e30])
def test_inputs_of_any_size(size: float) -> None:
    module = linear_of(8, dtype=torch.float32)
    weights = fill(module)[0]
    x = size * torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    y = use(module, "integer")(x)
    assert float((y.double() - x.double() @ weights.T).abs().max()) <= max(1e-4 * float((x.double() @ weights.T).norm()), 1e-29)


def test_codes_up_to_the_last_byte_of_a_mapped_file(tmp_path: Path) -> None:
    """No kernel may read beyond its codes: behind a mapping that fills its pages there is nothing."""
    import mmap

    module = PackedMatrices(PackedSpec((2, 3), (8, 4096), -1, True, torch.float32, stacked=True))
    weights = fill(module)
    size = module.codes.numel()
    assert size % mmap.PAGESIZE == 0
    (tmp_path / "codes").write_bytes(bytes(module.codes.tolist()))
    module.codes = torch.from_file(str(tmp_path / "codes"), size=size, dtype=torch.uint8)
    x = torch.randn(1, 4096)
    from moebit.runtime.kernels import float_product

    y = torch.empty(2, 8)
    float_product(module.stack(), x, [0, 1], [0, 1, 2], torch.tensor([0, 0]), y, slice(None))
    assert error(y, (weights @ x[0].double())) < 2e-6


# --- modules


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_linear_by_every_way(way: Way, dtype: torch.dtype, rows: int) -> None:
    if way == "integer" and not vectors.AVAILABLE:
        pytest.skip("this processor lacks the instructions")
    if way == "triton" and not INTERPRETED:
        pytest.skip("Triton does not interpret here")
    module = linear_of(3, dtype=dtype, bias=True)
    weights = fill(module)[0]
    assert module.bias is not None
    module.bias.data.copy_(torch.randn(OUTPUTS, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(1, rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = use(module, way)(x)
    assert (got.dtype, got.shape) == (dtype, (1, rows, OUTPUTS))
    wanted = x.double() @ weights.T + module.bias.double()
    # Once for the result's rounding, once for the weights' where they are rounded first.
    tolerance = 1e-4 if way == "integer" and dtype == torch.float32 else 2 * torch.finfo(dtype).eps + 1e-6
    assert error(got, wanted) < tolerance


def test_gradients_reach_the_input() -> None:
    module = linear_of(4, dtype=torch.float32)
    weights = fill(module)[0]
    x = torch.randn(2, 256, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weights.sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)


def test_no_rows_at_all() -> None:
    assert linear_of(4)(torch.empty(0, 256, dtype=torch.bfloat16)).shape == (0, OUTPUTS)


def test_replaced_buffers_and_copies_are_seen() -> None:
    """What is prepared for the kernels must follow the buffers, wherever they come from."""
    module = linear_of(4)
    fill(module)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = module(x)
    twin = copy.deepcopy(module)
    twin.scale *= 2
    assert error(twin(x), 2 * before.double()) < 0.01
    assert torch.equal(module(x), before)
    module.scale = 3 * module.scale
    assert error(module(x), 3 * before.double()) < 0.01


# --- whole models


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_ways_agree_on_a_model(name: str, dtype: torch.dtype, outputs: Outputs) -> None:
    """Mixed widths, biases, interleaved gates; experts with few and with many tokens.

    In bfloat16 a last digit may decide a close choice of experts, and that token is then another one: a few of a hundred may be.
    """
    output = outputs.rtn(ARCHITECTURES[name], symmetric=False, mixed=True)
    model = load(output, dtype=dtype)
    wanted = logits(use(model, "reference")).double()
    for way in PATHS:
        if way == "triton" or (way == "integer" and not vectors.AVAILABLE):  # the former: tests/runtime/test_triton.py
            continue
        away = (logits(use(model, way)).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        limit, share = (0.03, 0.95) if dtype == torch.bfloat16 else (5e-4, 1.0)
        assert (away < limit).double().mean() >= share, way


def test_saved_again_byte_for_byte_after_every_way(outputs: Outputs, tmp_path: Path) -> None:
    from tests.support.outputs import stored_tensors

    output = outputs.rtn(ARCHITECTURES["olmoe"], symmetric=False, mixed=True)
    model = load(output, dtype=torch.bfloat16)
    for way in PATHS:
        if way != "triton" and (way != "integer" or vectors.AVAILABLE):
            logits(use(model, way))
    with quiet():
        model.save_pretrained(tmp_path)
    stored, again = stored_tensors(output), stored_tensors(tmp_path)
    packed = [name for name in stored if name.endswith((".codes", ".zero_point", ".bits", ".scale"))]
    assert packed
    for tensor in packed:
        assert torch.equal(again[tensor].view(torch.uint8), stored[tensor].view(torch.uint8)), tensor


# --- choosing


def test_use_refuses_what_is_not_there() -> None:
    with pytest.raises(BadInputError, match=r"'fast'.*auto, reference"):
        use(linear_of(4), "fast")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="Linear has no packed modules"):
        use(nn.Linear(2, 2), "auto")
    odd = PackedLinear(PackedSpec((4,), (8, 60), 20, True, torch.float32, stacked=False), False, torch.float32)
    reason = "groups of 20" if vectors.AVAILABLE else "this processor lacks"
    with pytest.raises(BadInputError, match=f"'integer': {reason}"):
        use(odd, "integer")


@pytest.mark.slow
def test_without_the_instructions(outputs: Outputs) -> None:
    """Compiled for any processor of the kind: `integer` is refused, everything else agrees with the reference."""
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
import moebit.runtime as runtime
from moebit.runtime import vectors
from moebit.errors import BadInputError
assert not vectors.AVAILABLE
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.arange(24)[None]
with torch.no_grad():
    wanted = runtime.use(model, "reference")(input_ids=ids).logits
    for way in ("auto", "float", "dequantize"):
        torch.testing.assert_close(runtime.use(model, way)(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
try:
    runtime.use(model, "integer")
except BadInputError as error:
    print("refused:", error)
"""
    output = outputs.rtn(ARCHITECTURES["olmoe"], symmetric=False, mixed=True)
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    run = subprocess.run([sys.executable, "-c", program, str(output)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "lacks avx512f" in run.stdout


# --- memory


@pytest.mark.slow
def test_loading_and_running_takes_the_files_size(tmp_path: Path, outputs: Outputs) -> None:
    """200 MB in bf16, 55 packed: what a first forward adds to the process is near the latter. A tiny one goes first, for all that is
    loaded and compiled once."""
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "output"
    config = AutoConfig.for_model(
        "olmoe", vocab_size=256, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_experts=32, num_experts_per_tok=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(checkpoint)
    moebit.quantize(checkpoint, output, recipe="rtn-w4", overrides={"solver.clip_search": False})
    program = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
import moebit
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
def run(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for tokens in (48, 1):
            model(input_ids=torch.arange(tokens)[None])
    return model
run(sys.argv[1])
before = memory("VmRSS:")
model = run(sys.argv[2])
print(memory("VmHWM:") - before)
"""
    tiny = outputs.rtn(ARCHITECTURES["olmoe"], symmetric=False, mixed=True)
    run = subprocess.run([sys.executable, "-c", program, str(tiny), str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    dense = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert int(run.stdout) < 1.3 * size + 40e6 < 0.6 * dense


def test_dequantized_experts_are_multiplied_in_a_type_that_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(paths.vectors, "HALF_PRECISION", False)
    assert paths.multiplied_in(torch.bfloat16, cpu) == torch.float32
    assert paths.multiplied_in(torch.float16, cpu) == torch.float32
    assert paths.multiplied_in(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(paths.vectors, "HALF_PRECISION", True)
    assert paths.multiplied_in(torch.bfloat16, cpu) == torch.bfloat16
    assert paths.multiplied_in(torch.float64, cpu) == torch.float64
