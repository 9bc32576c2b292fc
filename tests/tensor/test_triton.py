"""The solver's inner loop in Triton against a naive float64 loop, its plain torch form and the textbook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.tensor import UniformParams, backend_of, kernels, minmax_grid, solve_gptq
from moebit.tensor.solver import gptq_block
from tests.support import reference
from tests.support.devices import interpreter, on_devices
from tests.tensor.problems import assert_same, grid_of, hessians, scheme_of, weights

BITS = [2, 5, 8]
ROWS, COLUMNS, GROUP, START, WIDTH = 19, 24, 8, 7, 11  # more rows than a program has, and columns that begin and end inside groups


def block_arguments(kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """w, carried, f, d, scale, zero, group, qmax: groups in no order (as act_order has them), and F with garbage above its diagonal."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    experts = len(BITS)
    w = weights(4, experts, ROWS, COLUMNS, dtype)
    scale, zero = minmax_grid(w, torch.tensor(BITS), scheme_of(kind, GROUP, "float32"))
    group = torch.stack([torch.randperm(COLUMNS, generator=generator) // GROUP for _ in BITS])
    return (
        w, 0.01 * random(experts, ROWS, WIDTH), 0.3 * random(experts, WIDTH, WIDTH), random(experts, COLUMNS).abs(),
        scale, zero, group, torch.exp2(torch.tensor(BITS, dtype=dtype)) - 1,
    )  # fmt: skip


def run(step: Callable[..., None], arguments: tuple[Tensor, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, error, loss): the columns of the block, after a check that no other was touched."""
    w = arguments[0]
    codes = torch.full(w.shape, 99, dtype=torch.uint8, device=device)
    error, loss = torch.full_like(w, 99, device=device), torch.ones(w.shape[:2], dtype=w.dtype, device=device)
    step(*(a.to(device) for a in arguments), START, codes, error, loss)
    for written in (codes.cpu(), error.cpu()):
        assert bool((written[:, :, :START] == 99).all())
        assert bool((written[:, :, START + WIDTH :] == 99).all())
    block = slice(START, START + WIDTH)
    return codes[:, :, block].cpu(), error[:, :, block].cpu(), loss.cpu()


def naive(arguments: tuple[Tensor, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, one number after the other in Python's floats."""
    w, carried, f, d, scale, zero, group, qmax = (a.double().numpy() for a in arguments)
    codes, error, loss = (np.zeros((len(BITS), ROWS, n)) for n in (WIDTH, WIDTH, 1))
    for e in range(len(BITS)):
        for r in range(ROWS):
            target = [w[e, r, START + k] + carried[e, r, k] for k in range(WIDTH)]
            loss[e, r] = 1
            for k in reversed(range(WIDTH)):
                g = int(group[e, START + k])
                code = min(max(round(target[k] / scale[e, r, g]) + zero[e, r, g], 0), qmax[e])  # Python rounds ties to even
                value = scale[e, r, g] * (code - zero[e, r, g])
                codes[e, r, k], error[e, r, k] = code, w[e, r, START + k] - value
                loss[e, r] += d[e, START + k] * (target[k] - value) ** 2
                for j in range(k):
                    target[j] += error[e, r, k] * f[e, k, j]
    return codes, error, loss[:, :, 0]


@on_devices
@pytest.mark.parametrize(
    ("kind", "dtype"), [("asymmetric", torch.float32), ("signed", torch.float32), ("symmetric", torch.float64)], ids=str
)
def test_one_block(kind: str, dtype: torch.dtype, device: str) -> None:
    """Bit for bit what the plain form makes; the codes of numba's and of the naive loop."""
    from moebit.tensor import triton_kernels

    arguments = block_arguments(kind, dtype)
    codes, error, loss = run(triton_kernels.gptq_block, arguments, device)
    plain, compiled, wanted = run(gptq_block, arguments, device), run(kernels.gptq_block, arguments, "cpu"), naive(arguments)
    for mine, other in zip((codes, error, loss), plain, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(codes, compiled[0])
    np.testing.assert_array_equal(codes.numpy(), wanted[0])
    assert len(codes.unique()) > 50
    accuracy = 100 * torch.finfo(dtype).eps
    for mine, numbas, naives in zip((error, loss), compiled[1:], wanted[1:], strict=True):
        torch.testing.assert_close(mine, numbas, rtol=accuracy, atol=accuracy)
        torch.testing.assert_close(mine.double(), torch.from_numpy(naives), rtol=accuracy, atol=accuracy)


@on_devices
def test_ties_and_what_lies_far_outside(device: str) -> None:
    """Ties to the even code, and weights of any size at the ends of the grid."""
    from moebit.tensor import triton_kernels

    steps = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e12, -1e12, 1e-30, 6.49999952, -7.5])
    for dtype in (torch.float32, torch.float64):
        w = torch.nn.functional.pad(0.5 * steps.to(dtype), (START, COLUMNS - START - WIDTH)).view(1, 1, -1)
        one, nothing = torch.ones(1, COLUMNS, dtype=dtype), torch.zeros(1, WIDTH, WIDTH, dtype=dtype)
        arguments = (
            w, nothing[:, :1], nothing, one, 0.5 * one[:, None, :1], 8 * one[:, None, :1], torch.zeros(1, COLUMNS).long(), 15 * one[:, 0],
        )  # fmt: skip
        codes, _, _ = run(triton_kernels.gptq_block, arguments, device)
        assert (codes.long() - 8).flatten().tolist() == [-2, -2, 0, 0, 2, 2, 7, -8, 0, 6, -8]


@on_devices
@pytest.mark.parametrize(
    ("kind", "scales", "act_order"), [("asymmetric", "static", True), ("symmetric", "dynamic", False)], ids=["static-act_order", "dynamic"]
)
def test_codes_equal_the_textbook(kind: str, scales: Literal["static", "dynamic"], act_order: bool, device: str) -> None:
    """From end to end, in blocks; one expert without tokens."""
    w_EOI, h_EII = weights(20, len(BITS), 5, 32), hessians(20, len(BITS), 32)
    h_EII[1] = 0
    scheme = scheme_of(kind, 16)
    ours, info = solve_gptq(
        w_EOI.to(device), h_EII.to(device), torch.tensor(BITS), scheme, scales=scales, act_order=act_order, block=12, backend="triton"
    )  # fmt: skip
    ours = replace(ours, codes=ours.codes.cpu(), params=UniformParams(ours.params.scale.cpu(), ours.params.zero_point.cpu()))
    for expert, bits in enumerate(BITS):
        arrays = (w_EOI[expert].numpy(), h_EII[expert].numpy(), grid_of(scheme, bits))
        wanted = reference.gptq(*arrays, scales=scales, act_order=act_order)
        assert_same(ours, expert, wanted)
        assert float(info.loss[expert]) == pytest.approx(wanted.loss, rel=1e-7)


@interpreter
def test_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebit.tensor import solver

    assert (backend_of(torch.device("cpu")), backend_of(torch.device("cuda"))) == ("numba", "triton")
    monkeypatch.setattr(solver.importlib.util, "find_spec", lambda name: None)
    assert (backend_of(torch.device("cpu")), backend_of(torch.device("cuda"))) == ("numba", "torch")
