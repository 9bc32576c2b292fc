"""Second moments of inputs ("Hessians") and their factorisation, batched over experts.

Every rule here is scale-free: only the direction of a Hessian matters to the solvers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment(x_TN: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """`sum_t weight_t x_t x_t^T`, [N, N] float32 (float64 for float64 inputs).

    Always accumulated in float32: the rounding of accumulated bf16 products makes Hessians indefinite. A plain product, because
    torch's is faster than BLAS's symmetric update (half the operations) at every size tried on an AVX-512 CPU.

    Raises:
        ValueError: `x_TN` is not a matrix (a collapsed token axis must never pass for features).
    """
    if x_TN.ndim != 2:
        raise ValueError(f"inputs must be [tokens, features], got shape {tuple(x_TN.shape)}")
    work = torch.float64 if x_TN.dtype == torch.float64 else torch.float32
    x = x_TN.to(work)
    if weight_T is not None:
        x = x * weight_T.to(work).clamp(min=0).sqrt().unsqueeze(1)
    return x.T @ x


def fill_dead(h_ENN: Tensor) -> Tensor:
    """Inputs that never fire (zero diagonal) get the mean of the live diagonal: no data is no reason to erase a weight.

    An expert without any live input gets the identity, for which every solver rounds to nearest.
    """
    diagonal = h_ENN.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    if not bool(dead.any()):
        return h_ENN
    live = (~dead).sum(-1)
    mean = torch.where(live > 0, diagonal.sum(-1) / live.clamp(min=1), torch.ones_like(diagonal[:, 0]))
    return h_ENN + torch.diag_embed(dead.to(h_ENN.dtype) * mean[:, None])


def damp(h_ENN: Tensor, damping: float | Tensor) -> Tensor:
    """`fill_dead`, then `+ damping * mean(live diagonal) * I` (GPTQ, 2210.17323).

    Args:
        damping: one share for all matrices or [E].
    """
    diagonal = h_ENN.diagonal(dim1=-2, dim2=-1)
    live = (diagonal != 0).sum(-1)
    mean = torch.where(live > 0, diagonal.sum(-1) / live.clamp(min=1), torch.ones_like(diagonal[:, 0]))
    filled = fill_dead(h_ENN)
    result = filled.clone() if filled is h_ENN else filled
    result.diagonal(dim1=-2, dim2=-1).add_((damping * mean)[:, None])
    return result


def factor(h_ENN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`H = F D F^T` with F unit upper triangular, by one Cholesky of the matrix with rows and columns reversed.

    This is all that GPTQ needs (LDL form; QuIP, 2307.13304): no inverse is ever formed.

    Returns:
        (F [E, N, N], D [E, N], ok bool [E]). Where the matrix is not positive definite, ok is False, F the identity
        (with which GPTQ *is* round-to-nearest) and D zero; the others in the batch are not affected.
    """
    lower, info = torch.linalg.cholesky_ex(h_ENN.flip(-2, -1))
    upper = lower.flip(-2, -1)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    ok = (info == 0) & torch.isfinite(diagonal).all(-1) & (diagonal > 0).all(-1)
    f = upper / torch.where(ok[:, None], diagonal, torch.ones_like(diagonal)).unsqueeze(-2)
    d = diagonal.square()
    if not bool(ok.all()):
        f[~ok] = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        d = torch.where(ok[:, None], d, torch.zeros_like(d))
    return f, d, ok


def shrink(h_sum_ENN: Tensor, weight_sum_E: Tensor, weight_sq_sum_E: Tensor, h_layer: Tensor) -> Tensor:
    """Each expert's mean second moment, drawn towards the layer's by how little data the expert saw.

    `(1 - c) h_sum / weight_sum + c h_layer`, `c = N / (N + n_eff)`, `n_eff = (sum w)^2 / sum w^2`. No threshold: an expert
    without tokens (n_eff = 0) takes the layer's statistics, one with many keeps its own.

    Args:
        h_sum_ENN: weighted sums of x x^T over each expert's tokens.
        weight_sum_E, weight_sq_sum_E: sums of the token weights and of their squares.
        h_layer: mean x x^T over the layer's tokens, [N, N], or [E, N, N] where it differs by expert.
    """
    n = h_sum_ENN.shape[-1]
    seen = weight_sq_sum_E > 0
    effective = torch.where(seen, weight_sum_E.square() / torch.where(seen, weight_sq_sum_E, 1), torch.zeros_like(weight_sum_E))
    c = (n / (n + effective))[:, None, None].to(h_sum_ENN.dtype)
    own = h_sum_ENN / torch.where(weight_sum_E > 0, weight_sum_E, torch.ones_like(weight_sum_E))[:, None, None].to(h_sum_ENN.dtype)
    return (1 - c) * own + c * h_layer
