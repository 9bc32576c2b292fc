"""Weights, Hessians and schemes that the tensor tests share (E experts, O outputs, I inputs, T tokens)."""

import operator
from typing import cast

import numpy as np
import torch
from torch import Tensor

from moebit.tensor import QTensor, UniformGrid
from tests.support import reference
from tests.support.reference import Grid, ScaleDtype

BITS = [2, 3, 4, 5, 6, 8]
GROUP_SIZES = [-1, 32, 64, 128]
KINDS = ["asymmetric", "symmetric", "signed"]
SCALE_DTYPES: dict[ScaleDtype, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def scheme_of(kind: str, group_size: int, scale_dtype: str = "float64") -> UniformGrid:
    return UniformGrid(group_size, kind != "asymmetric", signed=kind == "signed", scale_dtype=SCALE_DTYPES[cast(ScaleDtype, scale_dtype)])


def grid_of(scheme: UniformGrid, bits: int) -> Grid:
    """The oracle's grid for one expert of a scheme."""
    name = next(name for name, dtype in SCALE_DTYPES.items() if dtype == scheme.scale_dtype)
    return Grid(int(bits), scheme.group_size, scheme.symmetric, scheme.signed, name)


def weights(seed: int, experts: int, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights of a model's size, every expert with its own spread."""
    rng = np.random.default_rng(seed)
    w_EOI = 0.02 * rng.standard_t(5, size=(experts, rows, columns)) * np.exp(rng.normal(size=(experts, 1, 1)))
    return torch.from_numpy(w_EOI).to(dtype)


def hessians(seed: int, experts: int, columns: int, tokens: int = 600, dtype: torch.dtype = torch.float64) -> Tensor:
    """Second moments of correlated inputs with channels of very different size, as in a language model."""
    rng = np.random.default_rng(1000 + seed)
    h_EII = np.empty((experts, columns, columns))
    for expert in range(experts):
        rank = max(columns // 4, 1)
        x_TI = rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, columns)) + rng.normal(size=(tokens, columns))
        x_TI *= np.exp(0.5 * rng.normal(size=columns))
        h_EII[expert] = x_TI.T @ x_TI / tokens
    return torch.from_numpy(h_EII).to(dtype)


def assert_same(ours: QTensor, expert: int, oracle: reference.Quantized) -> None:
    """One expert of a stack against the oracle: every code, zero point and (up to the last bits of float64) scale."""
    where = f"expert {expert} at {int(ours.bits[expert])} bits"
    scale_tolerance = 1e-8 if ours.grid.value_dtype == torch.float64 else 0.0
    np.testing.assert_allclose(ours.params.scale[expert].double().numpy(), oracle.scale_OG, rtol=scale_tolerance, atol=0, err_msg=where)
    np.testing.assert_array_equal(ours.params.zero_point[expert].numpy(), oracle.zero_point_OG, err_msg=where)
    np.testing.assert_array_equal(ours.codes[expert].numpy(), oracle.codes_OI, err_msg=where)


def assert_identical(one: QTensor, other: QTensor) -> None:
    """Bit for bit."""
    for field in ("codes", "params.scale", "params.zero_point", "bits"):
        left, right = operator.attrgetter(field)(one), operator.attrgetter(field)(other)
        assert left.dtype == right.dtype, field
        assert torch.equal(left, right), field
