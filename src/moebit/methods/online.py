"""Online transforms: the inputs of quantized matrices are rotated at run time, the matrices beforehand, so that few bits serve the inputs.

Sources: DuQuant (2406.01721; block rotations found greedily around a zigzag permutation), QuaRot (2404.00456; randomised Hadamard).

    hadamard  T = D H: random signs, then the Hadamard matrix in every block. Needs no data.
    duquant   T = R1 P R2: a rotation in every block, a permutation that deals the channels out to the blocks by magnitude, a second
              rotation.

A block rotation is found in steps. The channel that holds the largest magnitude is swapped to the front and the block is multiplied by an
orthogonal matrix whose first row is uniform, which spreads that channel over all of them. Of all prefixes of the steps, the one with
the smallest peak (largest minus smallest value) is kept; no step at all is one of them.

Departures from DuQuant: tokens themselves are looked at, not their mean over samples; the random rotation of the other channels stands in
front of the matrix with the uniform first row (behind it, the row would not stay uniform), and is drawn once per block; the swap is not
taken back, which only names channels differently; smoothing is not part of it. One transform serves all experts of a layer, where the
papers have one per expert at as many times the cost; for down projections both are there. Blocks have 128 channels, or the largest
power of two that divides where 128 does not.

Shape suffixes: M transforms, S tokens, N channels, K blocks of B channels.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moebit.device import here
from moebit.tensor.blocks import BlockTransform, block_size, hadamard

STEPS = 256
MAX_DEVIATION = 1e-4  # of T^T T from the identity, in a probe


def site_generator(seed: int, site: str) -> torch.Generator:
    """Random numbers of one site's own: the same whatever else is done, and in a resumed run."""
    digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def hadamard_transform(channels: int, generator: torch.Generator, count: int = 1) -> BlockTransform:
    """Random signs and a Hadamard matrix per block."""
    signs = here(torch.randint(0, 2, (count, channels), generator=generator, dtype=torch.int8, device="cpu")) * 2 - 1
    return BlockTransform(signs=signs, first=hadamard(block_size(channels)).expand(count, 1, -1, -1))


def duquant_transform(x_MSN: Tensor, generator: torch.Generator, steps: int = STEPS) -> BlockTransform:
    """Two greedy block rotations around a zigzag permutation, for M sets of tokens at once.

    Args:
        x_MSN: a sample of the inputs; rows of zeros count for nothing.
        steps: of each greedy search.
    """
    size = block_size(x_MSN.shape[-1])
    x = x_MSN.float()
    first = greedy_rotation(x, size, generator, steps)
    x = BlockTransform(first=first).apply(x)
    permutation = zigzag(x.abs().amax(1), size)
    x = BlockTransform(permutation=permutation).apply(x)
    return BlockTransform(first=first, permutation=permutation, second=greedy_rotation(x, size, generator, steps))


def search_flops(channels: int, samples: int, count: int = 1) -> float:
    """Floating-point operations of `duquant_transform`, about: tokens and rotations times a block, in every step of two searches."""
    size = block_size(channels)
    return 2.0 * STEPS * count * channels * size * (2 * samples + 4 * size)


def zigzag(magnitude_MN: Tensor, size: int) -> Tensor:
    """int64 [M, N]: channels by descending magnitude, dealt to the blocks first to last, last to first, and so on."""
    m, channels = magnitude_MN.shape
    order = magnitude_MN.argsort(dim=-1, descending=True, stable=True).view(m, size, channels // size)
    order[:, 1::2] = order[:, 1::2].flip(-1)
    return order.transpose(1, 2).reshape(m, channels)


def greedy_rotation(x_MSN: Tensor, size: int, generator: torch.Generator, steps: int = STEPS) -> Tensor:
    """[M, K, B, B] float32 rotations of the blocks of `size` channels."""
    m, samples, channels = x_MSN.shape
    blocks = m * (channels // size)
    x = x_MSN.reshape(m, samples, -1, size).transpose(1, 2).reshape(blocks, samples, size)
    spread = _uniform_first_row(blocks, size, generator)
    rotation = torch.eye(size, dtype=torch.float64).repeat(blocks, 1, 1)
    best, least = rotation.clone(), _peak(x)
    for _ in range(steps if size > 1 else 0):
        swap = _to_front(x.abs().amax(1))
        x = x.gather(2, swap.unsqueeze(1).expand_as(x)).bmm(spread.float())
        rotation = rotation.gather(2, swap.unsqueeze(1).expand_as(rotation)).bmm(spread)
        peak = _peak(x)
        better = peak < least
        least = torch.where(better, peak, least)
        best[better] = rotation[better]
    return best.float().view(m, -1, size, size)


def _peak(x_KSB: Tensor) -> Tensor:
    return x_KSB.amax((1, 2)) - x_KSB.amin((1, 2))


def _to_front(magnitude_KB: Tensor) -> Tensor:
    """int64 [K, B]: the order of channels in which the largest has changed places with the first."""
    blocks, size = magnitude_KB.shape
    largest = magnitude_KB.argmax(1)
    order = torch.arange(size).repeat(blocks, 1)
    order[:, 0] = largest
    order[torch.arange(blocks), largest] = 0
    return order


def _uniform_first_row(blocks: int, size: int, generator: torch.Generator) -> Tensor:
    """[K, B, B] float64 orthogonal matrices with the first row 1 / sqrt(B): a reflection behind a random rotation of the other rows."""
    axis = torch.zeros(size, dtype=torch.float64)
    axis[0] = 1
    across = axis - torch.full((size,), size**-0.5, dtype=torch.float64)
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(across, across) / across.square().sum().clamp(min=1e-300)
    others = torch.eye(size, dtype=torch.float64).repeat(blocks, 1, 1)
    if size > 1:
        q, r = torch.linalg.qr(here(torch.randn(blocks, size - 1, size - 1, generator=generator, dtype=torch.float64, device="cpu")))
        others[:, 1:, 1:] = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return others @ reflection


def check_orthogonal(transform: BlockTransform, channels: int, site: str) -> None:
    """Hold a transform to what it is used for: products of inputs and weights are the same behind it.

    Raises:
        ArithmeticError: they are not; the model would become another one.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = here(torch.randn(2, transform.count, 4, channels, generator=generator, dtype=torch.float64, device="cpu"))
    wanted, got = x @ w.mT, transform.apply(x) @ transform.apply(w).mT
    scale = x.norm(dim=2, keepdim=True) * w.norm(dim=2).unsqueeze(1)
    deviation = float(((got - wanted).abs() / scale).max())
    if not deviation <= MAX_DEVIATION:
        raise ArithmeticError(f"{site}: its transform is not orthogonal (products of inputs and weights change by {deviation:.1e})")
