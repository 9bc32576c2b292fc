"""A layer's router, corrected and rounded: from here on it runs, and is written, as it will be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebit.methods.agreement import agreement
from moebit.methods.realign import margin_weights, realign
from moebit.methods.router import NO_SCORE, NOT_ONCE, Divergence, align_router, score_function, search_rounded
from moebit.model.structure import LayerSites
from moebit.quantize.context import ChangedRouter, LayerContext, LayerState
from moebit.recipe import RouterSection
from moebit.storage.edits import Replace
from moebit.streaming.routing import Routing, capture_router, logits, router_bias
from moebit.streaming.stream import Stream

NO_REFERENCE = "what full precision says to the router's tokens is not known"


def adjust_router(context: LayerContext, state: LayerState) -> LayerState:
    """Realign and round the router of a layer whose attention is already quantized, as the recipe says."""
    moe, recipe = context.sites.moe, context.recipe.router
    assert moe is not None
    reason, name = context.plan.routers[context.sites.index], context.full(f"{moe.router}.weight")
    if moe.router is None or name in context.sink.weights.stored_together() or (reason and recipe.bits == 16):
        return _reported(state, {"skipped": dict.fromkeys(recipe.wanted, reason)})
    weight = context.sink.weights.parameter(name)
    if state.stream is None:
        context.edit({name: (Replace(search_rounded(weight, recipe.bits, weight.dtype, recipe.ratios)),)})
        return _reported(state, {"bits": recipe.bits})
    seen = _look(state.stream, context.sites, weight, state.reference.routing, reason)
    changed, report, skipped = _changed(seen, recipe, moe.top_k)
    after = seen.logits(changed) if seen.z is not None else None
    if not torch.equal(changed, weight):
        context.edit({name: (Replace(changed),)})
    return replace(state, router=ChangedRouter(report, skipped, seen.yardstick, after, seen.score))


def _reported(state: LayerState, report: Mapping[str, Any]) -> LayerState:
    return replace(state, report=replace(state.report, router=report))


@dataclass(frozen=True)
class _Seen:
    """A router at work.

    Attributes:
        weight: [E, N] as it is stored. bias: what is added to its logits.
        ids, affinity: [T, k] what it decides. x: [T, N] what arrives at it; None where it is not called once for every token.
        z: [T, E] its logits; None where its decisions do not follow from them, for the reason that `reason` gives.
        score: the function that turns logits into affinities, None where it is not recognised.
        reference: what full precision says to the same tokens.
    """

    stream: Stream
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    x: Tensor | None
    z: Tensor | None
    score: str | None
    reason: str | None
    reference: Routing | None

    @property
    def yardstick(self) -> Routing:
        """What the router is compared with: full precision's, or itself as it was, on the inputs that arrive."""
        return self.reference or Routing(self.ids, self.z)

    def logits(self, weight_EN: Tensor) -> Tensor | None:
        """[T, E] logits with another weight."""
        return None if self.x is None else logits(self.x, weight_EN, self.bias, self.stream)


def _look(stream: Stream, sites: LayerSites, weight_EN: Tensor, reference: Routing | None, reason: str | None) -> _Seen:
    """Run the layer up to its experts and look at its router; `reason` says why its decisions do not follow from `weight @ x`."""
    assert sites.moe is not None
    assert sites.moe.router is not None
    routed, x = capture_router(stream, sites.index)
    reason = reason or (NOT_ONCE if x is None else None)
    bias = router_bias(stream.layer(sites.index).get_submodule(sites.moe.router), sites.moe.layout.experts)
    z = logits(x, weight_EN, bias, stream) if x is not None and not reason else None
    score = score_function(z, routed.ids, routed.weights) if z is not None else None
    return _Seen(stream, weight_EN, bias, routed.ids, x, z, score, reason, reference)


def _changed(seen: _Seen, recipe: RouterSection, top_k: int) -> tuple[Tensor, dict[str, Any], dict[str, str]]:
    """(the router's new weight in its stored type, numbers for the report, what was skipped and why)."""
    report: dict[str, Any] = {"score": seen.score, "against": "full precision" if seen.reference else "the router as it was"}
    yardstick = seen.yardstick
    report["before"] = agreement(yardstick.ids, seen.ids, yardstick.logits, seen.z, seen.score)
    weight, skipped = seen.weight.float(), dict[str, str]()
    if recipe.realign == "ridge":
        if seen.x is None or seen.z is None or seen.reference is None or seen.reference.logits is None:
            skipped["realign"] = seen.reason or NO_REFERENCE
        else:
            weight, numbers = _realigned(seen, recipe, seen.x, seen.reference.logits, top_k)
            report |= numbers
    if recipe.bits < 16:
        weight, numbers, why = _rounded(seen, recipe, weight)
        report |= numbers
        skipped |= why
    return weight.to(seen.weight.dtype), report, skipped


def _realigned(seen: _Seen, recipe: RouterSection, x: Tensor, target: Tensor, top_k: int) -> tuple[Tensor, dict[str, Any]]:
    """The weight corrected for the drift of its inputs."""
    weights = margin_weights(target, top_k) if recipe.realign_weight == "margin" else torch.ones(len(target))
    wanted = target if seen.bias is None else target - seen.bias.float()
    stream = seen.stream
    fitted = realign(seen.weight.float(), x, wanted, weights, stream.windows.shape[1], stream.store.release)
    return fitted.weight, {"mu": fitted.mu, "held_out_error": list(fitted.held_out)}


def _rounded(seen: _Seen, recipe: RouterSection, weight: Tensor) -> tuple[Tensor, dict[str, Any], dict[str, str]]:
    """The weight on its grid: clipped so that the same experts stay chosen, or by its own error where that cannot be."""
    if recipe.align != "kl" or seen.x is None or seen.reason or seen.score is None:
        skipped = {"align": seen.reason or NO_SCORE} if recipe.align == "kl" else {}
        return search_rounded(weight, recipe.bits, seen.weight.dtype, recipe.ratios), {"bits": recipe.bits}, skipped
    counted = Divergence(recipe.top_share, recipe.kl_weight)
    aligned = align_router(
        weight, seen.x, seen.ids, recipe.bits,
        score=seen.score, bias_E=seen.bias, counted=counted, stored=seen.weight.dtype, ratios=recipe.ratios,
    )  # fmt: skip
    report = {"ratios": aligned.ratios, "loss_unclipped": aligned.loss_before, "loss": aligned.loss, "bits": recipe.bits}
    return aligned.weight, report, {}
