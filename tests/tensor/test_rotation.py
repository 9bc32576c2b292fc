"""Rotations that are never formed, against the matrix that they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moebit.tensor.rotation import paley, randomised_hadamard, sylvester

HADAMARD = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 48, 60, 64, 96, 112, 160, 512)
OTHERS = (3, 5, 6, 7, 10, 14, 15, 30, 45)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("size", HADAMARD + OTHERS)
def test_rows_are_orthonormal(size: int) -> None:
    matrix = randomised_hadamard(size, generator()).matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", HADAMARD)
def test_every_channel_is_spread_evenly_where_a_hadamard_matrix_is_known(size: int) -> None:
    matrix = randomised_hadamard(size, generator()).matrix()
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(size)), atol=1e-12)


@pytest.mark.parametrize("size", [12, 30, 64, 112, 720])
def test_applied_is_multiplied(size: int) -> None:
    """R is the product of its parts, written out with numpy's own idea of a Kronecker product."""
    rotation = randomised_hadamard(size, generator())
    whole = np.ones((1, 1))
    for factor in rotation.factors:
        whole = np.kron(whole, factor.numpy())
    x = torch.randn(3, 2, size, dtype=torch.float64, generator=generator())
    assert torch.allclose(rotation.apply(x), x @ (torch.diag(rotation.signs) @ torch.from_numpy(whole)), atol=1e-12)
    assert torch.allclose(rotation.apply(x.float()), rotation.apply(x).float(), atol=1e-5)


def test_seeds_decide() -> None:
    first, again = (randomised_hadamard(64, generator()).matrix() for _ in range(2))
    other = randomised_hadamard(64, torch.Generator().manual_seed(6)).matrix()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 180])
def test_paley_is_hadamard(order: int) -> None:
    h = paley(order)
    assert h is not None
    assert set(h.flatten().tolist()) == {1.0, -1.0}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_without_a_known_matrix() -> None:
    assert paley(6) is None
    assert paley(52) is None  # neither 51 nor 25 is a prime
    assert sylvester(0).tolist() == [[1.0]]
