"""Whether what a router decides follows from its logits alone, shown with random values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moebit.model.structure import LayerSites

PROBE_TOKENS = 16


PROBE_TOLERANCE = 1e-3  # routers that compute in float32 whatever they are given


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
