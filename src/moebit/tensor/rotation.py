"""Orthogonal matrices that are cheap to multiply with: randomised Hadamard matrices of any size, as Kronecker products.

Shape suffixes: N the size, A and B the sizes of two factors, N = A B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_FACTOR = 128  # a factor is a dense matrix: larger ones cost more than the product saves


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix R = diag(signs) (F_1 x F_2 x ...), never formed.

    Attributes:
        signs: [N] of +1 and -1, float64.
        factors: small orthogonal matrices, float64; the product of their sizes is N.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """`x R` along the last axis, in x's floating-point type."""
        shape, y = x.shape, (x * self.signs.to(x)).reshape(-1, self.size)
        behind = self.size
        for factor in self.factors:
            f, behind = factor.to(x), behind // len(factor)
            y = y.reshape(-1, len(f)) @ f if behind == 1 else torch.matmul(f.T, y.reshape(-1, len(f), behind))
        return y.reshape(shape)

    def matrix(self) -> Tensor:
        """R itself, [N, N] float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def randomised_hadamard(size: int, generator: torch.Generator) -> Rotation:
    """A random rotation that spreads every channel over all the others.

    `size` = k 2^r: a Hadamard matrix of order k (Paley's constructions) times Sylvester's of order 2^r, with random signs. Where no
    Hadamard matrix of a fitting order is known to these constructions, k is odd and its factor a random orthogonal matrix.
    """
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return Rotation(signs, _factors(size, generator))


def _factors(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    odd, twos = size, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    first, used = torch.ones(1, 1, dtype=torch.float64), 0
    if odd > 1:
        found = next(((k, h) for k in range(2, twos + 1) if (h := paley(odd << k)) is not None), None)
        if found is not None:
            used, first = found[0], found[1] / (odd << found[0]) ** 0.5
        else:
            first = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))[0].contiguous()
    rest, parts = twos - used, [first]
    grow = 0  # the first factor takes powers of two until it is about as large as the second
    while grow < rest and len(first) << (grow + 1) <= min(LARGEST_FACTOR, 1 << (rest - grow)):
        grow += 1
    parts = [torch.kron(first, sylvester(grow))] if len(first) << grow > 1 else []
    rest -= grow
    while rest:
        take = min(rest, LARGEST_FACTOR.bit_length() - 1)
        parts.append(sylvester(take))
        rest -= take
    return tuple(parts) or (torch.ones(1, 1, dtype=torch.float64),)


def sylvester(power: int) -> Tensor:
    """The Hadamard matrix of order 2^power, scaled to be orthogonal."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    return h


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix (entries +1 and -1) of this order by Paley's constructions over a prime field; None where neither applies."""
    if _prime(order - 1) and (order - 1) % 4 == 3:
        c = _bordered(order - 1, -1.0)
        return c + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if order % 4 == 0 and _prime(half - 1) and (half - 1) % 4 == 1:
        c, i = _bordered(half - 1, 1.0), torch.eye(half, dtype=torch.float64)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(c, two) + torch.kron(i, turned)
    return None


def _bordered(q: int, below: float) -> Tensor:
    """[q + 1, q + 1]: the quadratic characters of i - j modulo q, with a row of ones above and a column of `below` beside."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    c = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    c[0, 1:], c[1:, 0] = 1.0, below
    c[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return c


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
