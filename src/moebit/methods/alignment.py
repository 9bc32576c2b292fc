"""One layer's router, corrected and rounded: what arrives at it is captured, `realign` and `router` do the sums, the change is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebit.methods.realign import margin_weights, realign
from moebit.methods.router import SCORES, align_router, kl_top, rounded, score_function
from moebit.model.structure import LayerSites
from moebit.recipe import RouterSection
from moebit.streaming.routing import Routing, capture_router, logits, router_bias
from moebit.streaming.stream import Stream
from moebit.tensor.grids import CLIP_RATIOS

PIECE = 4096  # tokens at a time
NOT_ONCE = "the router is not called once for every token"
NO_SCORE = "what the router makes of its logits is not recognised"
NO_REFERENCE = "what full precision says to the router's tokens is not known"


@dataclass(frozen=True)
class AdjustedRouter:
    """A router's new weight and what it changed.

    Attributes:
        weight: in the type that is stored; None where nothing changed.
        report: numbers for report.json (docs/format.md). skipped: what the recipe asks for and was not done, with the reason.
        yardstick: what the router is compared with. logits: of the new weight, where they are known. score: its score function.
    """

    weight: Tensor | None
    report: dict[str, Any]
    skipped: dict[str, str]
    yardstick: Routing
    logits: Tensor | None
    score: str | None

    def described(self, ids_Tk: Tensor) -> dict[str, Any]:
        """The report, once it is known which experts the new router chooses."""
        after = agreement(self.yardstick, Routing(ids_Tk, self.logits), self.score)
        return {**self.report, "after": after, "skipped": self.skipped}


def adjust_router(
    stream: Stream, sites: LayerSites, recipe: RouterSection, weight_EN: Tensor, reference: Routing | None, reason: str | None
) -> AdjustedRouter:
    """Realign and round the router of a loaded layer whose attention is already quantized; the layer itself is left as it is.

    Args:
        stream: in front of the layer. weight_EN: the router's weight as stored.
        reference: what full precision says to the same tokens; the target of realignment and the yardstick of the report. Without it
            the yardstick is the router as it is, on the inputs that arrive.
        reason: why the router's decisions do not follow from `weight @ x`, if they don't: then it is rounded by weight error alone.
    """
    assert sites.moe is not None
    assert sites.moe.router is not None
    routed, x = capture_router(stream, sites.index)
    reason = reason or (NOT_ONCE if x is None else None)
    bias = router_bias(stream.layer(sites.index).get_submodule(sites.moe.router), sites.moe.layout.experts)
    z = logits(x, weight_EN, bias, stream) if x is not None and not reason else None
    score = score_function(z, routed.ids, routed.weights) if z is not None else None
    yardstick = reference or Routing(routed.ids, z)
    report: dict[str, Any] = {"score": score, "against": "full precision" if reference else "the router as it was"}
    report["before"] = agreement(yardstick, Routing(routed.ids, z), score)
    weight, skipped = weight_EN.float(), dict[str, str]()
    if recipe.realign == "ridge":
        if x is None or z is None or reference is None or reference.logits is None:
            skipped["realign"] = reason or NO_REFERENCE
        else:
            weight, numbers = _realigned(stream, recipe, weight, x, reference.logits, bias, sites.moe.top_k)
            report |= numbers
    if recipe.bits < 16:
        if recipe.align == "kl" and x is not None and not reason and score is not None:
            aligned = align_router(
                weight, x, routed.ids, recipe.bits, score=score, bias_E=bias, share=recipe.top_share, weight=recipe.kl_weight,
                stored=weight_EN.dtype,
            )  # fmt: skip
            weight = aligned.weight
            report |= {"ratios": aligned.ratios, "loss_unclipped": aligned.loss_before, "loss": aligned.loss}
        else:
            weight = search_rounded(weight, recipe.bits, weight_EN.dtype)
            if recipe.align == "kl":
                skipped["align"] = reason or NO_SCORE
        report["bits"] = recipe.bits
    changed = weight.to(weight_EN.dtype)
    after = logits(x, changed, bias, stream) if x is not None and z is not None else None
    return AdjustedRouter(None if torch.equal(changed, weight_EN) else changed, report, skipped, yardstick, after, score)


def _realigned(
    stream: Stream, recipe: RouterSection, weight: Tensor, x: Tensor, target: Tensor, bias: Tensor | None, top_k: int
) -> tuple[Tensor, dict[str, Any]]:
    weights = margin_weights(target, top_k) if recipe.realign_weight == "margin" else torch.ones(len(target))
    wanted = target if bias is None else target - bias.float()
    fitted = realign(weight, x, wanted, weights, stream.windows.shape[1], stream.store.release)
    return fitted.weight, {"mu": fitted.mu, "held_out_error": list(fitted.held_out)}


def search_rounded(w_EN: Tensor, bits: int, stored: torch.dtype) -> Tensor:
    """[E, N]: round to nearest, each row with the clipping ratio whose rounding error is least; looks at no tokens."""
    candidates = torch.stack([rounded(w_EN, ratio, bits, stored) for ratio in CLIP_RATIOS])
    best = (candidates.float() - w_EN.float()).square().sum(2).argmin(0)
    return candidates[best, torch.arange(len(w_EN))]


def agreement(reference: Routing, mine: Routing, score: str | None) -> dict[str, float | None]:
    """How a router agrees with another on the same tokens.

    Returns:
        routing_exact: share of tokens with the same set of experts. routing_overlap: mean share of experts in common. kl: mean
        divergence of mine from the reference's probabilities, in nats; None where they are not known.
    """
    common = (reference.ids.unsqueeze(2) == mine.ids.unsqueeze(1)).any(2).float().mean(1)
    kl = None
    if score is not None and reference.logits is not None and mine.logits is not None:
        total = 0.0
        for theirs, own in zip(reference.logits.split(PIECE), mine.logits.split(PIECE), strict=True):
            u, v = SCORES[score](theirs.double()), SCORES[score](own.double())
            total += float(kl_top(u, v, torch.ones_like(u, dtype=torch.bool)).sum())
        kl = total / max(1, len(mine.logits))
    return {"routing_exact": float((common == 1).float().mean()), "routing_overlap": float(common.mean()), "kl": kl}
