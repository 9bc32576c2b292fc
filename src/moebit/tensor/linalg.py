"""Second moments of inputs ("Hessians") and their factorisation, batched over experts.

Every rule here is scale-free: only the direction of a Hessian matters to the solvers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SYRK_BLOCKS, SYRK_MIN, SYRK_MAX = 4, 128, 512  # how finely half of a symmetric product is cut out; smaller blocks are slow
CHOLESKY_BLOCK = 256


def second_moment(x_TN: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """`sum_t weight_t x_t x_t^T`, [N, N] float32 (float64 for float64 inputs).

    Raises:
        ValueError: `x_TN` is not a matrix (a collapsed token axis must never pass for features).
    """
    size = x_TN.shape[-1]
    h = torch.zeros(size, size, dtype=_work_type(x_TN), device=x_TN.device)
    add_second_moment(h, x_TN, weight_T)
    return mirror_(h)


def add_second_moment(h_NN: Tensor, x_TN: Tensor, weight_T: Tensor | None = None, strips: Sequence[tuple[int, int]] | None = None) -> None:
    """Add `sum_t weight_t x_t x_t^T` to the upper blocks of `h_NN`; `mirror_` completes the matrix when all pieces are in.

    Always accumulated in float32: the rounding of accumulated bf16 products makes Hessians indefinite. Only blocks on and above the
    diagonal are computed, as plain products, which at these sizes are faster than BLAS's own symmetric update.

    Args:
        strips: of those that `moment_strips` names, the ones that are added to; all where nothing is said. Each is computed by itself.

    Raises:
        ValueError: `x_TN` is not a matrix.
    """
    if x_TN.ndim != 2:
        raise ValueError(f"inputs must be [tokens, features], got shape {tuple(x_TN.shape)}")
    if not len(x_TN):
        return
    x = x_TN.to(h_NN.dtype)
    if weight_T is not None:
        x = x * weight_T.to(h_NN.dtype).clamp(min=0).sqrt().unsqueeze(1)
    for low, high in moment_strips(h_NN.shape[0]) if strips is None else strips:
        part = h_NN[low:high, low:]
        torch.addmm(part, x[:, low:high].T, x[:, low:], out=part)


def mirror_(h_NN: Tensor) -> Tensor:
    """Copy what stands above the diagonal below it, in place: [..., N, N]."""
    for low, high in moment_strips(h_NN.shape[-1]):
        corner = h_NN[..., low:high, low:high]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        h_NN[..., high:, low:high] = h_NN[..., low:high, high:].mT
    return h_NN


def _work_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moment_strips(size: int) -> list[tuple[int, int]]:
    """Rows [low, high) that are computed together, from the diagonal on: the first strip is the longest."""
    width = min(max(SYRK_MIN, -(-size // SYRK_BLOCKS)), SYRK_MAX)
    return [(low, min(low + width, size)) for low in range(0, size, width)]


def live_mean(h_ENN: Tensor) -> Tensor:
    """[E] mean of the diagonal over inputs that fire; 1 where none does."""
    diagonal = h_ENN.diagonal(dim1=-2, dim2=-1)
    live = (diagonal != 0).sum(-1)
    return torch.where(live > 0, diagonal.sum(-1) / live.clamp(min=1), torch.ones_like(diagonal[:, 0]))


def filled_diagonal(h_ENN: Tensor) -> Tensor:
    """[E, N] diagonal in which inputs that never fire (zero) have the mean of the live ones: no data is no reason to erase a weight.

    An expert without any live input gets ones; with a zero matrix around them every solver rounds to nearest.
    """
    diagonal = h_ENN.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal == 0, live_mean(h_ENN)[:, None], diagonal)


def damp(h_ENN: Tensor, damping: float | Tensor) -> Tensor:
    """`fill_dead`, then `+ damping * mean(live diagonal) * I` (GPTQ, 2210.17323).

    Args:
        damping: one share for all matrices or [E].
    """
    return damp_(h_ENN.clone(), damping)


def damp_(h_ENN: Tensor, damping: float | Tensor) -> Tensor:
    """`damp` in place: a Hessian of a wide layer takes gigabytes."""
    diagonal = h_ENN.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(filled_diagonal(h_ENN) + (damping * live_mean(h_ENN))[:, None])
    return h_ENN


def factor_(h_ENN: Tensor) -> tuple[Tensor, Tensor]:
    """`H = F D F^T`, F unit lower triangular, by one Cholesky in place: F's part below the diagonal replaces H's.

    What stands on and above the diagonal afterwards has no meaning. Blocks of columns from left to right: one product with all
    earlier columns each, so that nearly everything is a matrix product; a batch of small factorisations on the diagonal.
    With rows and columns in reverse this is all that GPTQ needs (LDL form; QuIP, 2307.13304): no inverse is ever formed.

    Returns:
        (D [E, N], ok bool [E]). Where the matrix is not positive definite ok is False, F the identity (with which GPTQ *is*
        round-to-nearest) and D zero; the others in the batch are not affected.
    """
    experts, size, _ = h_ENN.shape
    ok = torch.ones(experts, dtype=torch.bool, device=h_ENN.device)
    for low in range(0, size, CHOLESKY_BLOCK):
        high = min(low + CHOLESKY_BLOCK, size)
        if low:
            h_ENN[:, low:, low:high] -= torch.bmm(h_ENN[:, low:, :low], h_ENN[:, low:high, :low].mT)
        corner, info = torch.linalg.cholesky_ex(h_ENN[:, low:high, low:high])
        ok &= info == 0
        h_ENN[:, low:high, low:high] = corner
        if high < size:
            below = h_ENN[:, high:, low:high]
            below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
    diagonal = h_ENN.diagonal(dim1=-2, dim2=-1).clone()
    ok &= torch.isfinite(diagonal).all(-1) & (diagonal > 0).all(-1)
    h_ENN /= torch.where(ok[:, None], diagonal, torch.ones_like(diagonal)).unsqueeze(-2)
    if not bool(ok.all()):
        h_ENN[~ok] = 0
    return torch.where(ok[:, None], diagonal.square(), torch.zeros_like(diagonal)), ok


def shrink(h_sum_ENN: Tensor, weight_sum_E: Tensor, weight_sq_sum_E: Tensor, h_layer: Tensor) -> Tensor:
    """Each expert's mean second moment, drawn towards the layer's by how little data the expert saw.

    `(1 - c) h_sum / weight_sum + c h_layer`, `c = N / (N + n_eff)`, `n_eff = (sum w)^2 / sum w^2`. No threshold: an expert
    without tokens (n_eff = 0) takes the layer's statistics, one with many keeps its own.

    Args:
        h_sum_ENN: weighted sums of x x^T over each expert's tokens.
        weight_sum_E, weight_sq_sum_E: sums of the token weights and of their squares.
        h_layer: mean x x^T over the layer's tokens, [N, N], or [E, N, N] where it differs by expert.
    """
    return shrink_(h_sum_ENN.clone(), weight_sum_E, weight_sq_sum_E, h_layer)


def shrink_(h_sum_ENN: Tensor, weight_sum_E: Tensor, weight_sq_sum_E: Tensor, h_layer: Tensor) -> Tensor:
    """`shrink` in place."""
    n = h_sum_ENN.shape[-1]
    seen = weight_sq_sum_E > 0
    effective = torch.where(seen, weight_sum_E.square() / torch.where(seen, weight_sq_sum_E, 1), torch.zeros_like(weight_sum_E))
    c = (n / (n + effective)).to(h_sum_ENN.dtype)
    own = ((1 - c) / torch.where(weight_sum_E > 0, weight_sum_E, torch.ones_like(weight_sum_E))).to(h_sum_ENN.dtype)
    return h_sum_ENN.mul_(own[:, None, None]).addcmul_(c[:, None, None], h_layer)


def ridge(h_CNN: Tensor, cross_CON: Tensor, mu: float) -> Tensor:
    """[C, O, N] `cross (H + mu mean(diag H) I)^-1`: the weights of ridge regressions, given their second moments.

    A matrix gets zeros where its mean diagonal is not a positive finite number, or where the damped H cannot be factored.
    """
    mean = h_CNN.diagonal(dim1=-2, dim2=-1).mean(1)
    usable = (mean > 0) & torch.isfinite(mean)
    damped = h_CNN.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(torch.where(usable, mu * mean, 1.0)[:, None])
    factor, failed = torch.linalg.cholesky_ex(damped)
    solved = torch.cholesky_solve(cross_CON.mT, factor).mT
    return torch.where((usable & (failed == 0))[:, None, None], solved, 0.0)
