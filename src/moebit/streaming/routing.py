"""Routers at work: what arrives at them, and their logits.

Shape suffixes: T tokens, E experts, k experts per token, N inputs of the router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebit.model.experts import RoutedTokens
from moebit.model.structure import LayerSites
from moebit.streaming.stream import Stream

LOGIT_TOKENS = 4096  # tokens at a time


@dataclass(frozen=True)
class Routing:
    """What a router makes of every token.

    Attributes:
        ids: int64 [T, k] chosen experts. logits: float32 [T, E], the router's bias included; None where they cannot be seen.
    """

    ids: Tensor
    logits: Tensor | None


def router_bias(router: nn.Module, experts: int) -> Tensor | None:
    """[E] what a router adds to its logits; correction biases, which only choose, have other names."""
    bias = getattr(router, "bias", None)
    return bias if isinstance(bias, Tensor) and bias.shape == (experts,) else None


@contextmanager
def router_inputs(stream: Stream, sites: LayerSites) -> Iterator[list[Tensor]]:
    """Collects what arrives at a (loaded) layer's router while the layer runs inside this context.

    Yields a list that will hold one tensor [T, N], in the stream's store; none where the router is not called once per token.
    """
    assert sites.moe is not None
    assert sites.moe.router is not None
    total, seen, kept = stream.windows.numel(), 0, list[Tensor]()

    def note(name: str, rows: Tensor) -> None:
        nonlocal seen
        if not kept:
            kept.append(stream.store.allocate((total, rows.shape[1]), rows.dtype))
        if seen + len(rows) <= total:
            kept[0][seen : seen + len(rows)] = rows
        seen += len(rows)

    try:
        with stream.watching([sites.moe.router], note):
            yield kept
    finally:
        if seen != total:
            kept.clear()


def capture_router(stream: Stream, index: int) -> tuple[RoutedTokens, Tensor | None]:
    """What the layer's experts are asked, as `Stream.capture_routing`, and what arrives at its router: [T, N]."""
    with router_inputs(stream, stream.structure.layers[index]) as kept:
        routed = stream.capture_routing(index)
    return routed, kept[0] if kept else None


def logits(x_TN: Tensor, weight_EN: Tensor, bias_E: Tensor | None, stream: Stream) -> Tensor:
    """float32 [T, E] from inputs that may lie in a file."""
    weight, result = weight_EN.float(), torch.empty(len(x_TN), len(weight_EN))
    for start in range(0, len(x_TN), LOGIT_TOKENS):
        result[start : start + LOGIT_TOKENS] = x_TN[start : start + LOGIT_TOKENS].float() @ weight.T
        stream.store.release()
    return result if bias_E is None else result.add_(bias_E.float())


def reference_step(stream: Stream, index: int, chunk: int) -> Routing | None:
    """Advance a stream through an unquantized layer, as `Stream.step`; returns what its router said, None where there is none to see."""
    sites = stream.structure.layers[index]
    if sites.moe is None or sites.moe.router is None:
        stream.step(index, chunk)
        return None
    name = f"{sites.name}.{sites.moe.router}"
    weights, experts = stream.checkpoint.weights, sites.moe.layout.experts
    said: list[Tensor] = []
    weight = weights.parameter(f"{name}.weight").float()
    bias = weights.parameter(f"{name}.bias").float() if f"{name}.bias" in weights.available() else None

    def note(name: str, rows: Tensor) -> None:
        z = rows.float() @ weight.T
        said.append(z if bias is None or bias.shape != (experts,) else z + bias)

    with stream.watching([sites.moe.router], note):
        ids = stream.step(index, chunk)
    assert ids is not None
    seen = torch.cat(said)[: len(ids)] if said else None  # with the experts in chunks, the layer runs twice and says the same again
    return Routing(ids, seen if seen is not None and len(seen) == len(ids) else None)
