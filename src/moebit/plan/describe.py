"""What a model is made of, for people and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moebit.model.structure import LayerSites, Structure
from moebit.storage.checkpoint import Checkpoint
from moebit.storage.config import known_type, read_config

NOT_IN_MODEL = "stored, but not in the model"


def describe_structure(checkpoint: Checkpoint, structure: Structure) -> dict[str, Any]:
    """Layers, experts, routers, parameters and bytes by part."""
    parts = _parts(checkpoint, structure)
    moe = structure.moe_layers
    first = moe[0].moe
    assert first is not None
    unused = list(checkpoint.weights.unused)
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
        "left_over": dict(checkpoint.left_over),
        "read_as": read_as(checkpoint),
        "not_in_model_bytes": sum(checkpoint.entries[stored].spec.nbytes for stored in unused),
        "per_layer": [_describe_layer(layer) for layer in structure.layers],
    }


def read_as(checkpoint: Checkpoint) -> dict[str, str] | None:
    """The checkpoint's own model type and the one that it is read as, where transformers does not know the first."""
    raw = read_config(checkpoint.path)
    kind = known_type(raw)
    return {"model_type": str(raw["model_type"]), "as": kind} if kind else None


def _describe_layer(layer: LayerSites) -> dict[str, Any]:
    moe = layer.moe
    result: dict[str, Any] = {"layer": layer.index, "linears": sum(len(g.names) for g in layer.groups), "kept": layer.kept}
    if moe:
        result |= {"experts": moe.layout.experts, "top_k": moe.top_k, "router": moe.router_kind, "shared": list(moe.shared)}
    return result


def _parts(checkpoint: Checkpoint, structure: Structure) -> dict[str, dict[str, int]]:
    """Parameters and bytes by part of the model; the bytes of all parts together are those of the safetensors files."""
    label, weights = _labels(structure), checkpoint.weights
    parts: dict[str, dict[str, int]] = {}

    def add(part: str, parameters: int, count: int) -> None:
        known = parts.setdefault(part, {"parameters": 0, "bytes": 0})
        known["parameters"] += parameters
        known["bytes"] += count

    for name, parameter in checkpoint.model.named_parameters():
        add(label(name), math.prod(parameter.shape), 0)
    counted: set[str] = set()  # several parameters may lie in one stored tensor
    for name in sorted(weights.available()):
        for entry in weights.stored(name):
            add(label(name), 0, 0 if entry.name in counted else entry.spec.nbytes)
            counted.add(entry.name)
    stored = {name: entry.spec.nbytes for name, entry in checkpoint.entries.items()}
    if left := sum(count for name, count in stored.items() if name not in counted):
        add(NOT_IN_MODEL, 0, left)
    add("file headers", 0, checkpoint.size_bytes - sum(stored.values()) - checkpoint.beside_bytes)
    if checkpoint.beside:
        add(", ".join(file.name for file in checkpoint.beside), 0, checkpoint.beside_bytes)
    return parts


def _labels(structure: Structure) -> Callable[[str], str]:
    """Which part of the model a parameter belongs to, by its name."""
    labels = {}
    for layer in structure.layers:
        if layer.moe:
            labels[f"{layer.experts}."] = "routed experts"
            if layer.moe.router:
                labels[f"{layer.name}.{layer.moe.router}."] = "routers"
            labels |= {f"{layer.name}.{name}.": "shared experts" for name in layer.moe.shared}
    labels |= {f"{layer.name}.": "attention and other layers" for layer in structure.layers}
    return lambda name: next((text for prefix, text in labels.items() if name.startswith(prefix)), "embeddings, norm and head")
