"""How a router agrees with another on the same tokens.

Shape suffixes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.methods.router import SCORES, kl_top

PIECE = 4096  # tokens at a time


def agreement(
    ids_Tk: Tensor, other_ids_Tk: Tensor, logits_TE: Tensor | None, other_logits_TE: Tensor | None, score: str | None
) -> dict[str, float | None]:
    """Compare another router with one.

    Args:
        ids_Tk, other_ids_Tk: the experts that each chooses. logits_TE, other_logits_TE: where they are known.
        score: one of `SCORES`; None where it is not recognised.

    Returns:
        routing_exact: share of tokens with the same set of experts. routing_overlap: mean share of experts in common. kl: mean
        divergence of the other's probabilities from the first's, in nats; None where they are not known.
    """
    common = (ids_Tk.unsqueeze(2) == other_ids_Tk.unsqueeze(1)).any(2).float().mean(1)
    kl = None
    if score is not None and logits_TE is not None and other_logits_TE is not None:
        kl = mean_divergence(logits_TE, other_logits_TE, score)
    return {"routing_exact": float((common == 1).float().mean()), "routing_overlap": float(common.mean()), "kl": kl}


def mean_divergence(logits_TE: Tensor, other_logits_TE: Tensor, score: str) -> float:
    """Mean over tokens of the divergence of the other's probabilities, in nats."""
    total = 0.0
    for mine, theirs in zip(logits_TE.split(PIECE), other_logits_TE.split(PIECE), strict=True):
        u, v = SCORES[score](mine.double()), SCORES[score](theirs.double())
        total += float(kl_top(u, v, torch.ones_like(u, dtype=torch.bool)).sum())
    return total / max(1, len(other_logits_TE))
