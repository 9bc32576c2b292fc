"""Block transforms against the dense matrices that they stand for, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebit.tensor.blocks import BlockTransform, block_size, hadamard, rotate_blocks


def random_blocks(m: int, k: int, size: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, size, size, generator=g, dtype=torch.float64))[0]


def random_transform(m: int, channels: int, size: int, seed: int = 0) -> BlockTransform:
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (m, channels), generator=g, dtype=torch.int8) * 2 - 1
    permutation = torch.stack([torch.randperm(channels, generator=g) for _ in range(m)])
    blocks = channels // size
    return BlockTransform(signs, random_blocks(m, blocks, size, seed), permutation, random_blocks(m, blocks, size, seed + 1))


def dense(t: BlockTransform, e: int, channels: int) -> Tensor:
    """D R1 P R2 of one matrix, [N, N]."""
    result = torch.eye(channels, dtype=torch.float64)
    if t.signs is not None:
        result = result @ torch.diag(t.signs[e].double())
    if t.first is not None:
        count = channels // t.first.shape[-1]
        result = result @ torch.block_diag(*[t.first[e, min(k, t.first.shape[1] - 1)].double() for k in range(count)])
    if t.permutation is not None:
        p = torch.zeros(channels, channels, dtype=torch.float64)
        for to, origin in enumerate(t.permutation[e].tolist()):
            p[origin, to] = 1
        result = result @ p
    if t.second is not None:
        result = result @ torch.block_diag(*t.second[e].double())
    return result


@pytest.mark.parametrize(("channels", "wanted"), [(256, 128), (128, 128), (96, 32), (48, 16), (40, 8), (2, 2), (7, 1), (1408, 128)])
def test_block_size(channels: int, wanted: int) -> None:
    assert block_size(channels) == wanted


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard(size: int) -> None:
    """The entry at (i, j) has the sign of the parity of the ones that i and j have in common."""
    wanted = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5
    torch.testing.assert_close(hadamard(size), wanted)
    for wrong in (0, 3, 12):
        with pytest.raises(ValueError, match="powers of two"):
            hadamard(wrong)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("parts", ["signs first permutation second", "signs first", "permutation", "second", "first permutation second"])
def test_apply_and_undo(parts: str, m: int) -> None:
    whole, g = random_transform(m, 24, 8), torch.Generator().manual_seed(5)
    t = BlockTransform(**{name: getattr(whole, name) for name in parts.split()})
    x = torch.randn(m, 5, 24, generator=g, dtype=torch.float64)
    wanted = torch.stack([x[e] @ dense(t, e, 24) for e in range(m)])
    torch.testing.assert_close(t.apply(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(t.undo(t.apply(x)), x, rtol=1e-12, atol=1e-12)
    back = torch.stack([x[e] @ dense(t, e, 24).T for e in range(m)])
    torch.testing.assert_close(t.undo(x), back, rtol=1e-12, atol=1e-12)
    assert t.count == m


def test_one_transform_for_rows_of_any_shape() -> None:
    t, x = random_transform(1, 24, 8), torch.randn(2, 3, 4, 24, dtype=torch.float64)
    torch.testing.assert_close(t.apply(x), x @ dense(t, 0, 24), rtol=1e-12, atol=1e-12)
    strided = torch.randn(24, 6, dtype=torch.float64).T
    torch.testing.assert_close(t.apply(strided), strided @ dense(t, 0, 24), rtol=1e-12, atol=1e-12)


def test_one_block_for_all() -> None:
    block = random_blocks(1, 1, 8, 0)
    t, x = BlockTransform(first=block), torch.randn(5, 24, dtype=torch.float64)
    wanted = torch.cat([piece @ block[0, 0] for piece in x.split(8, 1)], 1)
    torch.testing.assert_close(t.apply(x), wanted)
    torch.testing.assert_close(rotate_blocks(x, block[0, 0]), wanted)


def test_moments() -> None:
    t, x = random_transform(2, 16, 4), torch.randn(2, 50, 16, dtype=torch.float64)
    h = x.mT @ x
    wanted = torch.stack([dense(t, e, 16).T @ h[e] @ dense(t, e, 16) for e in range(2)])
    torch.testing.assert_close(t.moments(h), wanted, rtol=1e-10, atol=1e-10)
    shared = t.of(0, 1)
    torch.testing.assert_close(shared.moments(h)[1], dense(t, 0, 16).T @ h[1] @ dense(t, 0, 16), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared.moments(h[0]), wanted[0], rtol=1e-10, atol=1e-10)


def test_ragged_rows() -> None:
    """Rows sorted by expert, from the second expert on; the third has none."""
    t, x, bounds = random_transform(5, 16, 4), torch.randn(7, 16, dtype=torch.float64), [0, 3, 3, 7]
    got = t.apply_ragged(x, bounds, start=1)
    wanted = torch.cat([x[:3] @ dense(t, 1, 16), x[3:] @ dense(t, 3, 16)])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(t.of(2, 3).apply_ragged(x, bounds, 1), x @ dense(t, 2, 16), rtol=1e-12, atol=1e-12)


def test_as_many_transforms_as_matrices() -> None:
    with pytest.raises(ValueError, match="for 3 transforms"):
        random_transform(3, 16, 4).apply(torch.zeros(2, 5, 16))
