"""Online transforms: orthogonal, seeded, and as greedy as their description."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moebit.methods.online import (
    _uniform_first_row,
    check_orthogonal,
    duquant_transform,
    greedy_rotation,
    hadamard_transform,
    site_generator,
    zigzag,
)
from moebit.tensor.blocks import BlockTransform


def outliers(m: int = 1, samples: int = 40, channels: int = 32, seed: int = 0) -> Tensor:
    """Tokens with a few channels of 10 to 60 times the size of the others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, samples, channels, generator=g)
    for e in range(m):
        x[e, :, torch.randperm(channels, generator=g)[:3]] *= torch.tensor([60.0, 25.0, 10.0])
    return x


def matrix(t: BlockTransform, channels: int, e: int = 0) -> Tensor:
    return t.of(e, e + 1).apply(torch.eye(channels, dtype=torch.float64))


def naive_greedy(x_SB: np.ndarray, spread_BB: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
    """(rotation, peak) of one block: the largest channel to the front, multiply, keep the best prefix."""
    x, rotation = x_SB.astype(np.float64), np.eye(x_SB.shape[1])
    best, least = rotation, x.max() - x.min()
    for _ in range(steps):
        channel = int(np.abs(x).max(0).argmax())
        swap = np.eye(x.shape[1])
        swap[[0, channel]] = swap[[channel, 0]]
        x, rotation = x @ swap @ spread_BB, rotation @ swap @ spread_BB
        if x.max() - x.min() < least:
            best, least = rotation, x.max() - x.min()
    return best, least


def test_greedy_against_one_block_at_a_time() -> None:
    x, size, steps = outliers(2), 8, 6
    generator = torch.Generator().manual_seed(3)
    got = greedy_rotation(x, size, generator, steps).double()
    spread = _uniform_first_row(8, size, torch.Generator().manual_seed(3)).view(2, 4, size, size)
    for e in range(2):
        for k in range(4):
            block = x[e, :, k * size : (k + 1) * size].numpy()
            rotation, peak = naive_greedy(block, spread[e, k].numpy(), steps)
            np.testing.assert_allclose(got[e, k].numpy(), rotation, atol=1e-5)
            assert peak <= block.max() - block.min()


def test_the_matrix_of_a_step() -> None:
    spread = _uniform_first_row(3, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread @ spread.mT, torch.eye(8, dtype=torch.float64).expand(3, 8, 8), rtol=0, atol=1e-12)
    torch.testing.assert_close(spread[:, 0], torch.full((3, 8), 8**-0.5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.allclose(spread[0], spread[1])  # drawn per block
    torch.testing.assert_close(_uniform_first_row(1, 1, torch.Generator())[0], torch.ones(1, 1, dtype=torch.float64))


def test_zigzag_deals_channels_out() -> None:
    magnitude = torch.tensor([[1.0, 8, 3, 6, 5, 4, 7, 2], [8.0, 7, 6, 5, 4, 3, 2, 1]])
    # by size: 1 6 3 4 | 5 2 7 0; two blocks: first, second, second, first, ...
    assert zigzag(magnitude, 4)[0].tolist() == [1, 4, 5, 0, 6, 3, 2, 7]
    four = zigzag(magnitude, 2)[1].tolist()
    assert [sorted(four[i : i + 2]) for i in range(0, 8, 2)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


@pytest.mark.parametrize("channels", [32, 96, 160, 7])
@pytest.mark.parametrize("m", [1, 3])
def test_the_function_stays(channels: int, m: int) -> None:
    """(x T)(W T)^T = x W^T, in float64 up to what the stored float32 blocks lose."""
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(m, 5, channels, generator=g, dtype=torch.float64) for _ in range(2))
    for t in (duquant_transform(outliers(m, channels=channels), g, steps=12), hadamard_transform(channels, g, m)):
        wanted = x @ w.mT
        torch.testing.assert_close(t.apply(x) @ t.apply(w).mT, wanted, rtol=0, atol=2e-5)
        check_orthogonal(t, channels, "here")
        for e in range(m):
            dense = matrix(t, channels, e)
            torch.testing.assert_close(dense @ dense.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-5)


def test_exact_in_float64() -> None:
    """What float32 storage loses is all that there is to lose."""
    t, g = hadamard_transform(64, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    x, w = (torch.randn(5, 64, generator=g, dtype=torch.float64) for _ in range(2))
    exact = BlockTransform(
        t.signs, torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)]).double()[None, None] / 8
    )
    torch.testing.assert_close(exact.apply(x) @ exact.apply(w).T, x @ w.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(t.apply(x), exact.apply(x), rtol=1e-6, atol=1e-6)


def test_a_transform_that_is_none_is_refused() -> None:
    with pytest.raises(ArithmeticError, match=r"layers\.0.*not orthogonal"):
        check_orthogonal(BlockTransform(first=1.01 * torch.eye(8)[None, None]), 16, "layers.0")
    with pytest.raises(ArithmeticError):
        check_orthogonal(BlockTransform(first=torch.full((1, 1, 8, 8), float("nan"))), 16, "layers.0")


def test_peaks_become_smaller() -> None:
    x = outliers(2, channels=64)
    t = duquant_transform(x, torch.Generator().manual_seed(0))
    before, after = (v.amax((1, 2)) - v.amin((1, 2)) for v in (x, t.apply(x)))
    assert bool((after < before / 3).all())


def test_nothing_to_look_at() -> None:
    """Tokens of zeros: no step helps, and what comes out is a transform all the same."""
    t = duquant_transform(torch.zeros(2, 4, 16), torch.Generator().manual_seed(0), steps=3)
    check_orthogonal(t, 16, "zeros")


def test_seeds() -> None:
    def draw(seed: int, site: str) -> Tensor:
        return hadamard_transform(256, site_generator(seed, site)).signs  # type: ignore[return-value]

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    x = outliers()
    one, two = (duquant_transform(x, site_generator(0, "a"), steps=5) for _ in range(2))
    assert all(torch.equal(getattr(one, k), getattr(two, k)) for k in ("first", "permutation", "second"))
