"""What a model is made of, for people and JSON."""

from __future__ import annotations

import math
from typing import Any

from moebit.model.structure import LayerSites, Structure
from moebit.storage.checkpoint import Checkpoint


def describe_structure(checkpoint: Checkpoint, structure: Structure) -> dict[str, Any]:
    """Layers, experts, routers, parameters and bytes by part."""
    parts = _parts(checkpoint, structure)
    moe = structure.moe_layers
    first = moe[0].moe
    assert first is not None
    unused = list(getattr(checkpoint.weights, "unused", []))
    return {
        "model": str(checkpoint.path),
        "architecture": type(checkpoint.model).__name__,
        "layers": len(structure.layers),
        "moe_layers": len(moe),
        "experts": first.layout.experts,
        "top_k": first.top_k,
        "hidden_size": first.layout.hidden,
        "expert_intermediate_size": first.layout.intermediate,
        "shared_experts": bool(first.shared),
        "router": first.router_kind,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "parts": parts,
        "size_bytes": checkpoint.size_bytes,
        "shipped": checkpoint.shipped.describe() if checkpoint.shipped else None,
        "not_in_model": unused,
        "not_in_model_bytes": sum(checkpoint.entries[stored].spec.nbytes for stored in unused),
        "per_layer": [_describe_layer(layer) for layer in structure.layers],
    }


def _describe_layer(layer: LayerSites) -> dict[str, Any]:
    moe = layer.moe
    result: dict[str, Any] = {"layer": layer.index, "linears": sum(len(g.names) for g in layer.groups), "kept": layer.kept}
    if moe:
        result |= {"experts": moe.layout.experts, "top_k": moe.top_k, "router": moe.router_kind, "shared": list(moe.shared)}
    return result


def _parts(checkpoint: Checkpoint, structure: Structure) -> dict[str, dict[str, int]]:
    """Parameters and bytes of each part."""
    labels = _labels(structure)
    prefixes = [layer.name + "." for layer in structure.layers]
    specs = getattr(checkpoint.weights, "specs", {})
    result: dict[str, dict[str, int]] = {}
    for name, parameter in checkpoint.model.named_parameters():
        label = next((text for prefix, text in labels.items() if name.startswith(prefix)), None)
        if label is None:
            label = "attention and other layers" if any(name.startswith(p) for p in prefixes) else "embeddings, norm and head"
        part = result.setdefault(label, {"parameters": 0, "bytes": 0})
        part["parameters"] += math.prod(parameter.shape)
        part["bytes"] += specs[name].nbytes if name in specs else parameter.numel() * 2
    return result


def _labels(structure: Structure) -> dict[str, str]:
    """Beginnings of the names of routed experts, routers and shared experts."""
    labels = {}
    for layer in structure.moe_layers:
        assert layer.moe is not None
        labels[f"{layer.name}.{layer.moe.experts}."] = "routed experts"
        if layer.moe.router:
            labels[f"{layer.name}.{layer.moe.router}."] = "routers"
        labels |= {f"{layer.name}.{name}.": "shared experts" for name in layer.moe.shared}
    return labels
