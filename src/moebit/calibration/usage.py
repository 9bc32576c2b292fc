"""How evenly text uses a model's experts, and which sequences use them most evenly together.

Imbalance is MoEQuant's (arXiv 2505.03804): with u_e the share of the routed slots that expert e received,
`sigma = sqrt( E/(E-1) * sum_e (u_e - 1/E)^2 )`: 0 where all get alike, 1 where one gets everything; mean over MoE layers.

Shape suffixes: B rows, S sequences, M MoE layers, E experts (of the layer with most; others are padded with zeros), T tokens,
k experts a token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.model.structure import Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.streaming.budget import make_budget
from moebit.streaming.stream import Stream

Progress = Callable[[str, int, int], None]
NGRAM = 4
SCORED_LOGITS = 2**22


def no_usage(rows: int, experts: Sequence[int]) -> Tensor:
    """int32 [B, M, E] zeros.

    Args:
        experts: of each of the M layers.
    """
    return torch.zeros(rows, len(experts), max(experts), dtype=torch.int32)


def add_usage(counts_BME: Tensor, routed: Sequence[Tensor]) -> None:
    """Count the experts that one token of every row chose.

    Args:
        routed: of each layer, [B, k]; ids that are no experts' (slots left empty) are not counted.
    """
    experts = counts_BME.shape[2]
    for layer, ids_Bk in enumerate(routed):
        inside = (ids_Bk >= 0) & (ids_Bk < experts)
        counts_BME[:, layer].scatter_add_(1, ids_Bk.clamp(0, experts - 1), inside.to(counts_BME.dtype))


def shares(counts: Tensor) -> Tensor:
    """[..., E] counts as shares of their sum, float64; all zero where nothing was counted."""
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def sigma_of_shares(u_ME: Tensor, experts: Sequence[int]) -> Tensor:
    """[..., M] imbalance of shares [..., M, E]."""
    count_M = torch.tensor(experts, dtype=torch.float64)
    even_ME = (torch.arange(u_ME.shape[-1]) < count_M.unsqueeze(1)) / count_M.unsqueeze(1)
    return ((u_ME - even_ME).square().sum(-1) * count_M / (count_M - 1).clamp(min=1)).sqrt()


def imbalance(u_ME: Tensor, experts: Sequence[int]) -> Tensor:
    """[...] mean over the layers of `sigma_of_shares`."""
    return sigma_of_shares(u_ME, experts).mean(-1)


def balanced_subset(counts_SME: Tensor, experts: Sequence[int], size: int) -> Tensor:
    """int64 [size], ascending: sequences that together use the experts evenly.

    Greedy: one after the other, the sequence whose usage added to that of those chosen gives the smallest imbalance; of equals, the first.
    """
    total_ME, left = torch.zeros_like(counts_SME[0], dtype=torch.int64), torch.ones(len(counts_SME), dtype=torch.bool)
    chosen = []
    for _ in range(size):
        judged = imbalance(shares(total_ME + counts_SME), experts).masked_fill(~left, math.inf)
        best = int(judged.argmin())
        total_ME, left[best] = total_ME + counts_SME[best], False
        chosen.append(best)
    return torch.tensor(sorted(chosen))


def distinct_ngrams(windows_SL: Tensor, n: int = NGRAM) -> float:
    """Share of the n-grams inside the windows that are not a repetition of another one."""
    grams = windows_SL.unfold(1, n, 1).reshape(-1, n)
    return len(torch.unique(grams, dim=0)) / len(grams)


def describe_windows(
    checkpoint: Checkpoint,
    structure: Structure,
    windows_SL: Tensor,
    end_ids: Sequence[int],
    memory: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What windows of tokens, sampled or not, mean to a model: use of its experts, perplexity, repetition.

    The model runs layer by layer within `memory` bytes. The first token of a window and a token behind an end of text do not count in the
    perplexity: nothing predicts them.

    Returns:
        `tokens`, `sigma` and `std` (mean over the MoE layers; std = sigma / sqrt(E)), `tokens_per_expert` (`min`, `median`, `max`, over all
        layers' experts), `unseen` experts, `perplexity`, `distinct_4grams`, and `per_layer` the same for each MoE layer.
    """
    report = progress or (lambda what, done, total: None)
    budget = make_budget(checkpoint, structure, memory, windows_SL.numel(), length=windows_SL.shape[1], solve=False, hessians=False)
    stream = Stream(checkpoint, structure, windows_SL, budget.store(Path(tempfile.gettempdir())), budget.batch_tokens, budget.slots)
    rows = []
    for sites in structure.layers:
        report("layers", sites.index, len(structure.layers))
        ids_Tk = stream.step(sites.index, budget.chunk.get(sites.index, 1))
        if sites.moe is not None and ids_Tk is not None:
            counts_ME = no_usage(1, [sites.moe.layout.experts])
            add_usage(counts_ME, [ids_Tk.reshape(1, -1)])
            rows.append(_describe_layer(sites.index, counts_ME[0, 0]))
    report("layers", len(structure.layers), len(structure.layers))
    counts = torch.cat([torch.tensor(row.pop("counts")) for row in rows])
    return {
        "tokens": windows_SL.numel(),
        "sigma": sum(row["sigma"] for row in rows) / len(rows),
        "std": sum(row["std"] for row in rows) / len(rows),
        **_spread(counts),
        "perplexity": _perplexity(stream, windows_SL, end_ids),
        "distinct_4grams": distinct_ngrams(windows_SL),
        "per_layer": rows,
    }


def _describe_layer(index: int, counts_E: Tensor) -> dict[str, Any]:
    sigma = float(imbalance(shares(counts_E).unsqueeze(0), [len(counts_E)]))
    row = {"layer": index, "experts": len(counts_E), "sigma": sigma, "std": sigma / math.sqrt(len(counts_E))}
    return row | _spread(counts_E) | {"counts": counts_E.tolist()}


def _spread(counts: Tensor) -> dict[str, Any]:
    ordered = counts.sort().values
    middle = (int(ordered[(len(ordered) - 1) // 2]) + int(ordered[len(ordered) // 2])) / 2
    return {
        "tokens_per_expert": {"min": int(ordered[0]), "median": middle, "max": int(ordered[-1])},
        "unseen": int((counts == 0).sum()),
    }


def _perplexity(stream: Stream, windows_SL: Tensor, end_ids: Sequence[int]) -> float:
    counted_SL = ~torch.isin(windows_SL[:, :-1], torch.tensor(list(end_ids), dtype=torch.int64))
    nats = 0.0
    for rows, logits_BLV in stream.logits():
        step = max(1, SCORED_LOGITS // logits_BLV[0].numel())
        for start in range(0, len(logits_BLV), step):
            some = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            likely = logits_BLV[start : start + step, :-1].log_softmax(-1).gather(2, windows_SL[some, 1:].unsqueeze(2)).squeeze(2)
            nats -= float(likely[counted_SL[some]].sum(dtype=torch.float64))
        stream.store.release()
    return math.exp(nats / max(1, int(counted_SL.sum())))
