"""Routers at work: what arrives at them, their logits, and whether what they decide follows from their logits alone.

Shape suffixes: T tokens, E experts, k experts per token, N inputs of the router.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moebit.model.capture import Call, observed
from moebit.model.experts import RoutedTokens
from moebit.model.structure import LayerSites
from moebit.storage.edits import Edit
from moebit.streaming.stream import Stream

PROBE_TOKENS = 16
PROBE_TOLERANCE = 1e-3  # routers that compute in float32 whatever they are given
PIECE = 4096  # tokens at a time


@dataclass(frozen=True)
class Replace(Edit):
    """Another value altogether: a router that was corrected or rounded. Not function-preserving, made by who knows that."""

    value: Tensor

    def apply(self, tensor: Tensor, start: int = 0) -> Tensor:
        return self.value[start : start + len(tensor)].to(tensor)


@dataclass(frozen=True)
class Routing:
    """What a router makes of every token.

    Attributes:
        ids: int64 [T, k] chosen experts. logits: float32 [T, E], the router's bias included; None where they cannot be seen.
    """

    ids: Tensor
    logits: Tensor | None


def not_linear(layer: nn.Module, sites: LayerSites) -> str | None:
    """Why a layer's router cannot be changed through its weight, or None where all it says follows from `weight @ x`.

    Proved with random values: input and weight are transformed so that the product stays the same; then every output of the module that
    holds the weight must stay the same. A norm inside, a second argument, a weight that is normalised are found by what they do.
    """
    if sites.moe is None or sites.moe.router is None:
        return "no router is recognised"
    module = layer.get_submodule(sites.moe.router)
    if type(module).forward is nn.Linear.forward:
        return None
    generator = torch.Generator().manual_seed(0)
    probe, weight = _random_copy(module, generator)
    size = weight.shape[1]
    x = torch.randn(PROBE_TOKENS, size, dtype=torch.float64, generator=generator)
    scale = 0.5 + torch.rand(size, dtype=torch.float64, generator=generator)
    v = torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64, generator=generator), dim=0)
    try:
        with torch.no_grad():
            before = _outputs(probe(x))
            probe.weight = nn.Parameter(_reflected(weight, v) / scale, requires_grad=False)
            after = _outputs(probe(_reflected(x, v) * scale))
    except Exception as error:  # a module's own code fails in any way when something is missing
        return f"{type(module).__name__} does not run on its input alone ({type(error).__name__})"
    if not before or len(before) != len(after) or not all(_alike(a, b) for a, b in zip(before, after, strict=True)):
        return f"{type(module).__name__} computes more than a product with its weight"
    return None


def _random_copy(module: nn.Module, generator: torch.Generator) -> tuple[Any, Tensor]:
    """A copy with small random values in float64, and its weight."""
    probe: Any = copy.deepcopy(module)
    for owner in probe.modules():
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for table in tables:
            for leaf, value in table.items():
                if value is None or not value.is_floating_point():
                    continue
                random = (
                    torch.randn(value.shape, dtype=torch.float64, generator=generator) / max(1, value.shape[-1] if value.ndim else 1) ** 0.5
                )
                table[leaf] = nn.Parameter(random, requires_grad=False) if isinstance(value, nn.Parameter) else random
    return probe, probe.weight


def _reflected(rows: Tensor, v: Tensor) -> Tensor:
    """Rows mirrored at the plane across v: an orthogonal matrix that mixes all channels, without forming it."""
    return rows - 2 * (rows @ v)[:, None] * v


def _outputs(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.double(), b.double(), rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)


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

    def note(call: Call) -> None:
        nonlocal seen
        rows = call.rows
        if not kept:
            kept.append(stream.store.allocate((total, rows.shape[1]), rows.dtype))
        if seen + len(rows) <= total:
            kept[0][seen : seen + len(rows)] = rows
        seen += len(rows)

    router = stream.layer(sites.index).get_submodule(sites.moe.router)
    try:
        with observed({sites.moe.router: router}, note):
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
    for start in range(0, len(x_TN), PIECE):
        result[start : start + PIECE] = x_TN[start : start + PIECE].float() @ weight.T
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

    def note(call: Call) -> None:
        z = call.rows.float() @ weight.T
        said.append(z if bias is None or bias.shape != (experts,) else z + bias)

    with observed({name: stream.layer(index).get_submodule(sites.moe.router)}, note):
        ids = stream.step(index, chunk)
    assert ids is not None
    seen = torch.cat(said)[: len(ids)] if said else None  # with the experts in chunks, the layer runs twice and says the same again
    return Routing(ids, seen if seen is not None and len(seen) == len(ids) else None)
